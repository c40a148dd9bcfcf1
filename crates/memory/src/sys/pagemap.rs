//! ioctl(PAGEMAP_SCAN): which pages a process has (Documentation/admin-guide/mm/pagemap.rst, kernel ≥ 6.7).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;

use crate::pages::{PageRange, PageSet};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Regions taken from the kernel by one call; 24 bytes each.
const REGIONS: usize = 16 * 1024;

pub(crate) const WRITTEN: u64 = 1 << 1;
pub(crate) const PRESENT: u64 = 1 << 3;
pub(crate) const SWAPPED: u64 = 1 << 4;
/// The page of zeroes that all untouched memory shares once it has been read.
pub(crate) const ZERO: u64 = 1 << 5;
/// MADV_GUARD_INSTALL (kernel ≥ 6.15 tells).
pub(crate) const GUARD: u64 = 1 << 8;

/// Write-protect what matches, in one step with telling it.
pub(crate) const WP_MATCHING: u64 = 1;
/// Fail with EPERM where writes are not tracked.
pub(crate) const CHECK_WPASYNC: u64 = 2;

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Which pages are wanted: those with every category of `with`, at least one of `any` and none of `without`.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub with: u64,
    pub any: u64,
    pub without: u64,
}

/// Room for the kernel's answers, to be used again.
pub(crate) struct Scanner {
    regions: Vec<Region>,
}

impl Scanner {
    pub(crate) fn new() -> Self {
        Self { regions: vec![Region::default(); REGIONS] }
    }

    /// Adds the pages of `range` that are wanted to `found`, which must hold nothing beyond `range.start`. `flags` are
    /// [`WP_MATCHING`] and [`CHECK_WPASYNC`]. An open `/proc/PID/pagemap` stays with the address space it was opened
    /// for; once that is gone nothing is found.
    pub(crate) fn scan(
        &mut self,
        pagemap: &impl AsFd,
        range: PageRange,
        wanted: Wanted,
        flags: u64,
        found: &mut PageSet,
    ) -> io::Result<()> {
        for region in self.regions(pagemap, range, wanted, flags, PRESENT | SWAPPED)? {
            found.push(PageRange { start: region.start, end: region.end });
        }
        Ok(())
    }

    /// Adds the pages of `range` that are wanted to `found`, and those of them that were written to `written`: one walk
    /// through the page tables for both. As [`Scanner::scan`], without protecting anything.
    pub(crate) fn scan_written(
        &mut self,
        pagemap: &impl AsFd,
        range: PageRange,
        wanted: Wanted,
        flags: u64,
        found: &mut PageSet,
        written: &mut PageSet,
    ) -> io::Result<()> {
        for region in self.regions(pagemap, range, wanted, flags & !WP_MATCHING, PRESENT | SWAPPED | WRITTEN)? {
            let range = PageRange { start: region.start, end: region.end };
            found.push(range);
            if region.categories & WRITTEN != 0 {
                written.push(range);
            }
        }
        Ok(())
    }

    /// Adds the pages of `range` that are not write-protected to `found`, empty ones of existing page tables too; what has
    /// no page table at all is not told. The kernel has a short way for exactly this question: 0.3 ms per GiB, where one
    /// that is answered with most pages takes 3.
    pub(crate) fn scan_unprotected(
        &mut self,
        pagemap: &impl AsFd,
        range: PageRange,
        flags: u64,
        found: &mut PageSet,
    ) -> io::Result<()> {
        let wanted = Wanted { with: WRITTEN, any: 0, without: 0 };
        for region in self.regions(pagemap, range, wanted, flags, WRITTEN)? {
            found.push(PageRange { start: region.start, end: region.end });
        }
        Ok(())
    }

    /// What the kernel tells, in order; a part of it twice.
    fn regions(
        &mut self,
        pagemap: &impl AsFd,
        range: PageRange,
        wanted: Wanted,
        flags: u64,
        told_of: u64,
    ) -> io::Result<Vec<Region>> {
        let mut start = range.start;
        let mut told: Vec<Region> = Vec::new();
        // Each turn advances by at least one page, or ends.
        while start < range.end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags,
                start,
                end: range.end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: wanted.without,
                category_mask: wanted.with | wanted.without,
                category_anyof_mask: wanted.any,
                return_mask: told_of,
            };
            // SAFETY: the kernel reads and writes one `pm_scan_arg` and writes at most `vec_len` regions to `vec`;
            // both outlive the call.
            let count = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            told.extend(&self.regions[..count]);
            if argument.walk_end <= start {
                break;
            }
            start = argument.walk_end;
        }
        // The kernel's own buffer has 512 regions, and `walk_end` stays where that was full for the first time, although
        // the walk went on (do_pagemap_scan in fs/proc/task_mmu.c, 6.18). So the next call goes over a part again, and
        // tells and protects what has been written there meanwhile: out of order, and not to be lost.
        told.sort_unstable_by_key(|r| (r.start, r.end));
        Ok(told)
    }
}
