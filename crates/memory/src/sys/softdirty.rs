//! Soft-dirty bits and what else `/proc/PID/pagemap` says of each page (Documentation/admin-guide/mm/soft-dirty.rst and
//! pagemap.rst): how kernels without PAGEMAP_SCAN tell written pages.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::OnceLock;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::pages::{PageRange, PageSet, page_size};

const SOFT_DIRTY: u64 = 1 << 55;
/// Mapped once. The pages of zeroes never say so.
const EXCLUSIVE: u64 = 1 << 56;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Of one entry, in bytes.
const ENTRY_BYTES: u64 = 8;
/// Entries taken from the kernel by one call.
const ENTRIES: usize = 16 * 1024;
/// A huge page of the one architecture on which processes are armed, in bytes.
pub(crate) const HUGE_BYTES: u64 = 2 << 20;

/// Whether writes show in this kernel's soft-dirty bits; tried once, on a page of this process. All of its pages are
/// marked clean by that, which only costs it a fault for each that it writes.
pub(crate) fn check() -> io::Result<()> {
    static TRIED: OnceLock<Result<(), io::ErrorKind>> = OnceLock::new();
    TRIED.get_or_init(|| attempt().map_err(|e| e.kind())).map_err(io::Error::from)
}

fn attempt() -> io::Result<()> {
    let page = Own::map(page_size() as usize)?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let is_dirty = || Ok::<_, io::Error>(entry(&pagemap, page.address())? & SOFT_DIRTY != 0);
    page.write();
    let at_first = is_dirty()?;
    clear(std::process::id().cast_signed())?;
    let cleared = !is_dirty()?;
    page.write();
    if at_first && cleared && is_dirty()? { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// Takes the marks of all pages of process `pid`: what is written from now on is marked again.
pub(crate) fn clear(pid: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

/// Whether the kernel merges equal pages (KSM). A page that it merges loses its mark.
pub(crate) fn are_pages_merged() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/ksm/run").is_ok_and(|run| run.trim() == "1")
}

fn entry(pagemap: &File, address: u64) -> io::Result<u64> {
    let mut bytes = [0; ENTRY_BYTES as usize];
    pagemap.read_exact_at(&mut bytes, address / page_size() * ENTRY_BYTES)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Reads pages' entries; knows the frames that all untouched memory shares once it has been read.
pub(crate) struct PageMap {
    buffer: Vec<u8>,
    zero: u64,
    /// The first of the huge page of zeroes, if there is one.
    huge_zero: Option<u64>,
    /// Keeps the huge page of zeroes where it is.
    _kept: Own,
}

impl PageMap {
    /// Needs CAP_SYS_ADMIN: frames are not told to others.
    pub(crate) fn new() -> io::Result<Self> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let page = Own::map(page_size() as usize)?;
        page.read(page.address());
        let zero = entry(&pagemap, page.address())? & FRAME;
        if zero == 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let kept = Own::map(2 * HUGE_BYTES as usize)?;
        let huge = kept.address().next_multiple_of(HUGE_BYTES);
        kept.advise_huge();
        kept.read(huge);
        let (first, last) = (entry(&pagemap, huge)?, entry(&pagemap, huge + HUGE_BYTES - page_size())?);
        let whole = first & PRESENT != 0 && last & FRAME == (first & FRAME) + HUGE_BYTES / page_size() - 1;
        let huge_zero = (whole && first & EXCLUSIVE == 0).then_some(first & FRAME);
        Ok(Self { buffer: vec![0; ENTRIES * ENTRY_BYTES as usize], zero, huge_zero, _kept: kept })
    }

    /// Adds the pages of `range` that hold something, in memory or swapped out, to `there`, and those of them that were
    /// written (all of them if it is `whole`) to `written`. The sets hold nothing beyond `range.start`. An open
    /// `/proc/PID/pagemap` stays with the address space it was opened for; once that is gone nothing is found.
    pub(crate) fn look(
        &mut self,
        pagemap: &File,
        range: PageRange,
        whole: bool,
        there: &mut PageSet,
        written: &mut PageSet,
    ) -> io::Result<()> {
        for part in range.steps(ENTRIES as u64 * page_size()) {
            let bytes = &mut self.buffer[..(part.pages() * ENTRY_BYTES) as usize];
            match pagemap.read_exact_at(bytes, part.start / page_size() * ENTRY_BYTES) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
            let (entries, _) = self.buffer[..(part.pages() * ENTRY_BYTES) as usize].as_chunks();
            for (n, bytes) in entries.iter().enumerate() {
                let entry = u64::from_ne_bytes(*bytes);
                if entry & (PRESENT | SWAPPED) == 0 || self.is_zero(entry) {
                    continue;
                }
                let start = part.start + n as u64 * page_size();
                let page = PageRange { start, end: start + page_size() };
                there.push(page);
                if whole || entry & SOFT_DIRTY != 0 || self.may_be_zero(entry) {
                    written.push(page);
                }
            }
        }
        Ok(())
    }

    fn is_zero(&self, entry: u64) -> bool {
        let huge = |first: u64| (first..first + HUGE_BYTES / page_size()).contains(&(entry & FRAME));
        entry & PRESENT != 0 && (entry & FRAME == self.zero || self.huge_zero.is_some_and(huge))
    }

    /// Where the huge page of zeroes is not known, what could be it counts as written: memory that was given back and
    /// read again is not marked.
    fn may_be_zero(&self, entry: u64) -> bool {
        self.huge_zero.is_none() && entry & (PRESENT | EXCLUSIVE) == PRESENT
    }
}

/// Private anonymous memory of this process.
struct Own {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory owned by this value, at an address that nobody else knows.
unsafe impl Send for Own {}

impl Own {
    fn map(bytes: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, bytes })
    }

    fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Huge pages if there are any; the smaller ones do where not.
    fn advise_huge(&self) {
        // SAFETY: advice on a mapping of ours does not change what it holds.
        let _ = unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.bytes, Advice::LinuxHugepage) };
    }

    fn read(&self, address: u64) {
        let offset = (address - self.address()) as usize;
        debug_assert!(offset < self.bytes);
        // SAFETY: within the mapping, which is readable.
        unsafe { self.base.as_ptr().add(offset).read_volatile() };
    }

    /// Writes its first byte.
    fn write(&self) {
        // SAFETY: the mapping is writable and has at least one byte.
        unsafe { self.base.as_ptr().write_volatile(1) };
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
