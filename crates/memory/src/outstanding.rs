//! Pages that are still to come, or to be sent, taken out one after the other.

use std::collections::BTreeMap;

use crate::pages::{PageRange, PageSet};

/// A set of pages out of which parts are taken; each operation costs the parts it touches, and the logarithm of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outstanding {
    /// Start and end of ranges that neither overlap nor touch.
    ranges: BTreeMap<u64, u64>,
}

impl From<&PageSet> for Outstanding {
    fn from(set: &PageSet) -> Self {
        Self { ranges: set.ranges().iter().map(|r| (r.start, r.end)).collect() }
    }
}

impl Outstanding {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    pub fn contains(&self, address: u64) -> bool {
        self.ranges.range(..=address).next_back().is_some_and(|(_, end)| address < *end)
    }

    /// The first part of `within` that is outstanding.
    pub fn first(&self, within: PageRange) -> Option<PageRange> {
        let before = self.ranges.range(..within.start).next_back();
        let all = before.into_iter().chain(self.ranges.range(within.start..within.end));
        all.map(|(start, end)| PageRange { start: *start, end: *end }).find_map(|range| range.overlap(within))
    }

    /// `range` is outstanding no more.
    pub fn remove(&mut self, range: PageRange) {
        while let Some(part) = self.first(range) {
            let Some((&start, &end)) = self.ranges.range(..=part.start).next_back() else { return };
            self.ranges.remove(&start);
            if start < part.start {
                self.ranges.insert(start, part.start);
            }
            if part.end < end {
                self.ranges.insert(part.end, end);
            }
        }
    }

    /// Takes the first pages of `within` out, at most `bytes` of them, a multiple of the page size.
    pub fn take(&mut self, within: PageRange, bytes: u64) -> PageSet {
        let mut taken = PageSet::default();
        let mut left = bytes;
        while let Some(part) = self.first(within).filter(|_| left > 0) {
            let part = PageRange { end: part.end.min(part.start + left), ..part };
            left -= part.bytes();
            self.remove(part);
            taken.push(part);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange { start, end }
    }

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        ranges.iter().map(|&(start, end)| range(start, end)).collect()
    }

    #[test]
    fn what_is_removed_is_gone_and_nothing_else() {
        // Every range out of every set of small numbers, against the definition.
        for bits in 0..64u64 {
            let all: PageSet = (0..6).filter(|i| bits >> i & 1 == 1).map(|i| range(i, i + 1)).collect();
            for (start, end) in (0..6).flat_map(|start| (start + 1..=6).map(move |end| (start, end))) {
                let mut left = Outstanding::from(&all);
                let first = all.intersection(&set(&[(start, end)])).ranges().first().copied();
                assert_eq!(left.first(range(start, end)), first);
                left.remove(range(start, end));
                assert_eq!(left, Outstanding::from(&all.difference(&set(&[(start, end)]))));
                (0..6).for_each(|n| assert_eq!(left.contains(n), all.contains(n) && !(start..end).contains(&n)));
            }
        }
    }

    #[test]
    fn pages_are_taken_in_order_and_once() {
        let all = set(&[(0, 3), (5, 9), (20, 21)]);
        let mut left = Outstanding::from(&all);
        assert_eq!(left.take(range(2, 100), 3), set(&[(2, 3), (5, 7)]));
        assert_eq!(left.take(range(0, 8), 100), set(&[(0, 2), (7, 8)]));
        assert_eq!((left.bytes(), left.is_empty()), (2, false));
        assert_eq!(left.take(range(0, 100), 100), set(&[(8, 9), (20, 21)]));
        assert!(left.is_empty() && left.take(range(0, 100), 100).is_empty());
    }
}
