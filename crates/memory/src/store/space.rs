//! The pages of one process or object, in stretches.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::reserve::{Place, Reserve};
use super::{Key, PAGES, StoreError, lock, stretch_bytes};
use crate::pages::{PageRange, page_size};

/// Pages of a block of a stretch.
pub(super) const BLOCK: usize = 64;

/// The pages of one key.
pub(crate) struct Space {
    pub(super) stretches: RwLock<BTreeMap<u64, Arc<Mutex<Stretch>>>>,
    reserve: Arc<Reserve>,
}

pub(super) struct Stretch {
    pub(super) place: Place,
    /// One bit for each page, one word for each block.
    pub(super) present: [u64; PAGES / BLOCK],
    /// For each page the round that said something about it last, plus one; 0: none did.
    pub(super) rounds: Box<[u16; PAGES]>,
}

/// A run of pages in memory.
pub(crate) struct Run {
    pub range: PageRange,
    pub data: *const u8,
}

impl Space {
    pub(super) fn new(reserve: Arc<Reserve>) -> Self {
        Self { stretches: RwLock::default(), reserve }
    }

    fn stretch(&self, address: u64) -> io::Result<Arc<Mutex<Stretch>>> {
        let number = address / stretch_bytes();
        if let Some(stretch) = self.stretches.read().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return Ok(Arc::clone(stretch));
        }
        let mut stretches = self.stretches.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(stretch) = stretches.get(&number) {
            return Ok(Arc::clone(stretch));
        }
        let new = Stretch { place: self.reserve.take()?, present: [0; PAGES / BLOCK], rounds: Box::new([0; PAGES]) };
        Ok(Arc::clone(stretches.entry(number).or_insert(Arc::new(Mutex::new(new)))))
    }

    /// To be asked with a stretch locked: who hands over locks each of them afterwards.
    fn check_ours(&self, key: Key) -> Result<(), StoreError> {
        if self.reserve.is_handed_over() { Err(StoreError::HandedOver { key }) } else { Ok(()) }
    }

    fn failed(&self, key: Key, source: io::Error) -> StoreError {
        // The file does not grow any more either.
        self.check_ours(key).err().unwrap_or(StoreError::Memory { key, source })
    }

    /// Takes pages of one stretch; without content they are unknown.
    pub(super) fn take(&self, key: Key, part: PageRange, round: u16, content: Option<&[u8]>) -> Result<(), StoreError> {
        let failed = |source| self.failed(key, source);
        let stretch = self.stretch(part.start).map_err(failed)?;
        let mut stretch = lock(&stretch);
        self.check_ours(key)?;
        let pages = indices(part);
        let stretch = &mut *stretch;
        let all: Vec<_> = runs(pages.clone(), |n| stretch.rounds[n] <= round + 1).collect();
        for run in all {
            run.clone().for_each(|n| stretch.set(n, round, false));
            let Some(content) = content else { continue };
            let from = (run.start - pages.start) * page_size() as usize;
            let bytes = &content[from..from + run.len() * page_size() as usize];
            stretch.place.write(run.start, bytes).map_err(failed)?;
            run.for_each(|n| stretch.set(n, round, true));
        }
        Ok(())
    }

    /// Pages of one stretch are zero as of `round`.
    pub(super) fn forget(&self, key: Key, part: PageRange, round: u16) -> Result<(), StoreError> {
        let stretch = self.stretch(part.start).map_err(|source| self.failed(key, source))?;
        let mut stretch = lock(&stretch);
        self.check_ours(key)?;
        stretch.forget(indices(part), round);
        Ok(())
    }

    pub(crate) fn bytes(&self) -> u64 {
        let stretches = self.stretches.read().unwrap_or_else(PoisonError::into_inner);
        let pages: u64 =
            stretches.values().map(|s| lock(s).present.iter().map(|w| u64::from(w.count_ones())).sum::<u64>()).sum();
        pages * page_size()
    }

    /// Shows the first run of held pages in `within` to `with`, at most `limit` bytes of it; they stay where they are
    /// meanwhile. `None` if there is none.
    pub(crate) fn first_run<T>(&self, within: PageRange, limit: u64, with: impl FnOnce(Run) -> T) -> Option<T> {
        let first = within.start / stretch_bytes();
        let last = (within.end - 1) / stretch_bytes();
        // One stretch at a time, so that the map is not locked meanwhile.
        let mut number = first;
        loop {
            let (at, stretch) = {
                let stretches = self.stretches.read().unwrap_or_else(PoisonError::into_inner);
                let (at, stretch) = stretches.range(number..=last).next()?;
                (*at, Arc::clone(stretch))
            };
            let base = at * stretch_bytes();
            let part = within.overlap(PageRange { start: base, end: base.saturating_add(stretch_bytes()) });
            if let Some(part) = part {
                let stretch = lock(&stretch);
                let mut pages = indices(part);
                if let Some(start) = pages.find(|n| stretch.holds(*n)) {
                    let most = (limit / page_size()).max(1) as usize;
                    let end = 1 + start + pages.take(most - 1).take_while(|n| stretch.holds(*n)).count();
                    let range =
                        PageRange { start: base + start as u64 * page_size(), end: base + end as u64 * page_size() };
                    let data = stretch.place.page(start);
                    return Some(with(Run { range, data }));
                }
            }
            if at == last {
                return None;
            }
            number = at + 1;
        }
    }

    /// These pages are used up. Their memory is given back in blocks, once a block holds none.
    pub(crate) fn release(&self, range: PageRange) {
        for part in parts(range) {
            let found = {
                let stretches = self.stretches.read().unwrap_or_else(PoisonError::into_inner);
                stretches.get(&(part.start / stretch_bytes())).map(Arc::clone)
            };
            if let Some(found) = found {
                lock(&found).use_up(indices(part));
            }
        }
    }
}

impl Stretch {
    fn holds(&self, page: usize) -> bool {
        self.present[page / BLOCK] >> (page % BLOCK) & 1 == 1
    }

    fn set(&mut self, page: usize, round: u16, present: bool) {
        self.rounds[page] = round + 1;
        let bit = 1 << (page % BLOCK);
        if present {
            self.present[page / BLOCK] |= bit;
        } else {
            self.present[page / BLOCK] &= !bit;
        }
    }

    fn use_up(&mut self, pages: Range<usize>) {
        let blocks = pages.start / BLOCK..pages.end.div_ceil(BLOCK);
        let before = self.present;
        pages.for_each(|n| self.present[n / BLOCK] &= !(1 << (n % BLOCK)));
        let emptied = |block: usize| before[block] != 0 && self.present[block] == 0;
        for run in runs(blocks, emptied) {
            self.place.release(run.start * BLOCK, run.len() * BLOCK);
        }
    }

    /// What is known of these pages as of `round` is that they are zero. Memory is given back in runs: each takes a
    /// system call.
    fn forget(&mut self, pages: Range<usize>, round: u16) {
        for run in runs(pages.clone(), |n| self.rounds[n] <= round + 1 && self.holds(n)) {
            self.place.release(run.start, run.len());
        }
        for n in pages {
            if self.rounds[n] <= round + 1 {
                self.set(n, round, false);
            }
        }
    }
}

/// The runs in `all` of which `each` is true.
fn runs(all: Range<usize>, each: impl Fn(usize) -> bool) -> impl Iterator<Item = Range<usize>> {
    let mut at = all.start;
    std::iter::from_fn(move || {
        let start = (at..all.end).find(|n| each(*n))?;
        at = (start..all.end).find(|n| !each(*n)).unwrap_or(all.end);
        Some(start..at)
    })
}

/// The range in parts that lie in one stretch each.
pub(super) fn parts(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = (start / stretch_bytes() + 1) * stretch_bytes();
        let part = PageRange::new(start, range.end.min(end))?;
        start = part.end;
        Some(part)
    })
}

/// The numbers of a part's pages in their stretch.
fn indices(part: PageRange) -> Range<usize> {
    let first = (part.start % stretch_bytes() / page_size()) as usize;
    first..first + part.pages() as usize
}
