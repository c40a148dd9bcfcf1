//! Memory, compressed on its way where that is faster.
//!
//! ```text
//! byte 0  bytes of the payload of `Memory`, 4 bytes, little-endian      4  a Zstandard frame of it, with its checksum
//! ```
//! Compressing pays where the link is the bottleneck. Both are measured while they happen: how fast the link takes plain
//! pages, and how fast, and how far, pages like these are compressed. Reading and compressing is one thread, sending
//! another, so what counts is the slower of the two.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use godwit_model::migration::Compression;
use thiserror::Error;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::wire::{Kind, MAX_PAYLOAD_BYTES};

/// Fast enough for 1 Gbit/s on one core, and half the size for most memory.
const LEVEL: i32 = 1;
const HEAD_BYTES: usize = 4;
/// Smaller payloads are not worth it, in bytes.
const MIN_BYTES: usize = 8 << 10;
/// How much faster it must be, by estimate: cores that compress are taken from the container.
const WORTH: f64 = 1.3;
/// Payloads sent plain before it is tried again.
const TRY_EVERY: u32 = 64;
/// The weight of the newest measurement in an average.
const NEWEST: f64 = 0.3;

/// A compressed payload that makes no sense.
#[derive(Debug, Error)]
pub enum UnpackError {
    #[error("compressed memory of {bytes} bytes is longer than allowed ({MAX_PAYLOAD_BYTES})")]
    TooLong { bytes: usize },
    #[error("compressed memory is shorter than it says")]
    TooShort,
    #[error("compressed memory cannot be read")]
    Damaged(#[source] std::io::Error),
}

/// How fast the link takes what it is given; written by who sends, read by who compresses.
#[derive(Debug, Default)]
pub struct LinkMeter {
    /// Bytes per second as bits of an f64; 0: not known.
    rate: AtomicU64,
}

impl LinkMeter {
    /// This much was sent in this time, while more was waiting.
    pub fn sent(&self, bytes: usize, took: Duration) {
        let now = bytes as f64 / took.as_secs_f64().max(1e-6);
        let rate = self.bytes_per_second().map_or(now, |old| average(old, now));
        self.rate.store(rate.to_bits(), Ordering::Relaxed);
    }

    fn bytes_per_second(&self) -> Option<f64> {
        Some(f64::from_bits(self.rate.load(Ordering::Relaxed))).filter(|rate| *rate > 0.0)
    }
}

fn average(old: f64, newest: f64) -> f64 {
    old + (newest - old) * NEWEST
}

/// Pages compressed so far.
#[derive(Debug, Clone, Copy)]
struct Measured {
    /// Plain bytes per second.
    rate: f64,
    /// Compressed bytes per plain byte.
    ratio: f64,
}

/// Decides for each payload, and compresses it.
pub struct Packer {
    choice: Compression,
    compressor: Compressor<'static>,
    measured: Option<Measured>,
    plain_since: u32,
}

impl Packer {
    pub fn new(choice: Compression) -> std::io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Self { choice, compressor, measured: None, plain_since: 0 })
    }

    /// A payload of `Memory` as it is to travel, and how.
    pub fn pack(&mut self, payload: Vec<u8>, link: &LinkMeter) -> (Kind, Vec<u8>) {
        if payload.len() < MIN_BYTES || !self.worth_it(link.bytes_per_second()) {
            self.plain_since = self.plain_since.saturating_add(1);
            return (Kind::Memory, payload);
        }
        let begun = Instant::now();
        let mut packed = vec![0; HEAD_BYTES + zstd::zstd_safe::compress_bound(payload.len())];
        packed[..HEAD_BYTES].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let Ok(bytes) = self.compressor.compress_to_buffer(&payload, &mut packed[HEAD_BYTES..]) else {
            // There is room, so this does not happen; plain pages are always right.
            return (Kind::Memory, payload);
        };
        packed.truncate(HEAD_BYTES + bytes);
        let now = Measured {
            rate: payload.len() as f64 / begun.elapsed().as_secs_f64().max(1e-6),
            ratio: packed.len() as f64 / payload.len() as f64,
        };
        let blend =
            |old: Measured| Measured { rate: average(old.rate, now.rate), ratio: average(old.ratio, now.ratio) };
        self.measured = Some(self.measured.map_or(now, blend));
        self.plain_since = 0;
        if packed.len() < payload.len() { (Kind::PackedMemory, packed) } else { (Kind::Memory, payload) }
    }

    fn worth_it(&self, link: Option<f64>) -> bool {
        match (self.choice, link, self.measured) {
            (Compression::Never, ..) => false,
            (Compression::Always, ..) => true,
            (Compression::Auto, None, _) => false,
            // Once, to know.
            (Compression::Auto, Some(_), None) => true,
            (Compression::Auto, Some(link), Some(Measured { rate, ratio })) => {
                rate.min(link / ratio) > link * WORTH || self.plain_since >= TRY_EVERY
            }
        }
    }
}

/// The payload of `Memory` in a payload of `PackedMemory`.
pub fn unpack(packed: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let Some((head, frame)) = packed.split_first_chunk::<HEAD_BYTES>() else { return Err(UnpackError::TooShort) };
    let bytes = u32::from_le_bytes(*head) as usize;
    if bytes > MAX_PAYLOAD_BYTES {
        return Err(UnpackError::TooLong { bytes });
    }
    let mut decompressor = Decompressor::new().map_err(UnpackError::Damaged)?;
    let payload = decompressor.decompress(frame, bytes).map_err(UnpackError::Damaged)?;
    if payload.len() == bytes { Ok(payload) } else { Err(UnpackError::TooShort) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(bytes_per_second: f64) -> LinkMeter {
        let meter = LinkMeter::default();
        meter.sent(bytes_per_second as usize, Duration::from_secs(1));
        meter
    }

    /// How many of a hundred payloads travel compressed.
    fn packed_of(content: &[u8], link: &LinkMeter, choice: Compression) -> usize {
        let mut packer = Packer::new(choice).unwrap();
        (0..100).filter(|_| packer.pack(content.to_vec(), link).0 == Kind::PackedMemory).count()
    }

    #[test]
    fn the_slow_link_decides() {
        let text: Vec<u8> = (0u32..65_536).flat_map(|n| (n / 7).to_le_bytes()).collect();
        assert_eq!(packed_of(&text, &link(2e6), Compression::Auto), 100);
        assert!(packed_of(&text, &link(1e12), Compression::Auto) <= 3, "now and then it is tried");
        assert_eq!(packed_of(&text, &LinkMeter::default(), Compression::Auto), 0, "nothing is known yet");
        assert_eq!(packed_of(&text, &link(1e12), Compression::Always), 100);
        assert_eq!(packed_of(&text, &link(2e6), Compression::Never), 0);
        assert_eq!(packed_of(&text[..4096], &link(2e6), Compression::Always), 0, "too small");
    }

    #[test]
    fn noise_travels_plain() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u32
        };
        let noise: Vec<u8> = (0..65_536).flat_map(|_| next().to_le_bytes()[..3].to_vec()).collect();
        assert_eq!(packed_of(&noise, &link(2e6), Compression::Auto), 0);
        assert_eq!(packed_of(&noise, &link(2e6), Compression::Always), 0);
    }

    #[test]
    fn a_payload_cannot_ask_for_more_than_is_allowed() {
        let mut packed = u32::MAX.to_le_bytes().to_vec();
        packed.extend([0; 20]);
        assert!(matches!(unpack(&packed), Err(UnpackError::TooLong { .. })));
        // It says less than what is in it, and more.
        let (_, good) = Packer::new(Compression::Always).unwrap().pack(vec![7; 1 << 20], &link(1.0));
        for said in [0u32, 4096, (1 << 20) - 1, (1 << 20) + 1] {
            let mut bad = good.clone();
            bad[..HEAD_BYTES].copy_from_slice(&said.to_le_bytes());
            assert!(unpack(&bad).is_err(), "{said}");
        }
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(seed in prop::collection::vec(any::<u8>(), 1..200), times in 50usize..500) {
            let content = seed.repeat(times);
            let (kind, payload) = Packer::new(Compression::Always).unwrap().pack(content.clone(), &link(1.0));
            let back = if kind == Kind::PackedMemory { unpack(&payload).unwrap() } else { payload };
            prop_assert_eq!(back, content);
        }

        #[test]
        fn damage_is_found(at in 0usize..100, bit in 0u8..8) {
            let content: Vec<u8> = (0u32..20_000).flat_map(|n| (n / 3).to_le_bytes()).collect();
            let (_, mut packed) = Packer::new(Compression::Always).unwrap().pack(content, &link(1.0));
            let at = at * packed.len() / 100;
            packed[at] ^= 1 << bit;
            prop_assert!(unpack(&packed).is_err());
        }

        #[test]
        fn nonsense_is_refused_and_nothing_panics(packed in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = unpack(&packed);
        }
    }
}
