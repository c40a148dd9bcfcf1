//! Blocks of 4 KiB that are rewritten in place: each has a version, and content that follows from
//! seed, index and version. A block from the past is as wrong as a corrupted one.

use super::pattern;

pub(crate) const BLOCK_BYTES: usize = 4096;

#[derive(Debug)]
pub(crate) struct Blocks {
    seed: u64,
    versions: Vec<u32>,
}

impl Blocks {
    pub fn new(seed: u64, count: usize) -> Self {
        Self { seed, versions: vec![0; count] }
    }

    pub fn len(&self) -> usize {
        self.versions.len()
    }

    fn sequence(&self, index: usize) -> u64 {
        self.seed ^ pattern::mix(((index as u64) << 32) | u64::from(self.versions[index]))
    }

    /// The content that block `index` must have now.
    pub fn content(&self, index: usize) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        pattern::fill(self.sequence(index), 0, &mut bytes);
        bytes
    }

    /// Moves block `index` to its next version and returns the content to be written.
    pub fn next(&mut self, index: usize) -> [u8; BLOCK_BYTES] {
        self.versions[index] = self.versions[index].wrapping_add(1);
        self.content(index)
    }

    pub fn check(&self, what: &str, index: usize, found: &[u8]) -> Result<(), String> {
        match pattern::first_difference(self.sequence(index), 0, found) {
            None => Ok(()),
            Some(at) => Err(format!("{what}: block {index} is not version {} from byte {at} on", self.versions[index])),
        }
    }

    /// As [`content`](Self::content), as words in memory.
    pub fn fill_words(&self, index: usize, words: &mut [u64]) {
        let sequence = self.sequence(index);
        for (i, word) in words.iter_mut().enumerate() {
            *word = pattern::word(sequence, i as u64);
        }
    }

    pub fn next_words(&mut self, index: usize, words: &mut [u64]) {
        self.versions[index] = self.versions[index].wrapping_add(1);
        self.fill_words(index, words);
    }

    pub fn check_words(&self, what: &str, index: usize, words: &[u64]) -> Result<(), String> {
        let sequence = self.sequence(index);
        match words.iter().enumerate().position(|(i, word)| *word != pattern::word(sequence, i as u64)) {
            None => Ok(()),
            Some(at) => {
                Err(format!("{what}: page {index} is not version {} from byte {} on", self.versions[index], at * 8))
            }
        }
    }
}
