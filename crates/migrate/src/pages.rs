//! Payloads that carry memory: whose it is, which round it is of, and pages.
//!
//! ```text
//! byte  0  what: 1 process, 2 shared object        8  device   8 bytes   (objects)
//!       1  the object is a SysV segment (0, 1)    16  inode    8 bytes   (objects)
//!       2  round, 2 bytes                         24  start    8 bytes   (pages: address, or offset in the object)
//!       4  process id, 4 bytes (processes)        32  the pages; or ranges: start and end, 8 bytes each
//! ```
//! All little-endian. Decoding refuses what is not whole pages; the store checks addresses.

use godwit_memory::{Key, ObjectId, PageRange, page_size};
use thiserror::Error;

/// Bytes before the content.
pub const HEAD_BYTES: usize = 32;
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
    /// Where the pages belong; 0 where ranges follow.
    pub start: u64,
}

impl Head {
    /// Begins a payload, with room for `content` bytes.
    pub fn begin(&self, content: usize) -> Vec<u8> {
        let mut payload = Vec::with_capacity(HEAD_BYTES + content);
        let (what, sysv, pid, device, inode) = match self.key {
            Key::Process(pid) => (PROCESS, false, pid, 0, 0),
            Key::Object(id) => (OBJECT, id.sysv, 0, id.device, id.inode),
        };
        payload.extend([what, u8::from(sysv)]);
        payload.extend(self.round.to_le_bytes());
        payload.extend(pid.to_le_bytes());
        payload.extend([device, inode, self.start].into_iter().flat_map(u64::to_le_bytes));
        payload
    }

    /// Head and content of a payload.
    pub fn split(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let Some((head, content)) = payload.split_first_chunk::<HEAD_BYTES>() else { return refuse("it is too short") };
        let [what, sysv, r0, r1, p0, p1, p2, p3, numbers @ ..] = *head;
        let [device, inode, start] = [0, 8, 16].map(|at| word(&numbers, at));
        let key = match (what, sysv) {
            (PROCESS, 0) => Key::Process(i32::from_le_bytes([p0, p1, p2, p3])),
            (OBJECT, 0 | 1) => Key::Object(ObjectId { device, inode, sysv: sysv == 1 }),
            _ => return refuse("it belongs to neither a process nor a shared object"),
        };
        Ok((Self { key, round: u16::from_le_bytes([r0, r1]), start }, content))
    }
}

/// A payload of ranges that hold nothing (any more).
pub fn ranges(key: Key, round: u16, ranges: &[PageRange]) -> Vec<u8> {
    let mut payload = Head { key, round, start: 0 }.begin(ranges.len() * 16);
    payload.extend(ranges.iter().flat_map(|r| [r.start, r.end]).flat_map(u64::to_le_bytes));
    payload
}

/// The ranges of such a payload's content.
pub fn split_ranges(content: &[u8]) -> Result<Vec<PageRange>, DecodeError> {
    let (pairs, rest) = content.as_chunks::<16>();
    if !rest.is_empty() {
        return refuse("half a range");
    }
    let range = |pair: &[u8; 16]| match PageRange::new(word(pair, 0), word(pair, 8)) {
        Some(range) => Ok(range),
        None => refuse("an empty range"),
    };
    pairs.iter().map(range).collect()
}

/// Whether content is whole pages.
pub fn whole(content: &[u8]) -> Result<&[u8], DecodeError> {
    let whole = !content.is_empty() && (content.len() as u64).is_multiple_of(page_size());
    if whole { Ok(content) } else { refuse("it is not whole pages") }
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
        let payload = ranges(Key::Object(id), 3, &[PageRange { start: 0x1000, end: 0x3000 }]);
        let golden = [
            &[2, 1, 3, 0, 0, 0, 0, 0, 0x17, 0, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0][..],
            &[0; 8],
            &[0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(payload, golden.concat());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(key in keys(), round: u16, list in prop::collection::vec((0u64..1 << 40, 1u64..1 << 30), 0..50)) {
            let list: Vec<PageRange> = list.into_iter().map(|(start, n)| PageRange { start, end: start + n }).collect();
            let payload = ranges(key, round, &list);
            let (head, content) = Head::split(&payload).unwrap();
            prop_assert_eq!((head.key, head.round), (key, round));
            prop_assert_eq!(split_ranges(content).unwrap(), list);
        }

        #[test]
        fn nonsense_is_refused_and_nothing_panics(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((_, content)) = Head::split(&payload) {
                let _ = split_ranges(content);
                let _ = whole(content);
            }
        }
    }
}
