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
use std::time::{Duration, Instant};

use super::TrackError;
use super::process::{Changes, Process, is_gone};
use crate::pages::{PageRange, PageSet, page_size};
use crate::sys::softdirty::{self, HUGE_BYTES, PageMap};
use crate::sys::uffd::Mode;

/// Makes all processes that a tracker follows stand still for a moment. Both wait until it is done, and no longer than
/// a few seconds.
pub trait Pause: Send + Sync {
    /// Nobody runs when this returns. After an error they go on running.
    fn pause(&self) -> io::Result<()>;
    fn resume(&self) -> io::Result<()>;
}

/// They go on when this is dropped.
pub(super) struct Paused<'a> {
    pause: Option<&'a dyn Pause>,
    since: Instant,
}

impl<'a> Paused<'a> {
    pub(super) fn new(pause: &'a dyn Pause) -> Result<Self, TrackError> {
        let since = Instant::now();
        pause.pause().map_err(TrackError::Pause)?;
        Ok(Self { pause: Some(pause), since })
    }

    /// For how long they stood still.
    pub(super) fn resume(mut self) -> Result<Duration, TrackError> {
        self.pause.take().map_or(Ok(()), Pause::resume).map_err(TrackError::Pause)?;
        Ok(self.since.elapsed())
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.pause.take().map(Pause::resume) {
            tracing::error!(%error, "processes that stood still for a look at their memory do not go on");
        }
    }
}

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
        for (range, registered) in private.iter().zip(registered) {
            map.look(&self.pagemap, *range, !registered, &mut there, &mut pages)
                .map_err(|source| TrackError::Process { pid: self.pid, source })?;
        }
        Ok(self.changed(pages, &there))
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
