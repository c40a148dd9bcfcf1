//! The migration protocol: frames on one TLS connection.
//!
//! ```text
//! source                                           destination
//!   │ ── Offer{versions, move, container} ─────────────▶ │
//!   │ ◀──────────────────────────── Accept{version} ──── │   or Refuse{reason}
//!   │ ── per tree: Entry, Data…, Remove ───────────────▶ │   copy: rounds while the container runs
//!   │ ── Memory, EmptyMemory, DropMemory ──────────────▶ │   pages written since the round before
//!   │ ── RoundEnd{round} ──────────────────────────────▶ │
//!   │ ── Frozen ───────────────────────────────────────▶ │   the downtime's clock starts
//!   │ ── Memory, EmptyMemory, DropMemory ──────────────▶ │   the last pages, while CRIU dumps the rest
//!   │ ── Image{name}, Data… ───────────────────────────▶ │   everything that CRIU wrote
//!   │ ── per tree: Entry, Data…, Remove ───────────────▶ │   files changed since the last round
//!   │ ── Final{…} ─────────────────────────────────────▶ │   from here the source obeys only the store
//!   │ ── Memory, EmptyMemory… LateEnd ─────────────────▶ │   post-copy: what LateMemory named before Final
//!   │ ◀───────────────────────── Wanted… Complete ────── │
//! ```
//! More connections than this one, each opened by a `Join{move}`, carry `Memory` and `EmptyMemory` of the rounds as
//! well. All of them carry a `Barrier` before a round's first page and after its last.
//!
//! A frame is 16 bytes of header and a payload: kind (1, zero is invalid), three zero bytes, payload length (4),
//! XXH3-64 of the payload (8), all little-endian. Control payloads are JSON. A receiver refuses unknown kinds, longer
//! payloads than [`MAX_PAYLOAD_BYTES`] and wrong checksums. Either side may close at any time; before `Final` that is a
//! failed move and the source runs on.
//!
//! Versions: the source offers a range, the destination takes the highest it knows; version N and N−1 are spoken.
//! From version 3 on `PackedMemory` may take the place of `Memory`; from version 4 on memory may follow after
//! `Final`, several connections may be used, and the source sends a `Mark` after each round. In version 1, and where the source's kernel cannot tell written pages, there are no `Memory` frames. Instead, after
//! `Frozen`, CRIU's page stream goes by as it comes: `Pages(bytes)` there, its few answers as `Pages(bytes)` back, and
//! `PagesEnd`.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use xxhash_rust::xxh3::xxh3_64;

use crate::pace::Pace;

/// The version of this protocol.
pub const VERSION: u32 = 4;
/// The first version that carries memory in rounds.
pub const MEMORY_VERSION: u32 = 2;
/// The first version in which memory may be compressed.
pub const PACKED_VERSION: u32 = 3;
/// The first version in which memory may follow after `Final`.
pub const LATE_VERSION: u32 = 4;
/// The first version in which a mark is answered.
pub const MARK_VERSION: u32 = 4;
/// The oldest version still spoken.
pub const OLDEST_VERSION: u32 = 1;
/// The largest payload of a frame, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;
const HEADER_BYTES: usize = 16;
/// A frame that cannot be written within this time ends the move, in milliseconds: the link is cut, and a container that
/// stands still shall not wait for TCP to find that out.
pub const STALL_TIMEOUT_MS: u64 = 8_000;

/// What a frame is. Zero is no kind, so that zeroed memory is never a valid frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Offer = 1,
    Accept = 2,
    Refuse = 3,
    Entry = 4,
    Data = 5,
    Remove = 6,
    RoundEnd = 7,
    Frozen = 8,
    Pages = 9,
    PagesEnd = 10,
    Image = 11,
    Final = 12,
    /// Pages with content, see [`crate::pages`].
    Memory = 13,
    /// Pages that are zero, or gone.
    EmptyMemory = 14,
    /// Everything that was sent of a process or an object is void.
    DropMemory = 15,
    /// A payload of [`Kind::Memory`], compressed, see [`crate::packing`].
    PackedMemory = 16,
    /// Pages that follow after `Final`; what was sent of them is void.
    LateMemory = 17,
    /// After `Final`: all pages have been sent.
    LateEnd = 18,
    /// From the destination after `Final`: somebody waits for these pages.
    Wanted = 19,
    /// From the destination: all pages are in the hands of the process that fills, which needs nobody any more.
    Complete = 20,
    /// The first frame of one more connection of a move.
    Join = 21,
    /// What follows on any connection comes after what came before it on all of them.
    Barrier = 22,
    /// Sent back as it comes, once everything before it has been taken in.
    Mark = 23,
}

/// The most connections of one move.
pub const MAX_CONNECTIONS: u32 = 8;

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        let copy =
            [Offer, Accept, Refuse, Entry, Data, Remove, RoundEnd, Memory, EmptyMemory, DropMemory, PackedMemory];
        let frozen = [Frozen, Pages, PagesEnd, Image, Final];
        let late = [LateMemory, LateEnd, Wanted, Complete, Join, Barrier, Mark];
        copy.into_iter().chain(frozen).chain(late).find(|k| *k as u8 == byte)
    }
}

#[derive(Debug, Error)]
pub enum WireError {
    #[error("the connection to the other host broke")]
    Io(#[from] std::io::Error),
    #[error("the other host closed the connection")]
    Closed,
    #[error("nothing could be sent to the other host for {} s", STALL_TIMEOUT_MS / 1000)]
    Stalled,
    #[error("the other host sent a frame of unknown kind {kind}; do both run compatible versions?")]
    UnknownKind { kind: u8 },
    #[error("the other host sent a frame of {bytes} bytes; {MAX_PAYLOAD_BYTES} is the limit")]
    TooLong { bytes: usize },
    #[error("a frame of {bytes} bytes arrived damaged (checksum)")]
    Checksum { bytes: usize },
    #[error("the other host sent a {kind:?} that cannot be read")]
    Malformed { kind: Kind, source: serde_json::Error },
    #[error("the other host sent {got:?} where {wanted} was due")]
    Unexpected { got: Kind, wanted: &'static str },
    #[error(transparent)]
    Memory(#[from] crate::pages::DecodeError),
    #[error(transparent)]
    Packed(#[from] crate::packing::UnpackError),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub oldest: u32,
    pub newest: u32,
    pub move_id: String,
    pub container: String,
    /// How many connections the source would like to use.
    #[serde(default = "one")]
    pub connections: u32,
}

fn one() -> u32 {
    1
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    pub version: u32,
    /// How many connections the destination waits for, this one included. Older ones know of no more.
    #[serde(default = "one")]
    pub connections: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    pub move_id: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundEnd {
    pub round: u32,
}

/// Everything stands still. In version 1 it has no payload.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Frozen {
    /// Memory travels in `Memory` frames; else CRIU's page stream follows.
    pub carried: bool,
    /// As in [`Final`], early: with it and all files the destination can make everything ready.
    #[serde(default)]
    pub detail: serde_json::Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub name: String,
    pub bytes: u64,
}

/// The last word of the source. Times in milliseconds since the freeze began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Final {
    pub freeze_ms: f64,
    pub dump_ms: f64,
    pub files_ms: f64,
    pub elapsed_ms: f64,
    pub memory_bytes: u64,
    pub file_bytes: u64,
    pub rounds: u32,
    /// Why memory was copied while the container stood still; `None`: in rounds while it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stood_still: Option<String>,
    /// What the destination needs of the source's container: made and read by the agent.
    pub detail: serde_json::Value,
    /// Where the content of shared memory belongs. `None`: memory came in CRIU's images.
    #[serde(default)]
    pub shared: Option<Vec<SharedPlace>>,
    /// See [`godwit_model::migration::Summary::slowed_to_percent`].
    #[serde(default)]
    pub slowed_to_percent: Option<u32>,
    /// What follows after this, in bytes.
    #[serde(default)]
    pub late_bytes: u64,
    /// See [`godwit_model::migration::Summary::paused_ms`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<f64>,
}

/// A process's mapping of a shared object; numbers as the source has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedPlace {
    pub inner_pid: i32,
    pub start: u64,
    pub end: u64,
    pub device: u64,
    pub inode: u64,
    pub kind: SharedKind,
    /// Of the mapping's start in the object, in bytes.
    pub offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SharedKind {
    Anonymous,
    Memfd,
    SysV,
    File,
}

/// Writes frames. Nothing is buffered beyond the writer below it.
pub struct FrameWriter<W> {
    inner: W,
    pub sent_bytes: u64,
    pub pace: Pace,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, sent_bytes: 0, pace: Pace::default() }
    }

    /// Sends one frame, not before the pace allows it.
    pub async fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(WireError::TooLong { bytes: payload.len() });
        }
        self.pace.keep(HEADER_BYTES + payload.len()).await;
        let mut header = [0u8; HEADER_BYTES];
        header[0] = kind as u8;
        header[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[8..].copy_from_slice(&xxh3_64(payload).to_le_bytes());
        let write = async {
            self.inner.write_all(&header).await?;
            self.inner.write_all(payload).await
        };
        tokio::time::timeout(Duration::from_millis(STALL_TIMEOUT_MS), write)
            .await
            .map_err(|_| WireError::Stalled)??;
        self.sent_bytes += (HEADER_BYTES + payload.len()) as u64;
        Ok(())
    }

    pub async fn send_json<T: Serialize>(&mut self, kind: Kind, value: &T) -> Result<(), WireError> {
        let payload = serde_json::to_vec(value).map_err(|source| WireError::Malformed { kind, source })?;
        self.send(kind, &payload).await
    }

    pub async fn flush(&mut self) -> Result<(), WireError> {
        let flushed = tokio::time::timeout(Duration::from_millis(STALL_TIMEOUT_MS), self.inner.flush()).await;
        Ok(flushed.map_err(|_| WireError::Stalled)??)
    }
}

/// One received frame.
#[derive(Debug)]
pub struct Frame {
    pub kind: Kind,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Its size on the wire, in bytes.
    pub fn bytes(&self) -> u64 {
        (HEADER_BYTES + self.payload.len()) as u64
    }

    pub fn json<T: for<'de> Deserialize<'de>>(&self) -> Result<T, WireError> {
        serde_json::from_slice(&self.payload).map_err(|source| WireError::Malformed { kind: self.kind, source })
    }
}

pub struct FrameReader<R> {
    inner: R,
    pub received_bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, received_bytes: 0 }
    }

    /// The next frame, checked. [`WireError::Closed`] at an orderly or sudden end between two frames.
    pub async fn next(&mut self) -> Result<Frame, WireError> {
        let mut header = [0u8; HEADER_BYTES];
        match self.inner.read_exact(&mut header).await {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Err(WireError::Closed),
            other => other?,
        };
        let kind = Kind::from_byte(header[0]).ok_or(WireError::UnknownKind { kind: header[0] })?;
        let [_, _, _, _, a, b, c, d, sum @ ..] = header;
        let bytes = u32::from_le_bytes([a, b, c, d]) as usize;
        if bytes > MAX_PAYLOAD_BYTES {
            return Err(WireError::TooLong { bytes });
        }
        let mut payload = vec![0; bytes];
        self.inner.read_exact(&mut payload).await?;
        if xxh3_64(&payload) != u64::from_le_bytes(sum) {
            return Err(WireError::Checksum { bytes });
        }
        let frame = Frame { kind, payload };
        self.received_bytes += frame.bytes();
        Ok(frame)
    }

    /// The next frame, which has to be of this kind.
    pub async fn expect(&mut self, kind: Kind, wanted: &'static str) -> Result<Frame, WireError> {
        let frame = self.next().await?;
        if frame.kind == kind { Ok(frame) } else { Err(WireError::Unexpected { got: frame.kind, wanted }) }
    }
}

/// The highest version both sides speak.
pub fn negotiate(offer: &Offer) -> Result<u32, Refuse> {
    let version = offer.newest.min(VERSION);
    if version >= offer.oldest && version >= OLDEST_VERSION {
        return Ok(version);
    }
    Err(Refuse {
        reason: format!(
            "the source speaks versions {} to {} of the migration protocol, this host {OLDEST_VERSION} to {VERSION}; \
             upgrade the older one",
            offer.oldest, offer.newest
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn bytes_of(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        FrameWriter::new(&mut out).send(kind, payload).await.unwrap();
        out
    }

    #[tokio::test]
    async fn the_frame_layout_is_fixed() {
        let bytes = bytes_of(Kind::RoundEnd, br#"{"round":3}"#).await;
        let golden = [
            7, 0, 0, 0, 11, 0, 0, 0, 0xbe, 0xae, 0x42, 0xe6, 0xa6, 0x3b, 0x4c, 0x7f, b'{', b'"', b'r', b'o', b'u',
            b'n', b'd', b'"', b':', b'3', b'}',
        ];
        assert_eq!(bytes[..8], golden[..8]);
        assert_eq!(bytes[8..16], xxh3_64(br#"{"round":3}"#).to_le_bytes());
        assert_eq!(bytes[16..], golden[16..]);
    }

    #[tokio::test]
    async fn damage_and_nonsense_are_refused() {
        let good = bytes_of(Kind::Data, b"hello").await;
        let frame = FrameReader::new(&good[..]).next().await.unwrap();
        assert_eq!((frame.kind, &frame.payload[..]), (Kind::Data, &b"hello"[..]));
        for at in [0usize, 4, 7, 8, 16, 20] {
            let mut bad = good.clone();
            bad[at] ^= 0x41;
            assert!(FrameReader::new(&bad[..]).next().await.is_err(), "byte {at}");
        }
        assert!(matches!(FrameReader::new(&[0u8; 16][..]).next().await, Err(WireError::UnknownKind { kind: 0 })));
        assert!(matches!(FrameReader::new(&[][..]).next().await, Err(WireError::Closed)));
    }

    #[test]
    fn versions_meet_or_part_with_a_reason() {
        let offer =
            |oldest, newest| Offer { oldest, newest, move_id: String::new(), container: String::new(), connections: 1 };
        assert_eq!(negotiate(&offer(1, 7)), Ok(VERSION));
        assert_eq!(negotiate(&offer(1, 1)), Ok(1), "the version before is spoken");
        assert!(negotiate(&offer(VERSION + 1, VERSION + 2)).unwrap_err().reason.contains("upgrade"));
    }
}
