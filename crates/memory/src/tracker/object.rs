//! One shared object: memory that several processes can have mapped (shared anonymous memory, memfd, SysV segments,
//! files on tmpfs).
//!
//! Page tables tell who wrote through a mapping we know. Others can write too: a process that came and went between
//! two rounds, write(2), a mapping made and unmade. Each of these leaves a trace, and an object with a trace is
//! *doubtful*: its content is compared with what was sent, page by page, by 64-bit hashes. Traces:
//!
//! - other mappings than last time, one that is not tracked, or a fork of a process that has it mapped;
//! - for objects that can be mapped anew: atime moved (mmap(2), shmat(2), read(2)). It is set back to [`MARK_S`] so
//!   that it moves at the next use also under relatime; where it does not move (noatime, checked once), the object is
//!   always doubtful;
//! - for objects that can be opened: mtime or ctime moved (write(2), truncation). Writing through a mapping moves them,
//!   too, so a memfd or a file that is written at all is always compared.
//!
//! What is doubtful stays so for one more round: who left the trace may not have been in the list of processes yet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;
use rustix::fs::{SealFlags, SeekFrom, Timespec, Timestamps};
use xxhash_rust::xxh3::xxh3_64;

use crate::maps::{LeftToCriu, Mapping};
use crate::pages::{PageRange, PageSet, page_size};

const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// The access time that says "not used since", in seconds.
const MARK_S: i64 = 1;
/// How maps shows a memfd without a name that nobody has open any more.
const RESTORED: &str = "/memfd: (deleted)";
/// What is compared at once, in bytes.
const COMPARE_BYTES: u64 = 1 << 20;

/// A shared object on this host. Numbers of SysV segments are their ids, which other objects can have as inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId {
    /// As in `st_dev` of stat(2).
    pub device: u64,
    pub inode: u64,
    pub sysv: bool,
}

/// How a shared object can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    /// MAP_SHARED | MAP_ANONYMOUS: by inheritance only.
    Anonymous,
    /// By memfd descriptors.
    Memfd,
    /// By shmat(2).
    SysV,
    /// By name, on a tmpfs.
    File,
}

/// An object, open for reading past its access time.
pub(crate) struct Object {
    pub id: ObjectId,
    pub kind: ObjectKind,
    file: File,
    /// Whether uses of it show in its access time.
    watchable: bool,
    /// For each page, the hash of what was last read for sending; 0 if it never was.
    hashes: std::sync::RwLock<Vec<AtomicU64>>,
}

/// When the object was changed or used (seconds and nanoseconds).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Times {
    modified: (i64, i64),
    changed: (i64, i64),
}

pub(super) enum Found {
    Object(Object),
    Left(LeftToCriu),
}

impl Object {
    /// The object behind a shared mapping of process `pid`, one of `all`, if it is one we carry.
    pub(super) fn open(pid: i32, mapping: &Mapping, all: &[i32]) -> io::Result<Found> {
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.range.start, mapping.range.end);
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(&path)?;
        let meta = file.metadata()?;
        match rustix::fs::fstatfs(&file)?.f_type {
            TMPFS_MAGIC if meta.is_file() => {}
            HUGETLBFS_MAGIC => return Ok(Found::Left(LeftToCriu::HugeTlb)),
            _ => return Ok(Found::Left(LeftToCriu::File)),
        }
        let kind = match mapping.path.as_str() {
            p if p.starts_with("/SYSV") => ObjectKind::SysV,
            // CRIU restores MAP_SHARED | MAP_ANONYMOUS memory as a memfd without a name, which it closes.
            RESTORED if !is_open(&meta, all) => ObjectKind::Anonymous,
            p if p.starts_with("/memfd:") => ObjectKind::Memfd,
            p if p.starts_with("/dev/zero") || p.starts_with("[anon_shmem:") => ObjectKind::Anonymous,
            _ => ObjectKind::File,
        };
        let id = ObjectId { device: meta.dev(), inode: meta.ino(), sysv: kind == ObjectKind::SysV };
        let mut object = Self { id, kind, file, watchable: true, hashes: std::sync::RwLock::default() };
        if object.is_sealed() {
            return Ok(Found::Left(LeftToCriu::Sealed));
        }
        if kind != ObjectKind::Anonymous {
            object.watchable = object.shows_use(&path).unwrap_or(false);
        }
        Ok(Found::Object(object))
    }

    pub(super) fn is_sealed(&self) -> bool {
        let seals = rustix::fs::fcntl_get_seals(&self.file);
        seals.is_ok_and(|s| s.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE))
    }

    /// Whether mmap(2) of the object moves its access time.
    fn shows_use(&self, path: &str) -> io::Result<bool> {
        self.mark()?;
        // Not by our own descriptor: that one is open with O_NOATIME.
        let other = File::open(path)?;
        let length = page_size() as usize;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing reads it, and it is unmapped at once.
        unsafe {
            let at = rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                &other,
                0,
            )?;
            rustix::mm::munmap(at, length)?;
        }
        let shown = self.file.metadata()?.atime() != MARK_S;
        self.mark()?;
        Ok(shown)
    }

    fn mark(&self) -> io::Result<()> {
        let last_access = Timespec { tv_sec: MARK_S, tv_nsec: 0 };
        let last_modification = Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
        Ok(rustix::fs::futimens(&self.file, &Timestamps { last_access, last_modification })?)
    }

    /// Whether it was written, cut, or mapped past the mappings we know since `last`; the times for next time.
    pub(super) fn was_used(&self, last: Times) -> io::Result<(bool, Times)> {
        if self.kind == ObjectKind::Anonymous {
            return Ok((false, last));
        }
        let times = |m: &std::fs::Metadata| Times {
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        };
        let now = self.file.metadata()?;
        if !self.watchable {
            return Ok((true, times(&now)));
        }
        if now.atime() == MARK_S {
            // Nobody has a descriptor of a SysV segment.
            return Ok((self.kind != ObjectKind::SysV && times(&now) != last, times(&now)));
        }
        // Setting the mark changes ctime. What changed between the two looks is not missed: the object is doubtful
        // next time, too.
        self.mark()?;
        Ok((true, times(&self.file.metadata()?)))
    }

    pub(super) fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len().next_multiple_of(page_size()))
    }

    /// The pages that hold something, in memory or swapped out.
    pub(super) fn extents(&self) -> io::Result<PageSet> {
        let mut set = PageSet::default();
        let mut at = 0;
        // Each turn advances beyond one extent.
        loop {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => return Ok(set),
                Err(error) => return Err(error.into()),
            };
            at = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?.next_multiple_of(page_size());
            set.extend_with(start - start % page_size(), at);
        }
    }

    /// The pages of `extents` whose content is not what was last read for sending.
    pub(super) fn differing(&self, extents: &PageSet) -> io::Result<PageSet> {
        let mut set = PageSet::default();
        let mut buffer = vec![0; COMPARE_BYTES as usize];
        let hashes = self.hashes.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        for range in extents.ranges() {
            let mut at = range.start;
            while at < range.end {
                let bytes = COMPARE_BYTES.min(range.end - at) as usize;
                self.read_at(at, &mut buffer[..bytes])?;
                for page in buffer[..bytes].chunks_exact(page_size() as usize) {
                    let known = hashes.get((at / page_size()) as usize).map(|h| h.load(Ordering::Relaxed));
                    if known != Some(hash(page)) {
                        set.extend_with(at, at + page_size());
                    }
                    at += page_size();
                }
            }
        }
        Ok(set)
    }

    /// Fills `buffer` with the object's content from `offset` on; beyond its end there are zeroes.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buffer[done..].fill(0);
        Ok(())
    }

    /// As [`Object::read_at`], and remembers what was read as sent.
    pub(crate) fn read_for_sending(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)?;
        let first = (offset / page_size()) as usize;
        let pages = buffer.len() / page_size() as usize;
        let mut hashes = self.hashes.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        if hashes.len() < first + pages {
            drop(hashes);
            let mut grown = self.hashes.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            let length = grown.len().max(first + pages);
            grown.resize_with(length, AtomicU64::default);
            drop(grown);
            hashes = self.hashes.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        for (page, slot) in buffer.chunks_exact(page_size() as usize).zip(&hashes[first..]) {
            slot.store(hash(page), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Whether one of the processes has a descriptor of it.
fn is_open(object: &std::fs::Metadata, pids: &[i32]) -> bool {
    let same = |meta: std::fs::Metadata| (meta.dev(), meta.ino()) == (object.dev(), object.ino());
    let open_in = |pid: &i32| {
        // What cannot be read may have it.
        let Ok(list) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return true };
        list.flatten().any(|fd| std::fs::metadata(fd.path()).is_ok_and(same))
    };
    pids.iter().any(open_in)
}

/// Never 0, which stands for "never sent".
fn hash(page: &[u8]) -> u64 {
    xxh3_64(page).max(1)
}

impl PageSet {
    fn extend_with(&mut self, start: u64, end: u64) {
        if let Some(range) = PageRange::new(start, end) {
            self.push(range);
        }
    }
}
