//! Page ranges and sets of them.

use std::sync::OnceLock;

/// Bytes of one page of this machine (getconf PAGESIZE).
pub fn page_size() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| rustix::param::page_size() as u64)
}

/// Bytes from `start` up to, not including, `end`: addresses of a process, or offsets in a shared object. Both are
/// multiples of the page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    pub start: u64,
    pub end: u64,
}

impl PageRange {
    /// The range, or `None` if it is empty.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    pub fn bytes(self) -> u64 {
        self.end - self.start
    }

    pub fn pages(self) -> u64 {
        self.bytes() / page_size()
    }

    /// The range in parts of at most `bytes`, a multiple of the page size.
    pub(crate) fn steps(self, bytes: u64) -> impl Iterator<Item = Self> {
        let starts = (self.start..self.end).step_by(bytes as usize);
        starts.map(move |start| Self { start, end: self.end.min(start.saturating_add(bytes)) })
    }

    pub(crate) fn overlap(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
}

/// A set of pages as sorted ranges that neither overlap nor touch. Union, difference and intersection take time
/// linear in the number of ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    ranges: Vec<PageRange>,
}

impl PageSet {
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.bytes()).sum()
    }

    pub fn pages(&self) -> u64 {
        self.bytes() / page_size()
    }

    pub fn contains(&self, address: u64) -> bool {
        let at = self.ranges.partition_point(|r| r.end <= address);
        self.ranges.get(at).is_some_and(|r| r.start <= address)
    }

    /// Adds a range that starts at or after everything in the set: how sets are built from sorted input.
    pub(crate) fn push(&mut self, range: PageRange) {
        debug_assert!(self.ranges.last().is_none_or(|last| last.start <= range.start), "{range:?} comes too late");
        match self.ranges.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => self.ranges.push(range),
        }
    }

    pub fn union(&self, other: &PageSet) -> PageSet {
        if other.is_empty() {
            return self.clone();
        }
        let mut all: Vec<_> = self.ranges.iter().chain(&other.ranges).copied().collect();
        // Two sorted runs: the stable sort merges them in linear time.
        all.sort();
        let mut set = PageSet::default();
        all.into_iter().for_each(|r| set.push(r));
        set
    }

    pub fn intersection(&self, other: &PageSet) -> PageSet {
        let mut set = PageSet::default();
        let (mut a, mut b) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            if let Some(common) = x.overlap(**y) {
                set.push(common);
            }
            if x.end <= y.end {
                a.next()
            } else {
                b.next()
            };
        }
        set
    }

    pub fn difference(&self, other: &PageSet) -> PageSet {
        let mut set = PageSet::default();
        let mut at = 0;
        for range in &self.ranges {
            while other.ranges.get(at).is_some_and(|o| o.end <= range.start) {
                at += 1;
            }
            let (mut start, mut hole) = (range.start, at);
            while let Some(o) = other.ranges.get(hole).filter(|o| o.start < range.end) {
                if let Some(left) = PageRange::new(start, o.start) {
                    set.push(left);
                }
                start = start.max(o.end);
                hole += 1;
            }
            if let Some(left) = PageRange::new(start, range.end) {
                set.push(left);
            }
        }
        set
    }
}

impl FromIterator<PageRange> for PageSet {
    /// From ranges in any order, which may overlap.
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut all: Vec<_> = ranges.into_iter().collect();
        all.sort();
        let mut set = PageSet::default();
        all.into_iter().for_each(|r| set.push(r));
        set
    }
}

/// Whether a page reads as zeroes only.
pub fn is_zero(page: &[u8]) -> bool {
    // Most pages differ within the first words; the rest is compared in blocks the compiler turns into vectors.
    let (blocks, rest) = page.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        ranges.iter().map(|&(start, end)| PageRange { start, end }).collect()
    }

    #[test]
    fn sets_are_normal_whatever_the_order() {
        assert_eq!(set(&[(8, 9), (1, 3), (2, 5), (5, 6)]), set(&[(1, 6), (8, 9)]));
    }

    #[test]
    fn difference_intersection_union_agree_page_by_page() {
        // Every pair out of some sets of small numbers, against the definition.
        let sets: Vec<_> = (0..64u64)
            .map(|bits| (0..6).filter(|i| bits >> i & 1 == 1).map(|i| PageRange { start: i, end: i + 1 }).collect())
            .collect::<Vec<PageSet>>();
        for a in &sets {
            for b in &sets {
                for page in 0..6 {
                    let (x, y) = (a.contains(page), b.contains(page));
                    assert_eq!(a.union(b).contains(page), x || y);
                    assert_eq!(a.intersection(b).contains(page), x && y);
                    assert_eq!(a.difference(b).contains(page), x && !y);
                }
            }
        }
    }

    #[test]
    fn zero_is_told_from_nearly_zero() {
        let mut page = vec![0u8; 4096];
        assert!(is_zero(&page));
        for at in [0, 63, 64, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page));
            page[at] = 0;
        }
    }
}
