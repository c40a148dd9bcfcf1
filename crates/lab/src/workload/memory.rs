//! Memory that is rewritten and verified all the time.

use super::blocks::{BLOCK_BYTES, Blocks};
use super::health::{Health, count};
use super::pattern::mix;
use super::streams::Pace;

const WORDS_PER_PAGE: usize = BLOCK_BYTES / 8;
const TICKS_PER_SECOND: u64 = 100;
const TICK_US: u32 = 10_000;
/// One page in this many is never written: it must stay zero, and costs nothing until it is sent.
const ZERO_SHARE: usize = 16;

pub(crate) struct Memory {
    words: Vec<u64>,
    /// The pages that are written; those behind them stay zero.
    pages: Blocks,
    zero_pages: usize,
}

impl Memory {
    pub fn new(seed: u64, mebibytes: u32) -> Self {
        let all = (mebibytes as usize) << 20 >> 12;
        let zero_pages = all / ZERO_SHARE;
        let pages = Blocks::new(seed, all - zero_pages);
        let mut words = vec![0_u64; all * WORDS_PER_PAGE];
        for (index, page) in words.chunks_exact_mut(WORDS_PER_PAGE).take(pages.len()).enumerate() {
            pages.fill_words(index, page);
        }
        Self { words, pages, zero_pages }
    }

    #[cfg(test)]
    fn page(&mut self, index: usize) -> &mut [u64] {
        &mut self.words[index * WORDS_PER_PAGE..(index + 1) * WORDS_PER_PAGE]
    }

    fn check(&self, index: usize) -> Result<(), String> {
        let page = &self.words[index * WORDS_PER_PAGE..(index + 1) * WORDS_PER_PAGE];
        if index < self.pages.len() {
            self.pages.check_words("memory", index, page)
        } else if page.iter().all(|&w| w == 0) {
            Ok(())
        } else {
            Err(format!("memory: page {index} was never written and is not zero"))
        }
    }

    fn rewrite(&mut self, index: usize) {
        let range = index * WORDS_PER_PAGE..(index + 1) * WORDS_PER_PAGE;
        self.pages.next_words(index, &mut self.words[range]);
    }

    /// Rewrites `dirty_pages_per_second` pages picked at random, each verified before, and goes
    /// through all pages at `check_mib_per_second`, for ever.
    pub fn run(mut self, health: &Health, dirty_pages_per_second: u32, check_mib_per_second: u32) {
        let all = self.pages.len() + self.zero_pages;
        if all == 0 {
            return;
        }
        let per_tick = |per_second: u64| per_second.div_ceil(TICKS_PER_SECOND) as usize;
        let rewrites = if self.pages.len() == 0 { 0 } else { per_tick(dirty_pages_per_second.into()) };
        let checks = per_tick((u64::from(check_mib_per_second) << 20) >> 12);
        let mut pace = Pace::new(TICK_US);
        let mut random = 1;
        let mut next = 0;
        loop {
            for _ in 0..rewrites {
                random = mix(random);
                let index = (random % self.pages.len() as u64) as usize;
                if let Err(what) = self.check(index) {
                    return health.violate(what);
                }
                self.rewrite(index);
            }
            count(&health.memory_pages_written, rewrites as u64);
            for _ in 0..checks {
                if let Err(what) = self.check(next) {
                    return health.violate(what);
                }
                next += 1;
                if next == all {
                    next = 0;
                    count(&health.memory_passes, 1);
                }
            }
            pace.wait();
        }
    }

    /// Damages one page, to see that it is found out.
    #[cfg(test)]
    fn flip(&mut self, index: usize) {
        self.page(index)[100] ^= 1 << 17;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn damage_old_pages_and_written_zero_pages_are_found() {
        let mut memory = Memory::new(3, 1);
        let all = 256;
        assert!((0..all).all(|i| memory.check(i).is_ok()));
        let old = memory.page(5).to_vec();
        memory.rewrite(5);
        assert!(memory.check(5).is_ok());
        memory.page(5).copy_from_slice(&old);
        assert!(memory.check(5).is_err(), "a page of an earlier version");
        memory.flip(6);
        memory.flip(all - 1);
        assert!(memory.check(6).is_err() && memory.check(all - 1).is_err());
        let health = Health::new(0);
        memory.run(&health, 0, 1000);
        assert!(!health.status().ok, "the endless run ends at the first violation");
    }
}
