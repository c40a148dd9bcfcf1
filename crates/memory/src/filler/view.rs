//! One address space that is being filled: what belongs where in it, and what is still to come.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::pages::{PageRange, page_size};
use crate::store::{Key, Space};

/// Pages that belong at some addresses: from there on, this part of the source.
#[derive(Clone)]
pub(super) struct Extent {
    pub end: u64,
    pub source: Source,
    /// Where the extent's first page is in the source.
    pub offset: u64,
}

#[derive(Clone)]
pub(super) struct Source {
    pub key: Key,
    pub space: Arc<Space>,
}

/// What is still to be filled, by address. As the process moves and gives back memory, so does this.
#[derive(Clone, Default)]
pub(super) struct Layout {
    extents: BTreeMap<u64, Extent>,
    /// Something is not at its source's own addresses any more.
    shifted: bool,
}

impl Layout {
    /// All of a source at its own addresses.
    pub(super) fn whole(source: Source) -> Self {
        let extent = Extent { end: 1 << 63, source, offset: 0 };
        Self { extents: BTreeMap::from([(0, extent)]), shifted: false }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The first extent from an address on; only those of `key`, if one is named.
    pub(super) fn first(&self, key: Option<Key>, from: u64) -> Option<(u64, Extent)> {
        let mut extents = self.extents.range(from..).filter(|(_, e)| key.is_none_or(|k| e.source.key == k));
        extents.next().map(|(start, extent)| (*start, extent.clone()))
    }

    /// What belongs at `address` and right after it.
    pub(super) fn at(&self, address: u64) -> Option<(u64, Extent)> {
        let (start, extent) = self.extents.range(..=address).next_back()?;
        (address < extent.end).then(|| {
            let offset = extent.offset + (address - start);
            (address, Extent { offset, ..extent.clone() })
        })
    }

    /// Another source from now on at `range`.
    pub(super) fn map(&mut self, range: PageRange, source: Source, offset: u64) {
        self.cut(range);
        self.extents.insert(range.start, Extent { end: range.end, source, offset });
    }

    /// Nothing belongs there any more (or it is there).
    pub(super) fn cut(&mut self, range: PageRange) {
        for (start, extent) in self.take(range) {
            if start < range.start {
                self.extents.insert(start, Extent { end: range.start, ..extent.clone() });
            }
            if range.end < extent.end {
                let offset = extent.offset + (range.end - start);
                self.extents.insert(range.end, Extent { offset, ..extent });
            }
        }
    }

    /// The process gave `range` back. Of shared memory only its view: the content stays.
    pub(super) fn cut_private(&mut self, range: PageRange) {
        let private: Vec<_> = self
            .take(range)
            .into_iter()
            .filter_map(|(start, extent)| {
                let part = PageRange::new(start.max(range.start), extent.end.min(range.end));
                let private = matches!(extent.source.key, Key::Process(_));
                self.extents.insert(start, extent);
                part.filter(|_| private)
            })
            .collect();
        private.into_iter().for_each(|part| self.cut(part));
    }

    /// The parts of a source that belong somewhere.
    pub(super) fn parts_of(&self, key: Key) -> impl Iterator<Item = PageRange> {
        self.extents
            .iter()
            .filter(move |(_, e)| e.source.key == key)
            .map(|(start, extent)| PageRange { start: extent.offset, end: extent.offset + (extent.end - start) })
    }

    /// Where a part of a source belongs, in pieces.
    pub(super) fn places(&self, key: Key, part: PageRange) -> Vec<(u64, Extent)> {
        let place = |(start, extent): (&u64, &Extent)| {
            let held = PageRange { start: extent.offset, end: extent.offset + (extent.end - start) };
            let common = held.overlap(part).filter(|_| extent.source.key == key)?;
            let at = start + (common.start - extent.offset);
            Some((at, Extent { end: at + common.bytes(), offset: common.start, source: extent.source.clone() }))
        };
        if self.shifted || matches!(key, Key::Object(_)) {
            return self.extents.iter().filter_map(place).collect();
        }
        let before = self.extents.range(..part.start).next_back();
        before.into_iter().chain(self.extents.range(part.start..part.end)).filter_map(place).collect()
    }

    /// All sources.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> {
        self.extents.values().map(|e| e.source.key)
    }

    /// What belonged at `from` belongs at `to` from now on.
    pub(super) fn shift(&mut self, from: PageRange, to: u64) {
        self.shifted = true;
        let mut moved = Vec::new();
        for (start, extent) in self.take(from) {
            let part = |range: PageRange| {
                let offset = extent.offset + (range.start - start);
                (range.start, Extent { end: range.end, offset, source: extent.source.clone() })
            };
            self.extents.extend(PageRange::new(start, extent.end.min(from.start)).map(part));
            self.extents.extend(PageRange::new(start.max(from.end), extent.end).map(part));
            moved.extend(PageRange::new(start.max(from.start), extent.end.min(from.end)).map(part));
        }
        // The place it goes to was unmapped before.
        self.cut(PageRange { start: to, end: to + from.bytes() });
        let place = |address: u64| address - from.start + to;
        self.extents.extend(
            moved.into_iter().map(|(start, extent)| (place(start), Extent { end: place(extent.end), ..extent })),
        );
    }

    /// Takes out every extent that overlaps `range`.
    fn take(&mut self, range: PageRange) -> Vec<(u64, Extent)> {
        let before = self.extents.range(..range.start).next_back().filter(|(_, e)| e.end > range.start);
        let starts: Vec<u64> = before
            .map(|(start, _)| *start)
            .into_iter()
            .chain(self.extents.range(range.start..range.end.max(range.start)).map(|(start, _)| *start))
            .collect();
        starts.into_iter().filter_map(|start| Some((start, self.extents.remove(&start)?))).collect()
    }
}

/// The page at an address.
pub(super) fn page_at(address: u64) -> PageRange {
    let start = address - address % page_size();
    PageRange { start, end: start + page_size() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::PageStore;

    fn layout() -> Layout {
        let store = PageStore::new().unwrap();
        Layout::whole(Source { key: Key::Process(1), space: store.space(Key::Process(1)) })
    }

    fn at(layout: &Layout, address: u64) -> Option<u64> {
        layout.at(address).map(|(_, extent)| extent.offset)
    }

    #[test]
    fn what_is_cut_and_moved_is_where_it_belongs() {
        let mut l = layout();
        l.cut(PageRange { start: 100, end: 200 });
        assert_eq!((at(&l, 99), at(&l, 100), at(&l, 199), at(&l, 200)), (Some(99), None, None, Some(200)));
        // A move with a hole in it, onto other memory.
        l.shift(PageRange { start: 50, end: 250 }, 1000);
        assert_eq!((at(&l, 49), at(&l, 50), at(&l, 249), at(&l, 250)), (Some(49), None, None, Some(250)));
        assert_eq!((at(&l, 1000), at(&l, 1049), at(&l, 1050), at(&l, 1149)), (Some(50), Some(99), None, None));
        assert_eq!((at(&l, 1150), at(&l, 1199), at(&l, 1200)), (Some(200), Some(249), Some(1200)));
        // And back.
        l.shift(PageRange { start: 1000, end: 1200 }, 50);
        assert_eq!((at(&l, 50), at(&l, 99), at(&l, 100), at(&l, 200)), (Some(50), Some(99), None, Some(200)));
        assert_eq!(at(&l, 1000), None);
    }

    #[test]
    fn everything_cut_is_nothing_left() {
        let mut l = layout();
        l.cut(PageRange { start: 10, end: 20 });
        l.cut(PageRange { start: 0, end: 1 << 63 });
        assert!(l.is_empty() && l.first(None, 0).is_none());
    }

    #[test]
    fn a_part_of_a_source_is_found_wherever_it_belongs() {
        let mut l = layout();
        let found = |l: &Layout, start, end| -> Vec<(u64, u64, u64)> {
            let places = l.places(Key::Process(1), PageRange { start, end });
            places.into_iter().map(|(at, extent)| (at, extent.end, extent.offset)).collect()
        };
        l.cut(PageRange { start: 100, end: 200 });
        assert_eq!(found(&l, 50, 250), [(50, 100, 50), (200, 250, 200)]);
        l.shift(PageRange { start: 220, end: 240 }, 1000);
        assert_eq!(found(&l, 210, 230), [(210, 220, 210), (1000, 1010, 220)]);
        assert!(l.places(Key::Process(2), PageRange { start: 0, end: 1000 }).is_empty());
    }
}
