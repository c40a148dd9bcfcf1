//! A file in memory (memfd_create(2)), mapped shared, so that another process can have the same pages; given back
//! page by page.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::libc;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

/// What is never done to a file that two processes use: a page cut off would end who reads it with SIGBUS.
const FIXED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// An empty file in memory.
pub(crate) fn memory_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("godwit-pages", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// The file's size stays as it is, for everybody and from now on.
pub(crate) fn fix_size(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(file, FIXED)?)
}

pub(crate) fn is_size_fixed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(FIXED))
}

/// A part of such a file, for reading. Pages cost nothing until they are written.
pub(crate) struct Mapping {
    file: Arc<File>,
    /// Of the first byte, in the file.
    at: u64,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory owned by this value; who may access which part is up to its users.
unsafe impl Send for Mapping {}
// SAFETY: as above; every method that touches content takes raw pointers out or is `unsafe` itself.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` of the file from `at` on (multiples of the page size), which must be within it and stay so.
    pub(crate) fn new(file: Arc<File>, at: u64, bytes: usize) -> io::Result<Self> {
        let offset = i64::try_from(at).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { file, at, base, bytes })
    }

    pub(crate) fn base(&self) -> *const u8 {
        self.base.as_ptr().cast_const()
    }

    /// Of the mapping's first byte, in the file.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Gives the pages of `offset..offset + bytes` back, for every process; they read as zero afterwards. Callers give
    /// back only what nobody reads any more.
    pub(crate) fn release(&self, offset: usize, bytes: usize) {
        debug_assert!(offset + bytes <= self.bytes);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A failure leaves the pages where they are, which costs memory and nothing else.
        let _ = rustix::fs::fallocate(&*self.file, hole, self.at + offset as u64, bytes as u64);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
