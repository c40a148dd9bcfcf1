//! Payloads that carry memory: whose it is, which round it is of, and pages.
//!
//! ```text
//! byte  0  what: 1 process, 2 shared object        8  device   8 bytes   (objects)
//!       1  the object is a SysV segment (0, 1)    16  inode    8 bytes   (objects)
//!       2  round, 2 bytes                         24  ranges   8 bytes   how many
//!       4  process id, 4 bytes (processes)        32  ranges: start and end, 8 bytes each; then their pages, if any
//! ```
//! All little-endian. Decoding refuses what is not whole pages; the store checks addresses.

use godwit_memory::{Key, ObjectId, PageRange, page_size};
use thiserror::Error;

/// Bytes before the content.
pub const HEAD_BYTES: usize = 32;
/// Bytes of one range.
pub const RANGE_BYTES: usize = 16;
const PROCESS: u8 = 1;
const OBJECT: u8 = 2;

/// A payload of memory that makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("memory arrived in a form that cannot be read: {what}")]
pub struct DecodeError {
    what: &'static str,
}

fn refuse<T>(what: &'static str) -> Result<T, DecodeError> {
    Err(DecodeError { what })
}

/// What a payload is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub key: Key,
    pub round: u16,
}

impl Head {
    /// Begins a payload about `ranges` (addresses, or offsets in the object), with room for `content` bytes after them.
    pub fn begin(&self, ranges: &[PageRange], content: usize) -> Vec<u8> {
        let mut payload = Vec::with_capacity(HEAD_BYTES + ranges.len() * RANGE_BYTES + content);
        let (what, sysv, pid, device, inode) = match self.key {
            Key::Process(pid) => (PROCESS, false, pid, 0, 0),
            Key::Object(id) => (OBJECT, id.sysv, 0, id.device, id.inode),
        };
        payload.extend([what, u8::from(sysv)]);
        payload.extend(self.round.to_le_bytes());
        payload.extend(pid.to_le_bytes());
        payload.extend([device, inode, ranges.len() as u64].into_iter().flat_map(u64::to_le_bytes));
        payload.extend(ranges.iter().flat_map(|r| [r.start, r.end]).flat_map(u64::to_le_bytes));
        payload
    }

    /// Head, ranges and what follows them.
    pub fn split(payload: &[u8]) -> Result<(Self, Vec<PageRange>, &[u8]), DecodeError> {
        let Some((head, content)) = payload.split_first_chunk::<HEAD_BYTES>() else { return refuse("it is too short") };
        let [what, sysv, r0, r1, p0, p1, p2, p3, numbers @ ..] = *head;
        let [device, inode, count] = [0, 8, 16].map(|at| word(&numbers, at));
        let key = match (what, sysv) {
            (PROCESS, 0) => Key::Process(i32::from_le_bytes([p0, p1, p2, p3])),
            (OBJECT, 0 | 1) => Key::Object(ObjectId { device, inode, sysv: sysv == 1 }),
            _ => return refuse("it belongs to neither a process nor a shared object"),
        };
        let table = usize::try_from(count).ok().and_then(|n| n.checked_mul(RANGE_BYTES));
        let Some((table, content)) = table.and_then(|bytes| content.split_at_checked(bytes)) else {
            return refuse("it has fewer ranges than it says");
        };
        let (pairs, _) = table.as_chunks::<RANGE_BYTES>();
        let range = |pair: &[u8; RANGE_BYTES]| match PageRange::new(word(pair, 0), word(pair, 8)) {
            Some(range) => Ok(range),
            None => refuse("an empty range"),
        };
        let ranges = pairs.iter().map(range).collect::<Result<_, _>>()?;
        Ok((Self { key, round: u16::from_le_bytes([r0, r1]) }, ranges, content))
    }
}

/// Each range with its pages; exactly these are in `content`.
pub fn with_pages<'a>(ranges: &[PageRange], content: &'a [u8]) -> Result<Vec<(PageRange, &'a [u8])>, DecodeError> {
    let mut rest = content;
    let mut all = Vec::with_capacity(ranges.len());
    for range in ranges {
        let pages = usize::try_from(range.bytes()).ok().and_then(|bytes| rest.split_at_checked(bytes));
        let Some((pages, after)) = pages.filter(|_| range.bytes().is_multiple_of(page_size())) else {
            return refuse("its pages are not those of its ranges");
        };
        all.push((*range, pages));
        rest = after;
    }
    if rest.is_empty() { Ok(all) } else { refuse("it has more pages than ranges") }
}

/// The eight bytes at `at`, which the caller knows to be there.
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> impl Strategy<Value = Key> {
        let object = (any::<u64>(), any::<u64>(), any::<bool>());
        let object = object.prop_map(|(device, inode, sysv)| Key::Object(ObjectId { device, inode, sysv }));
        prop_oneof![any::<i32>().prop_map(Key::Process), object]
    }

    #[test]
    fn the_layout_is_fixed() {
        let id = ObjectId { device: 0x17, inode: 0x1234, sysv: true };
        let head = Head { key: Key::Object(id), round: 3 };
        let mut payload = head.begin(&[PageRange { start: 0x1000, end: 0x2000 }], 4096);
        payload.extend([0xaa; 4096]);
        let golden = [
            &[2, 1, 3, 0, 0, 0, 0, 0, 0x17, 0, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0][..],
            &[1, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0],
            &[0xaa; 4096],
        ];
        assert_eq!(payload, golden.concat());
        let (head, ranges, content) = Head::split(&payload).unwrap();
        assert_eq!(head.key, Key::Object(id));
        assert_eq!(with_pages(&ranges, content).unwrap(), [(PageRange { start: 0x1000, end: 0x2000 }, content)]);
        assert!(with_pages(&ranges, &content[1..]).is_err() && with_pages(&[], content).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(key in keys(), round: u16, list in prop::collection::vec((0u64..1 << 40, 1u64..1 << 30), 0..50)) {
            let list: Vec<PageRange> = list.into_iter().map(|(start, n)| PageRange { start, end: start + n }).collect();
            let payload = Head { key, round }.begin(&list, 0);
            let (head, ranges, content) = Head::split(&payload).unwrap();
            prop_assert_eq!((head.key, head.round, ranges, content), (key, round, list, &[][..]));
        }

        #[test]
        fn nonsense_is_refused_and_nothing_panics(mut payload in prop::collection::vec(any::<u8>(), 0..200), few: bool) {
            if few && payload.len() > 32 {
                payload[24..32].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
            }
            if let Ok((_, ranges, content)) = Head::split(&payload) {
                let _ = with_pages(&ranges, content);
            }
        }
    }
}
