//! Anonymous memory of our own that is reserved at once, used page by page and given back page by page.

use std::io;
use std::ptr::NonNull;

use nix::libc;

/// Private anonymous memory. Pages cost nothing until they are written.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory owned by this value; who may access which part is up to its users.
unsafe impl Send for Mapping {}
// SAFETY: as above; every method that touches content takes raw pointers out or is `unsafe` itself.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `bytes` (a multiple of the page size).
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, bytes })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Gives the pages of `offset..offset + bytes` back; they read as zero afterwards.
    pub(crate) fn release(&self, offset: usize, bytes: usize) {
        debug_assert!(offset + bytes <= self.bytes);
        // SAFETY: the range is within our own mapping; callers give back only what nobody reads any more. A failure
        // leaves the pages where they are, which costs memory and nothing else.
        unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), bytes, libc::MADV_DONTNEED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
