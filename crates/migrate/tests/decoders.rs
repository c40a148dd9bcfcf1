//! Everything that arrives from another host's agent: mutated and random bytes never panic, never make more memory than
//! a frame may have, and are refused with a sentence.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use godwit_memory::{Key, PageRange};
use godwit_migrate::files::{Entry, EntryKind};
use godwit_migrate::pages::{Head, with_pages};
use godwit_migrate::wire::{
    Accept, Final, Frame, FrameReader, FrameWriter, Frozen, Image, Join, Kind, MAX_PAYLOAD_BYTES, Offer, Refuse,
    RoundEnd, SharedKind, SharedPlace, WireError, negotiate,
};
use proptest::prelude::*;
use serde::Serialize;

/// Bytes before a frame's payload.
const HEADER_BYTES: usize = 16;

fn json(kind: Kind, value: &impl Serialize) -> (Kind, Vec<u8>) {
    (kind, serde_json::to_vec(value).unwrap())
}

fn entry(kind: EntryKind) -> (Kind, Vec<u8>) {
    let entry = Entry {
        tree: "root".into(),
        path: b"var/\xff".to_vec(),
        kind,
        mode: 0o100_644,
        uid: 100_000,
        gid: 100_000,
        modified_ns: -1,
        xattrs: vec![("user.a".into(), vec![1, 2, 3])],
    };
    json(Kind::Entry, &entry)
}

/// Valid payloads, of each kind that has a form.
fn valid() -> Vec<(Kind, Vec<u8>)> {
    let kind = SharedKind::Memfd;
    let place = SharedPlace { inner_pid: 7, start: 0x1000, end: 0x3000, device: 1, inode: 2, kind, offset: 4096 };
    let fin = Final {
        freeze_ms: 1.5,
        dump_ms: 20.0,
        files_ms: 0.0,
        elapsed_ms: 30.0,
        memory_bytes: 1 << 30,
        file_bytes: 0,
        rounds: 3,
        stood_still: Some("stop-and-copy was asked for".into()),
        detail: serde_json::json!({"restarts": 0}),
        slowed_to_percent: None,
        paused_ms: None,
        late_bytes: 0,
        shared: Some(vec![place]),
    };
    let mut memory = Head { key: Key::Process(7), round: 2 }.begin(&[PageRange { start: 0x1000, end: 0x2000 }], 4096);
    memory.extend([0xaa; 4096]);
    vec![
        json(
            Kind::Offer,
            &Offer { oldest: 1, newest: 2, move_id: "d0d0d0d0d0d0".into(), container: "c".into(), connections: 4 },
        ),
        json(Kind::Accept, &Accept { version: 2, connections: 4 }),
        json(Kind::Join, &Join { move_id: "d0d0d0d0d0d0".into() }),
        (Kind::Barrier, Vec::new()),
        (Kind::Mark, Vec::new()),
        json(Kind::Refuse, &Refuse { reason: "no room".into() }),
        entry(EntryKind::File { size: 1 << 40 }),
        entry(EntryKind::Symlink { target: b"../../etc".to_vec() }),
        entry(EntryKind::Node { device: 0 }),
        json(Kind::RoundEnd, &RoundEnd { round: 9 }),
        json(Kind::Frozen, &Frozen { carried: true, detail: serde_json::json!({}) }),
        json(Kind::Image, &Image { name: "core-1.img".into(), bytes: 3 }),
        json(Kind::Final, &fin),
        (Kind::LateMemory, memory[..memory.len() - 4096].to_vec()),
        (Kind::Wanted, memory[..memory.len() - 4096].to_vec()),
        (Kind::LateEnd, Vec::new()),
        (Kind::Complete, Vec::new()),
        (Kind::Memory, memory),
        (Kind::Data, vec![0; 100]),
    ]
}

/// What a receiver does with a frame before it believes anything in it.
fn decode(frame: &Frame) -> Result<(), WireError> {
    match frame.kind {
        Kind::Offer => {
            let offer: Offer = frame.json()?;
            assert!(
                negotiate(&offer).is_ok_and(|version| version > 0) || !negotiate(&offer).unwrap_err().reason.is_empty()
            );
        }
        Kind::Accept => {
            frame.json::<Accept>()?;
        }
        Kind::Refuse => drop(frame.json::<Refuse>()?),
        Kind::Entry => drop(frame.json::<Entry>()?),
        Kind::RoundEnd => {
            frame.json::<RoundEnd>()?;
        }
        Kind::Frozen => drop(frame.json::<Frozen>()?),
        Kind::Image => drop(frame.json::<Image>()?),
        Kind::Final => drop(frame.json::<Final>()?),
        Kind::Memory => {
            let (_, ranges, content) = Head::split(&frame.payload)?;
            let pages = with_pages(&ranges, content)?;
            assert_eq!(pages.iter().map(|(_, bytes)| bytes.len()).sum::<usize>(), content.len());
        }
        Kind::Join => drop(frame.json::<Join>()?),
        Kind::EmptyMemory | Kind::DropMemory | Kind::LateMemory | Kind::Wanted => drop(Head::split(&frame.payload)?),
        _ => {}
    }
    Ok(())
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// Reads to the first error, as a receiver does: how many frames there were, and the error.
async fn read_all(bytes: &[u8]) -> (usize, WireError) {
    let mut reader = FrameReader::new(bytes);
    // Each frame takes at least its header.
    for frames in 0..=bytes.len() / HEADER_BYTES {
        let refused = match reader.next().await {
            Ok(frame) => {
                assert!(frame.payload.len() <= MAX_PAYLOAD_BYTES.min(bytes.len()));
                decode(&frame).err()
            }
            Err(error) => Some(error),
        };
        if let Some(error) = refused {
            assert!(!error.to_string().is_empty());
            return (frames, error);
        }
    }
    panic!("more frames than bytes");
}

async fn framed(frames: &[(Kind, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = FrameWriter::new(&mut bytes);
    for (kind, payload) in frames {
        writer.send(*kind, payload).await.unwrap();
    }
    bytes
}

#[test]
fn what_is_valid_is_read() {
    let (frames, end) = wait(async { read_all(&framed(&valid()).await).await });
    assert_eq!(frames, valid().len(), "{end}");
    assert!(matches!(end, WireError::Closed), "{end}");
}

#[test]
fn a_frame_that_claims_to_be_huge_is_refused_before_it_is_read() {
    let mut header = [0u8; HEADER_BYTES];
    header[0] = Kind::Data as u8;
    header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let (_, refused) = wait(read_all(&header));
    assert!(matches!(refused, WireError::TooLong { .. }), "{refused}");
}

type Changes = Vec<(prop::sample::Index, u8, u8)>;

/// Bytes are put, cut out, doubled; the rest is cut off.
fn mutate(bytes: &mut Vec<u8>, changes: &Changes) {
    for (at, what, value) in changes {
        if bytes.is_empty() {
            return;
        }
        let at = at.index(bytes.len());
        match what % 4 {
            0 => bytes[at] = *value,
            1 => {
                bytes.remove(at);
            }
            2 => bytes.insert(at, *value),
            _ => bytes.truncate(at),
        }
    }
}

fn changes() -> impl Strategy<Value = Changes> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..8)
}

proptest! {
    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        wait(read_all(&bytes));
    }

    #[test]
    fn a_damaged_stream_is_refused(changes in changes()) {
        wait(async {
            let mut bytes = framed(&valid()).await;
            mutate(&mut bytes, &changes);
            read_all(&bytes).await
        });
    }

    /// As a peer would send it that means it: lengths and checksums are right.
    #[test]
    fn frames_of_a_peer_that_lies_are_refused_or_read(which in 0..valid().len(), changes in changes()) {
        let (kind, mut payload) = valid().swap_remove(which);
        mutate(&mut payload, &changes);
        wait(async { read_all(&framed(&[(kind, payload)]).await).await });
    }
}
