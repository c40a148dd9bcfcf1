//! What has been sent of a file, block by block, so that a changed file costs what changed in it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use xxhash_rust::xxh3::xxh3_128;

/// The unit of comparison, in bytes: file systems' own, so that holes stay holes.
pub const BLOCK_BYTES: u64 = 4096;
/// Data is read and sent in pieces of this size, in bytes.
pub const PIECE_BYTES: usize = 1 << 20;
/// Below this a part is read without asking where its holes are, in bytes.
const SMALL_PART_BYTES: u64 = 256 << 10;
/// A block that is a hole or zero.
const EMPTY: u128 = 0;

/// Hashes of what the destination has of one version of one file.
#[derive(Debug, Default)]
pub struct Blocks {
    hashes: Vec<u128>,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Nobody has ended it.
    pub open: bool,
    pub sent_bytes: u64,
    pub read_bytes: u64,
}

impl Blocks {
    /// Sends what `file` has (up to `size` bytes) and the destination has not, by `data`, which ends it with `false`.
    /// Only `parts` are looked at, if there are any: whole blocks up
    /// to `size`, outside of which nothing has changed since the last time.
    pub fn send(
        &mut self,
        file: &File,
        size: u64,
        parts: Option<&[Range<u64>]>,
        data: &mut dyn FnMut(u64, Vec<u8>) -> bool,
    ) -> io::Result<Sent> {
        self.hashes.resize(size.div_ceil(BLOCK_BYTES) as usize, EMPTY);
        let mut pieces = Pieces { data, offset: 0, piece: Vec::new(), so_far: Sent { open: true, ..Sent::default() } };
        let mut buffer = vec![0; PIECE_BYTES];
        for part in parts.unwrap_or(std::slice::from_ref(&(0..size))) {
            if part.end - part.start < SMALL_PART_BYTES {
                self.read(file, part.clone(), &mut buffer, &mut pieces)?;
            } else {
                self.read_data(file, part.clone(), size, &mut buffer, &mut pieces)?;
            }
        }
        pieces.flush();
        Ok(pieces.so_far)
    }

    /// Looks at a part of the file, but not into its holes.
    fn read_data(
        &mut self,
        file: &File,
        part: Range<u64>,
        size: u64,
        buffer: &mut [u8],
        pieces: &mut Pieces<'_>,
    ) -> io::Result<()> {
        let mut at = part.start;
        while at < part.end && pieces.so_far.open {
            let start = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => (start - start % BLOCK_BYTES).min(part.end),
                Err(rustix::io::Errno::NXIO) => part.end,
                Err(e) => return Err(e.into()),
            };
            self.emptied(at, start, size, pieces);
            if start >= part.end {
                break;
            }
            let end = match seek(file, SeekFrom::Hole(start)) {
                Ok(end) => end.next_multiple_of(BLOCK_BYTES).min(part.end),
                // Cut meanwhile.
                Err(rustix::io::Errno::NXIO) => part.end,
                Err(e) => return Err(e.into()),
            };
            self.read(file, start..end, buffer, pieces)?;
            at = end;
        }
        Ok(())
    }

    /// Looks at a part of the file, holes included.
    fn read(&mut self, file: &File, part: Range<u64>, buffer: &mut [u8], pieces: &mut Pieces<'_>) -> io::Result<()> {
        let mut at = part.start;
        while at < part.end && pieces.so_far.open {
            let wanted = PIECE_BYTES.min((part.end - at) as usize);
            let n = read_full(file, &mut buffer[..wanted], at)?;
            pieces.so_far.read_bytes += n as u64;
            if n < wanted {
                // Cut meanwhile: the next round sees another size.
                buffer[n..wanted].fill(0);
            }
            for block in buffer[..wanted].chunks(BLOCK_BYTES as usize) {
                self.block(at, block, pieces);
                at += block.len() as u64;
            }
        }
        Ok(())
    }

    fn block(&mut self, at: u64, block: &[u8], pieces: &mut Pieces<'_>) {
        let hash = if block.iter().all(|b| *b == 0) { EMPTY } else { xxh3_128(block).max(1) };
        let known = &mut self.hashes[(at / BLOCK_BYTES) as usize];
        if *known != hash {
            *known = hash;
            pieces.add(at, block);
        }
    }

    /// Holes now, from `start` to `end`.
    fn emptied(&mut self, start: u64, end: u64, size: u64, pieces: &mut Pieces<'_>) {
        let zeroes = [0; BLOCK_BYTES as usize];
        for number in start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let at = number * BLOCK_BYTES;
            let known = &mut self.hashes[number as usize];
            if *known != EMPTY && at >= start {
                *known = EMPTY;
                pieces.add(at, &zeroes[..BLOCK_BYTES.min(size - at) as usize]);
            }
        }
    }
}

/// Puts blocks that follow each other into one piece.
struct Pieces<'a> {
    data: &'a mut dyn FnMut(u64, Vec<u8>) -> bool,
    offset: u64,
    piece: Vec<u8>,
    so_far: Sent,
}

impl Pieces<'_> {
    fn add(&mut self, at: u64, block: &[u8]) {
        if self.offset + self.piece.len() as u64 != at || self.piece.len() + block.len() > PIECE_BYTES {
            self.flush();
            self.offset = at;
        }
        self.piece.extend_from_slice(block);
    }

    fn flush(&mut self) {
        let piece = std::mem::take(&mut self.piece);
        if !piece.is_empty() && self.so_far.open {
            self.so_far.sent_bytes += piece.len() as u64;
            self.so_far.open = (self.data)(self.offset, piece);
        }
    }
}

fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file that is changed, and what a destination would have.
    fn check(changes: &[(u64, u8, usize, bool)]) {
        let file = tempfile::tempfile().unwrap();
        let (mut blocks, mut copy) = (Blocks::default(), Vec::new());
        for (at, byte, length, cut) in changes {
            if *cut {
                file.set_len(*at).unwrap();
            } else {
                file.write_all_at(&vec![*byte; *length], *at).unwrap();
            }
            let size = file.metadata().unwrap().len();
            let mut take = |at: u64, bytes: Vec<u8>| {
                copy.resize(copy.len().max(at as usize + bytes.len()), 0);
                copy[at as usize..][..bytes.len()].copy_from_slice(&bytes);
                true
            };
            assert!(blocks.send(&file, size, None, &mut take).unwrap().open);
            copy.resize(size as usize, 0);
            let mut now = vec![0; size as usize];
            file.read_exact_at(&mut now, 0).unwrap();
            assert!(now == copy, "after {changes:?}");
            // Nothing has changed since.
            assert_eq!(blocks.send(&file, size, None, &mut |_, _| panic!("sent again")).unwrap().sent_bytes, 0);
        }
    }

    #[test]
    fn a_changed_byte_costs_a_block_and_holes_cost_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(&[7; 3 << 20], 1 << 30).unwrap();
        let mut blocks = Blocks::default();
        // A terabyte of holes would cost books of its own.
        file.set_len(2 << 30).unwrap();
        let first = blocks.send(&file, 2 << 30, None, &mut |_, _| true).unwrap();
        assert_eq!((first.sent_bytes, first.read_bytes), (3 << 20, 3 << 20));
        file.write_all_at(b"x", (1 << 30) + 5000).unwrap();
        assert_eq!(blocks.send(&file, 2 << 30, None, &mut |_, _| true).unwrap().sent_bytes, BLOCK_BYTES);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_copy_is_always_the_same(
            changes in prop::collection::vec((0u64..3 << 20, 0u8..3, 1usize..100_000, prop::bool::weighted(0.2)), 1..8)
        ) {
            check(&changes);
        }
    }
}
