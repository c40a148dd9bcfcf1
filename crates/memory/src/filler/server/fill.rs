//! What the filler puts in: a page that somebody waits for, and the rest in steps.

use super::super::view::{Extent, page_at};
use super::late::Waiting;
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

/// What became of one run.
enum Copied {
    /// There was none.
    Nothing,
    /// This much from this address on is dealt with.
    Some { to: u64, bytes: u64 },
    /// The address space is gone, and not among ours any more.
    Gone,
}

impl Server {
    /// Gives a thread the page it waits for, and what follows it.
    pub(super) fn serve_fault(&mut self, key: u64, address: u64) -> Result<()> {
        let page = page_at(address);
        let Some(space) = self.spaces.iter_mut().find(|s| s.key == key) else { return Ok(()) };
        let found = space.layout.at(page.start);
        if let (Some(late), Some((_, extent))) = (&self.late, &found)
            && late.awaits(key, page.start, extent)
        {
            return Ok(());
        }
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
                    let run = zeroes(page, found.as_ref(), most, self.late.as_ref());
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
        let late = self.late.is_some();
        // What comes late is put in as it comes; of the rest there is one pass.
        let next = self.spaces.iter().enumerate().find_map(|(at, s)| Some((at, s.next(late, only)?)));
        let Some((at, (start, extent))) = next else { return Ok(false) };
        let copied = self.copy_run(at, start, &extent)?;
        let Some(space) = self.spaces.get_mut(at) else { return Ok(true) };
        match copied {
            Copied::Nothing if late => space.cursor = extent.end,
            Copied::Nothing => space.layout.cut(PageRange { start, end: extent.end }),
            Copied::Some { to, bytes } => {
                // Before it there is nothing in this extent, or nothing yet.
                let dealt_with = PageRange::new(if late { to } else { start }, to + bytes);
                dealt_with.into_iter().for_each(|range| space.layout.cut(range));
                space.cursor = to + bytes;
            }
            Copied::Gone => {}
        }
        Ok(true)
    }

    /// Puts in what has come late; `false` if some of it has to be tried again.
    pub(super) fn put_in(&mut self, key: Key, part: PageRange) -> Result<bool> {
        let mut at = 0;
        while let Some(space) = self.spaces.get(at) {
            let of = space.key;
            'places: for (mut start, mut extent) in space.layout.places(key, part) {
                loop {
                    match self.copy_run(at, start, &extent)? {
                        Copied::Nothing => break,
                        Copied::Gone => break 'places,
                        Copied::Some { bytes: 0, .. } => return Ok(false),
                        Copied::Some { to, bytes } => {
                            self.spaces[at].layout.cut(PageRange { start: to, end: to + bytes });
                            extent.offset += to + bytes - start;
                            start = to + bytes;
                        }
                    }
                }
            }
            if self.spaces.get(at).is_some_and(|s| s.key == of) {
                at += 1;
            }
        }
        if !self.kept.contains(&key) {
            // What belongs nowhere any more.
            self.store.space(key).release(part);
        }
        Ok(true)
    }

    /// Copies the first run of what belongs at `start`, up to the extent's end, into the address space numbered `at`.
    fn copy_run(&mut self, at: usize, start: u64, extent: &Extent) -> Result<Copied> {
        let faulting = self.last_fault.is_some_and(|t| t.elapsed().as_millis() < FAULTING_MS);
        let space = &mut self.spaces[at];
        let limit = if faulting { space.step.min(STEP_WHILE_FAULTING_BYTES) } else { space.step };
        let Some(within) = PageRange::new(extent.offset, extent.offset + (extent.end - start)) else {
            return Ok(Copied::Nothing);
        };
        let copied = extent.source.space.first_run(within, limit, |run| {
            let to = start + (run.range.start - extent.offset);
            // SAFETY: the run stays readable while this closure runs.
            (unsafe { space.uffd.copy(to, run.data, run.range.bytes()) }, run.range, to)
        });
        let Some((result, run, to)) = copied else { return Ok(Copied::Nothing) };
        let filled = result.map_err(|source| FillError::Kernel { doing: "put in pages", source })?;
        // Bytes that are dealt with.
        let bytes = match filled {
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
                return Ok(Copied::Gone);
            }
        };
        if !self.kept.contains(&extent.source.key) && bytes > 0 {
            extent.source.space.release(PageRange { start: run.start, end: run.start + bytes });
        }
        Ok(Copied::Some { to, bytes })
    }

    pub(super) fn drop_space(&mut self, key: u64) {
        self.deferred.retain(|(of, _)| *of != key);
        self.spaces.retain(|s| s.key != key);
    }
}

/// The page, and what follows it that the store does not know either. Of shared memory the page alone: there, zeroes
/// are pages of their own.
fn zeroes(page: PageRange, found: Option<&(u64, Extent)>, most: u64, late: Option<&Waiting>) -> PageRange {
    let Some((_, extent)) = found.filter(|(_, e)| matches!(e.source.key, Key::Process(_))) else { return page };
    let end = extent.end.min(page.start + most);
    let within = PageRange { start: extent.offset, end: extent.offset + (end - page.start) };
    // First: what is not awaited any more after this is in the store by then.
    let awaited = late.and_then(|late| late.first(extent.source.key, within)).map(|part| part.start - extent.offset);
    let end = awaited.map_or(end, |awaited| page.start + awaited);
    let Some(within) = PageRange::new(extent.offset, extent.offset + (end - page.start)) else { return page };
    let known = extent.source.space.first_run(within, page_size(), |run| run.range.start - extent.offset);
    PageRange { start: page.start, end: known.map_or(end, |known| page.start + known).max(page.end) }
}
