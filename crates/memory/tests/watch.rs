//! Which pages of files are written, as the kernel tells it, on the file system that temporary files are on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use common::PAGE;
use godwit_memory::bpf::BpfError;
use godwit_memory::{Extents, FileWatch, Place, WatchError, Written};
use nix::libc;
use rustix::fs::{FallocateFlags, fallocate};

const BYTES: u64 = 8 << 20;

/// A watch and a directory it works in; `None`, told why, where this machine has none.
fn watch_or_skip() -> Option<(FileWatch, Place, tempfile::TempDir)> {
    if !common::root_or_skip() {
        return None;
    }
    let mut watch = match FileWatch::new() {
        Ok(watch) => watch,
        Err(WatchError::Bpf(error @ (BpfError::NoTypes { .. } | BpfError::Missing { .. }))) => {
            eprintln!("skipped: {error}");
            return None;
        }
        Err(error) => panic!("{error:?}"),
    };
    let directory = tempfile::tempdir().unwrap();
    match watch.place(directory.path()) {
        Ok(place) => Some((watch, place, directory)),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

fn file(directory: &tempfile::TempDir, name: &str) -> File {
    let file =
        File::options().create(true).truncate(true).read(true).write(true).open(directory.path().join(name)).unwrap();
    file.write_all_at(&vec![7; BYTES as usize], 0).unwrap();
    file
}

fn write_back(watch: &mut FileWatch, file: &File) {
    let size = file.metadata().unwrap().len();
    watch.write_back(file, size, &mut || true).unwrap();
}

fn pages(pages: &[Range<u64>]) -> Written {
    Written::Parts(pages.iter().map(|r| r.start * PAGE as u64..r.end * PAGE as u64).collect())
}

/// Whether `parts` have all of `page`.
fn has(written: &Written, page: u64) -> bool {
    let Written::Parts(parts) = written else { return true };
    parts.iter().any(|r| r.start <= page * PAGE as u64 && (page + 1) * PAGE as u64 <= r.end)
}

#[test]
fn what_is_written_after_the_file_was_written_back_is_told_once() {
    let Some((mut watch, place, directory)) = watch_or_skip() else { return };
    let (one, other) = (file(&directory, "one"), file(&directory, "other"));
    let id = watch.watch(&one, place).unwrap().unwrap();
    write_back(&mut watch, &one);
    // Read anew, pages are as small as can be: then exactly what was written is told.
    rustix::fs::fadvise(&one, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    rustix::fs::fadvise(&one, 0, None, rustix::fs::Advice::Random).unwrap();
    watch.take().unwrap();
    watch.written(id);
    other.write_all_at(b"x", 0).unwrap();
    watch.take().unwrap();
    assert!(!watch.has_written(id));
    for at in [0, 5 * PAGE as u64 + 17, 6 * PAGE as u64, BYTES] {
        one.write_all_at(b"x", at).unwrap();
    }
    watch.take().unwrap();
    assert!(watch.has_written(id));
    let last = BYTES / PAGE as u64;
    assert_eq!(watch.written(id), pages(&[0..1, 5..7, last..last + 1]));
    // It is dirty already.
    one.write_all_at(b"y", 0).unwrap();
    watch.take().unwrap();
    assert!(!watch.has_written(id));
    write_back(&mut watch, &one);
    one.write_all_at(b"z", 0).unwrap();
    watch.take().unwrap();
    assert_eq!(watch.written(id), pages(std::slice::from_ref(&(0..1))));
    write_back(&mut watch, &one);
    // Under another number: the first one says that it knows nothing any more.
    let again = watch.watch(&one, place).unwrap().unwrap();
    assert!(!watch.is_watched(id) && watch.is_watched(again));
    one.write_all_at(b"z", 0).unwrap();
    watch.take().unwrap();
    assert!(watch.has_written(id) && watch.has_written(again));
    assert_eq!(watch.written(id), Written::Unknown);
    watch.forget(id);
    assert!(watch.is_watched(again));
    watch.forget(again);
    assert!(!watch.is_watched(again));
}

#[test]
fn a_mapping_that_stays_writable_is_told_of_each_time() {
    let Some((mut watch, place, directory)) = watch_or_skip() else { return };
    let mapped = file(&directory, "mapped");
    let id = watch.watch(&mapped, place).unwrap().unwrap();
    // SAFETY: a new mapping of a file that stays as long; used and unmapped below.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            BYTES as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            std::os::fd::AsRawFd::as_raw_fd(&mapped),
            0,
        )
    }
    .cast::<u8>();
    for round in 0..3u8 {
        write_back(&mut watch, &mapped);
        watch.take().unwrap();
        watch.written(id);
        // SAFETY: within the mapping.
        unsafe { base.add(9 * PAGE + 100).write_volatile(round) };
        watch.take().unwrap();
        assert!(has(&watch.written(id), 9), "round {round}");
    }
    // SAFETY: mapped above, not used any more.
    unsafe { libc::munmap(base.cast(), BYTES as usize) };
}

#[test]
fn a_write_past_the_page_cache_is_told() {
    let Some((mut watch, place, directory)) = watch_or_skip() else { return };
    let plain = file(&directory, "direct");
    let id = watch.watch(&plain, place).unwrap().unwrap();
    write_back(&mut watch, &plain);
    watch.take().unwrap();
    watch.written(id);
    let direct =
        File::options().write(true).custom_flags(libc::O_DIRECT).open(directory.path().join("direct")).unwrap();
    let mut room = vec![1u8; 3 * PAGE];
    let aligned = room.as_ptr().align_offset(PAGE);
    room[aligned..].fill(3);
    direct.write_all_at(&room[aligned..aligned + PAGE], 4 * PAGE as u64).unwrap();
    watch.take().unwrap();
    assert!(watch.has_written(id));
    // Some file systems go through the page cache after all, and tell the page.
    let written = watch.written(id);
    assert!(has(&written, 4), "{written:?}");
    watch.take().unwrap();
    assert!(!watch.has_written(id));
}

/// What leaves no dirty page is seen by where the file is.
#[test]
fn holes_cuts_and_zeroes_are_elsewhere_on_the_disk() {
    let Some((mut watch, _, directory)) = watch_or_skip() else { return };
    let changed = file(&directory, "changed");
    let page = PAGE as u64;
    watch.write_back(&changed, BYTES, &mut || true).unwrap();
    let mut before = Extents::of(&changed).unwrap();
    let mut differing = |what: &str, wanted: &[Range<u64>]| {
        write_back(&mut watch, &changed);
        let now = Extents::of(&changed).unwrap();
        let found = now.differing(&before);
        for r in wanted {
            assert!(
                found.iter().any(|f| f.start <= r.start && r.end <= f.end),
                "{what}: {wanted:?} is not in {found:?}"
            );
        }
        before = now;
    };
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&changed, flags, 10 * page, 2 * page).unwrap();
    differing("a hole", std::slice::from_ref(&(10 * page..12 * page)));
    fallocate(&changed, FallocateFlags::ZERO_RANGE, 20 * page, page).unwrap();
    differing("zeroes", std::slice::from_ref(&(20 * page..21 * page)));
    changed.set_len(BYTES / 2).unwrap();
    changed.set_len(BYTES).unwrap();
    differing("a cut end", std::slice::from_ref(&(BYTES / 2..BYTES)));
    // Not every file system can.
    if fallocate(&changed, FallocateFlags::COLLAPSE_RANGE, 30 * page, page).is_ok() {
        differing("a range taken out", std::slice::from_ref(&(30 * page..BYTES / 2)));
    }
}

#[test]
fn a_large_file_is_written_back_in_pieces() {
    let Some((mut watch, _, directory)) = watch_or_skip() else { return };
    let sparse = File::create(directory.path().join("sparse")).unwrap();
    for (size, wanted) in [(1 << 20, 0), (256 << 20, 0), (1 << 30, 3)] {
        sparse.set_len(size).unwrap();
        let mut asked = 0;
        let alive = &mut || {
            asked += 1;
            true
        };
        watch.write_back(&sparse, size, alive).unwrap();
        assert_eq!(asked, wanted, "{size}");
    }
}

#[test]
fn memory_is_no_place_for_it() {
    let Some((mut watch, ..)) = watch_or_skip() else { return };
    let error = watch.place("/dev/shm".as_ref()).unwrap_err();
    assert!(matches!(&error, WatchError::Unfit { .. }), "{error}");
}

/// More pages than records fit, between two looks: nothing is known, and then again everything.
#[test]
fn what_is_told_too_fast_is_unknown_once() {
    let Some((_, _, directory)) = watch_or_skip() else { return };
    let mut watch = FileWatch::with_room(PAGE as u32).unwrap();
    let place = watch.place(directory.path()).unwrap();
    let sparse = File::create(directory.path().join("sparse")).unwrap();
    let id = watch.watch(&sparse, place).unwrap().unwrap();
    for page in 0..PAGE as u64 / 24 + 10 {
        sparse.write_all_at(b"x", page * 1000 * PAGE as u64).unwrap();
    }
    watch.take().unwrap();
    assert!(watch.has_written(id));
    assert_eq!(watch.written(id), Written::Unknown);
    assert!(!watch.has_written(id));
    sparse.write_all_at(b"x", 17 * PAGE as u64).unwrap();
    watch.take().unwrap();
    let written = watch.written(id);
    assert!(written != Written::Unknown && has(&written, 17), "{written:?}");
}
