//! A process that is filled like one restored by CRIU, without CRIU: it registers memory with a userfaultfd, hands that
//! out, and then reads, writes, moves, gives back and forks at random, while it compares everything with what must be
//! there. What page N of the store holds at first is its number.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::libc;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::memory::{PAGE, Random, map, read, write};

/// Where the memory is, so that the store can be filled before: `AREAS` of `PAGES` pages, one behind the other.
pub const BASE: usize = 0x6000_0000_0000;
pub const AREAS: usize = 8;
pub const PAGES: usize = 512;
/// Pages of which this is the remainder by 8 are not in the store.
pub const UNKNOWN: usize = 5;
/// criu's word for a restore that is finished.
pub const FINISHED: u32 = 0x5253_5446;
const STEPS: usize = 3_000;

struct Area {
    base: *mut u8,
    /// What each page must hold.
    pages: Vec<u64>,
}

pub fn run(socket: &str, seed: u64) {
    let mut areas: Vec<Area> = (0..AREAS).map(area).collect();
    let uffd = register(&areas);
    let mut stream = hand_out(socket, std::process::id(), &uffd);
    drop(uffd);
    let mut random = Random(seed);
    // Some before everything "runs", as CRIU's restorer does.
    (0..50).for_each(|_| check(&mut random, &mut areas));
    stream.write_all(&FINISHED.to_ne_bytes()).unwrap();
    drop(stream);
    churn(&mut random, areas, true);
    println!("good");
}

/// As criu does.
pub fn hand_out(socket: &str, inner_pid: u32, uffd: &OwnedFd) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(&inner_pid.to_ne_bytes()).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [uffd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&stream, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    stream
}

fn area(number: usize) -> Area {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let at = (BASE + number * PAGES * PAGE) as *mut libc::c_void;
    // A page between areas would make each a mapping of its own; side by side, copies must not cross them: each second
    // one has another protection at first.
    let protection = if number.is_multiple_of(2) { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: the place is free, or the call fails.
    let base = unsafe { libc::mmap(at, PAGES * PAGE, protection, flags, -1, 0) };
    assert_eq!(base, at, "{}", std::io::Error::last_os_error());
    let first = (number * PAGES) as u64;
    let known = |n: u64| if n as usize % 8 == UNKNOWN { 0 } else { first + n + 1 };
    Area { base: base.cast(), pages: (0..PAGES as u64).map(known).collect() }
}

fn register(areas: &[Area]) -> OwnedFd {
    let ranges: Vec<_> = areas.iter().map(|a| (a.base, PAGES)).collect();
    let uffd = register_ranges(&ranges);
    for area in areas {
        // SAFETY: a mapping of ours becomes writable.
        unsafe { libc::mprotect(area.base.cast(), PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    }
    uffd
}

/// Mappings of ours, each with its pages.
pub fn register_ranges(ranges: &[(*mut u8, usize)]) -> OwnedFd {
    // SAFETY: userfaultfd takes flags; the result is a new descriptor.
    let uffd = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    // FORK, REMAP, REMOVE, UNMAP: what CRIU asks for.
    let mut api = [0xaau64, 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, 0];
    // SAFETY: struct uffdio_api has three words.
    assert_eq!(unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc018_aa3f, api.as_mut_ptr()) }, 0);
    for (base, pages) in ranges {
        let mut register = [*base as u64, (pages * PAGE) as u64, 1, 0];
        // SAFETY: struct uffdio_register has four words.
        assert_eq!(unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc020_aa00, register.as_mut_ptr()) }, 0);
    }
    uffd
}

fn check(random: &mut Random, areas: &mut [Area]) {
    let at = random.below(areas.len());
    let area = &mut areas[at];
    let page = random.below(area.pages.len());
    let found = read(area.base, page, 0);
    assert_eq!(found, area.pages[page], "area {at} page {page}");
}

fn churn(random: &mut Random, mut areas: Vec<Area>, may_fork: bool) {
    for _ in 0..STEPS {
        check(random, &mut areas);
        let at = random.below(areas.len());
        let page = random.below(areas[at].pages.len());
        match random.below(60) {
            0..20 => {
                let value = random.next();
                write(areas[at].base, page, 0, value);
                areas[at].pages[page] = value;
            }
            20..26 => give_back(&mut areas[at], page, random.below(20) + 1),
            26..28 => move_away(&mut areas[at]),
            28 if areas.len() > 4 => {
                let area = areas.swap_remove(at);
                // SAFETY: nothing uses the area any more.
                unsafe { libc::munmap(area.base.cast(), area.pages.len() * PAGE) };
            }
            29 if may_fork => fork(random, &areas),
            30 => std::thread::sleep(std::time::Duration::from_micros(200)),
            _ => {}
        }
    }
    for area in &areas {
        for (page, want) in area.pages.iter().enumerate() {
            assert_eq!(read(area.base, page, 0), *want, "page {page} at the end");
        }
    }
}

fn give_back(area: &mut Area, page: usize, count: usize) {
    let count = count.min(area.pages.len() - page);
    // SAFETY: part of a mapping of ours; its content is given up.
    unsafe { libc::madvise(area.base.add(page * PAGE).cast(), count * PAGE, libc::MADV_DONTNEED) };
    area.pages[page..page + count].fill(0);
}

/// Onto other memory, which is gone then; with the area's end cut off.
fn move_away(area: &mut Area) {
    let target = map(area.pages.len(), false, -1);
    write(target, 0, 0, 12345);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let bytes = area.pages.len() * PAGE;
    // SAFETY: both are mappings of ours, of the same size.
    let moved = unsafe { libc::mremap(area.base.cast(), bytes, bytes, flags, target) };
    if moved != libc::MAP_FAILED {
        area.base = moved.cast();
    }
}

/// A child that has the same memory, and changes its own.
fn fork(random: &mut Random, areas: &[Area]) {
    let seed = random.next() | 1;
    // SAFETY: there is one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let areas = areas.iter().map(|a| Area { base: a.base, pages: a.pages.clone() }).collect();
        churn(&mut Random(seed), areas, false);
        std::process::exit(0);
    }
    let mut status = 0;
    // SAFETY: the status outlives the call.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "a child found wrong content");
}
