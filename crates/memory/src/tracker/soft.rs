//! Written pages by soft-dirty bits, where the kernel has no PAGEMAP_SCAN.
//!
//! Reading the bits and taking them are two calls, and what is written between the two would be lost. So all processes
//! stand still for both of them ([`Pause`]); for reading and sending the pages they run. In the first round nothing of
//! it is needed: all that is there is told, after the bits were taken.
//!
//! The bits are exact for pages, not for mappings: a mapping's own mark is lost when it is merged with its neighbour,
//! and mremap(2) moves whole page tables without marking anything. So each mapping is registered with the process's
//! userfaultfd, too, for write protection that is never used: registered mappings are not merged with others, and one
//! that is new or was moved is not registered. Such a mapping is told whole.
//!
//! A write to a huge page marks all of it. So pages that were told huge are split: the kernel does that when the
//! protection of a part of one is changed, here to what it is.
//!
//! Shared memory is always compared: an empty entry does not say whether the page was written through it.

use std::io;

use super::TrackError;
use super::process::{Changes, Process, is_gone};
use crate::maps;
use crate::pages::{PageRange, PageSet, page_size};
use crate::sys::softdirty::{self, HUGE_BYTES, PageMap};
use crate::sys::uffd::Mode;

/// Makes all processes that a tracker follows stand still for a moment.
pub trait Pause: Send + Sync {
    /// Calls `work` once while nobody runs. Not at all, if they could not be made to stand still within a few seconds;
    /// afterwards they run again, whatever happened.
    fn still(&self, work: &mut dyn FnMut()) -> io::Result<()>;
}

/// Of processes that stand still already.
pub(super) struct Never;

impl Pause for Never {
    fn still(&self, _: &mut dyn FnMut()) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Processes with this much address space are looked at for parts of it that are only reserved.
const SPARSE_FROM_BYTES: u64 = 16 << 30;
/// Address space of one process without memory that is read all the same, because there is some beside it: 0.3 s, for
/// which all stand still.
const MAX_UNUSED_BYTES: u64 = 256 << 30;

impl Process {
    /// Which of the mappings were registered before; all that can be are now. Of the others a mark says nothing.
    pub(super) fn register(&self, private: &[PageRange]) -> Vec<bool> {
        let Some(watched) = &self.watched else { return vec![false; private.len()] };
        let register = |range: &PageRange| {
            let known = watched.uffd.is_registered(first_page(*range));
            if !known && let Err(error) = watched.uffd.register(*range, Mode::WriteProtect) {
                tracing::debug!(pid = self.pid, %error, ?range, "a mapping is told whole each time");
            }
            known
        };
        private.iter().map(register).collect()
    }

    /// As [`Process::changes`], by the marks that pages have now. Nothing is taken: see [`Process::take_marks`].
    pub(super) fn marked(
        &mut self,
        private: &[PageRange],
        registered: &[bool],
        map: &mut PageMap,
    ) -> Result<Changes, TrackError> {
        let (mut pages, mut there) = (PageSet::default(), PageSet::default());
        let empty = self.empty(private)?;
        let holding = private.iter().zip(registered).filter(|(range, _)| !empty.contains(range.start));
        for (range, registered) in holding {
            map.look(&self.pagemap, *range, !registered, &mut there, &mut pages)
                .map_err(|source| TrackError::Process { pid: self.pid, source })?;
        }
        Ok(self.changed(pages, &there))
    }

    /// Mappings with nothing in them, where there is much address space without memory: the kernel writes down each page
    /// of it, 1.3 ms per GiB.
    fn empty(&self, private: &[PageRange]) -> Result<PageSet, TrackError> {
        let pid = self.pid;
        let bytes: u64 = private.iter().map(|r| r.bytes()).sum();
        if bytes < SPARSE_FROM_BYTES {
            return Ok(PageSet::default());
        }
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"));
        let sizes = maps::parse_sizes(&smaps.map_err(|source| TrackError::Process { pid, source })?);
        let held = |range: &PageRange| sizes.get(&range.start).map_or(range.bytes(), |kib| kib << 10);
        let (empty, holding): (Vec<PageRange>, Vec<_>) = private.iter().partition(|r| held(r) == 0);
        let unused: u64 = holding.iter().map(|r| r.bytes().saturating_sub(held(r))).sum();
        if unused > MAX_UNUSED_BYTES {
            return Err(TrackError::Sparse { pid, gib: unused >> 30 });
        }
        Ok(empty.into_iter().collect())
    }

    pub(super) fn take_marks(&self) -> Result<(), TrackError> {
        match softdirty::clear(self.pid) {
            Err(source) if !is_gone(&source) => Err(TrackError::Process { pid: self.pid, source }),
            _ => Ok(()),
        }
    }

    /// Splits the huge pages among those that were told.
    pub(super) fn split(&self, told: &PageSet) {
        let Some(watched) = &self.watched else { return };
        for range in told.ranges() {
            let start = range.start.next_multiple_of(HUGE_BYTES);
            let Some(huge) = PageRange::new(start, range.end - range.end % HUGE_BYTES) else { continue };
            for part in huge.steps(HUGE_BYTES) {
                // Of a whole huge page the kernel would change the protection without splitting it.
                watched.uffd.is_registered(first_page(part));
            }
        }
    }
}

fn first_page(range: PageRange) -> PageRange {
    PageRange { start: range.start, end: range.start + page_size() }
}
