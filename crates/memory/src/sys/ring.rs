//! A ring of records from BPF programs (Documentation/bpf/ringbuf.rst), read by its only consumer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use nix::libc;

use crate::pages::page_size;

/// In a record's first word, beside its length in bytes: it is still being written.
const BUSY: u32 = 1 << 31;
/// It was given up by its writer.
const DISCARDED: u32 = 1 << 30;
/// Before each record: its length, and a number of the kernel's own.
const HEAD_BYTES: usize = 8;

/// The mapped ring: our position on a page of its own, then the kernel's on another and the records, mapped twice in a
/// row so that each is in one piece.
#[derive(Debug)]
pub(crate) struct Ring {
    ours: Part,
    theirs: Part,
    bytes: usize,
}

/// A mapping that is undone at the end.
#[derive(Debug)]
struct Part {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain shared memory that belongs to this value; everything in it is read and written by atomics, or by one
// consumer (`&mut self`) after the kernel has published it.
unsafe impl Send for Part {}

impl Part {
    fn map(ring: BorrowedFd<'_>, offset: usize, bytes: usize, protection: libc::c_int) -> io::Result<Self> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, ring.as_raw_fd(), offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, bytes })
    }

    /// The position that a part begins with.
    fn position(&self) -> &AtomicUsize {
        // SAFETY: the mapping is page aligned, at least a page long and lives as long as `self`; the kernel and we
        // change this word by whole stores only.
        unsafe { &*self.base.as_ptr().cast::<AtomicUsize>() }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl Ring {
    /// Maps a ring that was made with `bytes` of room: a power of two, and of pages.
    pub(crate) fn map(ring: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        let page = page_size() as usize;
        if !bytes.is_power_of_two() || !bytes.is_multiple_of(page) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let ours = Part::map(ring, 0, page, libc::PROT_READ | libc::PROT_WRITE)?;
        let theirs = Part::map(ring, page, page + 2 * bytes, libc::PROT_READ)?;
        Ok(Self { ours, theirs, bytes })
    }

    /// Takes out every record that is complete, in order, up to the first that is not.
    pub(crate) fn take(&mut self, mut each: impl FnMut(&[u8])) {
        let end = self.theirs.position().load(Ordering::Acquire);
        let mut at = self.ours.position().load(Ordering::Relaxed);
        // At most what the ring holds: each turn comes nearer to a fixed end.
        while at < end {
            let place = page_size() as usize + (at & (self.bytes - 1));
            // SAFETY: within the mapping, as `place` is less than a page and the ring's bytes; records begin at
            // multiples of 8. The kernel changes this word by whole stores.
            let head = unsafe { &*self.theirs.base.as_ptr().add(place).cast::<AtomicU32>() }.load(Ordering::Acquire);
            if head & BUSY != 0 {
                break;
            }
            let length = (head & !(BUSY | DISCARDED)) as usize;
            if head & DISCARDED == 0 && length <= self.bytes - HEAD_BYTES {
                // SAFETY: the second mapping of the records follows the first, so a record that begins in the first is
                // in one piece within both; the kernel does not touch it before our position has passed it.
                let record = unsafe {
                    std::slice::from_raw_parts(self.theirs.base.as_ptr().add(place + HEAD_BYTES).cast_const(), length)
                };
                each(record);
            }
            at += (HEAD_BYTES + length).next_multiple_of(8);
            self.ours.position().store(at, Ordering::Release);
        }
    }
}
