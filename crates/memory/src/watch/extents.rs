//! Where a file is on the disk, and what two looks at that differ in.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::sys::file;

/// A file in more pieces than this is not followed.
const MAX_EXTENTS: usize = 64 << 10;

/// All of a file's extents, in order. Whatever changes a file's content without writing to its pages (holes punched, ends
/// cut off, blocks shared from elsewhere, ranges shifted or zeroed by the file system) changes where they are, or how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extents(Vec<Extent>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    logical: u64,
    length: u64,
    physical: u64,
    flags: u32,
}

/// FIEMAP_EXTENT_MERGED says nothing about the content. _SHARED does: a block that was freed, used by another file and
/// shared with this one is where it was.
const OF_NO_MATTER: u32 = file::LAST | 0x1000;
const NOT_TOLD: u32 = file::UNKNOWN | file::DELAYED;

impl Extents {
    /// As the file is on the disk now; what is only in memory so far is told as such.
    pub fn of(of: &File) -> io::Result<Self> {
        let mut all = Vec::new();
        let mut start = 0;
        // Each turn begins behind the extents of the one before.
        while all.len() <= MAX_EXTENTS {
            let some = file::extents(of, start)?;
            let Some(last) = some.last().copied() else { return Ok(Self(all)) };
            all.extend(some.iter().map(|e| Extent {
                logical: e.logical,
                length: e.length,
                physical: e.physical,
                flags: e.flags & !OF_NO_MATTER,
            }));
            let next = last.logical.saturating_add(last.length);
            if last.flags & file::LAST != 0 || next <= start {
                return Ok(Self(all));
            }
            start = next;
        }
        Err(io::Error::other(format!("it is in more than {MAX_EXTENTS} pieces")))
    }

    /// Bytes of the file that are elsewhere now than in `before`, or of which one of them does not know.
    pub fn differing(&self, before: &Self) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let (mut ours, mut theirs) = (&self.0[..], &before.0[..]);
        let mut at = 0;
        loop {
            // Extents that end before here have been compared.
            let beyond = |all: &mut &[Extent]| {
                while all.first().is_some_and(|e| e.logical.saturating_add(e.length) <= at) {
                    *all = &all[1..];
                }
            };
            beyond(&mut ours);
            beyond(&mut theirs);
            let (one, other) = (ours.first(), theirs.first());
            // Up to here neither begins nor ends.
            let edges =
                [one, other].into_iter().flatten().flat_map(|e| [e.logical, e.logical.saturating_add(e.length)]);
            let Some(end) = edges.filter(|edge| *edge > at).min() else { return found };
            let place = |e: Option<&Extent>| {
                e.filter(|e| e.logical <= at).map(|e| (e.physical.wrapping_add(at - e.logical), e.flags))
            };
            let (one, other) = (place(one), place(other));
            let unknown = [one, other].into_iter().flatten().any(|(_, flags)| flags & NOT_TOLD != 0);
            if one != other || unknown {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => found.push(at..end),
                }
            }
            at = end;
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a range is what is meant")]
mod tests {
    use super::*;

    fn extents(of: &[(u64, u64, u64, u32)]) -> Extents {
        let extent = |(logical, length, physical, flags): &(u64, u64, u64, u32)| Extent {
            logical: *logical,
            length: *length,
            physical: *physical,
            flags: *flags,
        };
        Extents(of.iter().map(extent).collect())
    }

    #[test]
    fn what_is_elsewhere_or_otherwise_differs() {
        let before = extents(&[(0, 10, 100, 0), (10, 10, 110, 0), (40, 10, 500, 0)]);
        let check = |now: &[(u64, u64, u64, u32)], wanted: &[Range<u64>]| {
            assert_eq!(extents(now).differing(&before), wanted, "{now:?}");
            assert_eq!(before.differing(&extents(now)), wanted, "{now:?} the other way");
        };
        // The same in other pieces.
        check(&[(0, 5, 100, 0), (5, 15, 105, 0), (40, 10, 500, 0)], &[]);
        // Cut, grown, punched, unwritten, shifted, not there yet.
        check(&[(0, 8, 100, 0)], &[8..20, 40..50]);
        check(&[(0, 20, 100, 0), (40, 12, 500, 0)], &[50..52]);
        check(&[(0, 4, 100, 0), (6, 14, 106, 0), (40, 10, 500, 0)], &[4..6]);
        check(&[(0, 10, 100, 0), (10, 10, 110, 0x800), (40, 10, 500, 0)], &[10..20]);
        check(&[(0, 20, 100, 0), (41, 10, 500, 0)], &[40..51]);
        check(&[(0, 20, 100, 0), (25, 5, 0, file::DELAYED), (40, 10, 500, 0)], &[25..30]);
        check(&[], &[0..20, 40..50]);
    }

    #[test]
    fn what_nobody_told_differs_from_itself() {
        let unknown = extents(&[(0, 8, 0, file::UNKNOWN), (8, 8, 64, 0)]);
        assert_eq!(unknown.differing(&unknown), [0..8]);
    }
}
