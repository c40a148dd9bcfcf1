//! What the filler puts in: a page that somebody waits for, and the rest in steps.

use super::super::view::{Extent, page_at};
use super::{FillError, Result, STEP_BYTES, Server};
use crate::pages::{PageRange, page_size};
use crate::store::Key;
use crate::sys::uffd::Filled;

/// The same while threads wait for pages: a shorter wait for the next one.
const STEP_WHILE_FAULTING_BYTES: u64 = 128 << 10;
/// How long after a fault steps stay short, in milliseconds.
const FAULTING_MS: u128 = 20;
/// What is copied with a page that somebody waits for, in bytes: it and what follows.
const AROUND_FAULT_BYTES: u64 = 64 << 10;

impl Server {
    /// Gives a thread the page it waits for, and what follows it.
    pub(super) fn serve_fault(&mut self, key: u64, address: u64) -> Result<()> {
        let page = page_at(address);
        let Some(space) = self.spaces.iter_mut().find(|s| s.key == key) else { return Ok(()) };
        let found = space.layout.at(page.start);
        let mut most = AROUND_FAULT_BYTES;
        loop {
            let done = found.as_ref().and_then(|(start, extent)| {
                let end = extent.end.min(start + most);
                let within = PageRange { start: extent.offset, end: extent.offset + (end - start) };
                let copied = extent.source.space.first_run(within, most, |run| {
                    let here = run.range.start == extent.offset;
                    here.then(|| {
                        // SAFETY: the run stays readable while this closure runs.
                        unsafe { space.uffd.copy(page.start, run.data, run.range.bytes()) }.map(|f| (f, run.range))
                    })
                });
                copied.flatten()
            });
            let known = done.is_some();
            let (filled, run) = match done {
                Some(result) => result.map_err(|source| FillError::Kernel { doing: "put in a page", source })?,
                None => {
                    let run = zeroes(page, found.as_ref(), most);
                    let zero = space.uffd.zero(run);
                    (zero.map_err(|source| FillError::Kernel { doing: "put in zeroes", source })?, run)
                }
            };
            let bytes = match filled {
                Filled::All => run.bytes(),
                Filled::Partly { bytes } if bytes > 0 => bytes,
                Filled::Partly { .. } => {
                    self.deferred.push_back((key, address));
                    return Ok(());
                }
                Filled::Unmapped if run.bytes() > page_size() => {
                    most = page_size();
                    continue;
                }
                // It is there, or nobody can wait for it any more. Who waits looks again.
                Filled::Present | Filled::Unmapped => {
                    let _ = space.uffd.wake(page);
                    return Ok(());
                }
                Filled::Gone => {
                    self.drop_space(key);
                    return Ok(());
                }
            };
            space.layout.cut(PageRange { start: page.start, end: page.start + bytes });
            let Some((_, extent)) = found.filter(|_| known) else {
                self.report.zero_faults += 1;
                return Ok(());
            };
            if !self.kept.contains(&extent.source.key) {
                extent.source.space.release(PageRange { start: extent.offset, end: extent.offset + bytes });
            }
            self.report.filled_bytes += bytes;
            return Ok(());
        }
    }

    /// One step of filling; only from one source, if one is named. False when there is nothing to fill.
    pub(super) fn fill_a_step(&mut self, only: Option<Key>) -> Result<bool> {
        let next = self.spaces.iter().position(|s| s.layout.first(only).is_some());
        let Some(at) = next else { return Ok(false) };
        let faulting = self.last_fault.is_some_and(|t| t.elapsed().as_millis() < FAULTING_MS);
        let space = &mut self.spaces[at];
        let limit = if faulting { space.step.min(STEP_WHILE_FAULTING_BYTES) } else { space.step };
        let Some((start, extent)) = space.layout.first(only) else { return Ok(false) };
        let within = PageRange { start: extent.offset, end: extent.offset + (extent.end - start) };
        let copied = extent.source.space.first_run(within, limit, |run| {
            let to = start + (run.range.start - extent.offset);
            // SAFETY: the run stays readable while this closure runs.
            (unsafe { space.uffd.copy(to, run.data, run.range.bytes()) }, run.range, to)
        });
        let Some((result, run, to)) = copied else {
            space.layout.cut(PageRange { start, end: extent.end });
            return Ok(true);
        };
        let filled = result.map_err(|source| FillError::Kernel { doing: "put in pages", source })?;
        // Bytes that are dealt with.
        let done = match filled {
            Filled::All => {
                self.report.filled_bytes += run.bytes();
                space.step = (space.step * 2).min(STEP_BYTES);
                run.bytes()
            }
            Filled::Partly { bytes } => {
                self.report.filled_bytes += bytes;
                bytes
            }
            Filled::Present => page_size(),
            // Perhaps only a part of it.
            Filled::Unmapped if run.bytes() > page_size() => {
                space.step = (run.bytes() / 2).next_multiple_of(page_size());
                0
            }
            Filled::Unmapped => {
                self.report.unplaced_pages += 1;
                page_size()
            }
            Filled::Gone => {
                let key = space.key;
                self.drop_space(key);
                return Ok(true);
            }
        };
        if !self.kept.contains(&extent.source.key) && done > 0 {
            extent.source.space.release(PageRange { start: run.start, end: run.start + done });
        }
        // Before it there is nothing in this extent.
        if let Some(behind) = PageRange::new(start, to + done) {
            space.layout.cut(behind);
        }
        Ok(true)
    }

    pub(super) fn drop_space(&mut self, key: u64) {
        self.deferred.retain(|(of, _)| *of != key);
        self.spaces.retain(|s| s.key != key);
    }
}

/// The page, and what follows it that the store does not know either. Of shared memory the page alone: there, zeroes
/// are pages of their own.
fn zeroes(page: PageRange, found: Option<&(u64, Extent)>, most: u64) -> PageRange {
    let Some((_, extent)) = found.filter(|(_, e)| matches!(e.source.key, Key::Process(_))) else { return page };
    let end = extent.end.min(page.start + most);
    let within = PageRange { start: extent.offset, end: extent.offset + (end - page.start) };
    let known = extent.source.space.first_run(within, page_size(), |run| run.range.start - extent.offset);
    PageRange { start: page.start, end: known.map_or(end, |known| page.start + known).max(page.end) }
}
