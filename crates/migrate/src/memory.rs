//! The source's memory in rounds: told by the tracker, read, and turned into frames.

use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::{
    Content, Key, Means, PageRange, PageReader, Pause, Piece, ReadError, Round, Target, TrackError, Tracker,
};
use godwit_model::migration::Compression;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::packing::{LinkMeter, Packer};
use crate::pages::Head;
use crate::wire::Kind;

/// Pages of one frame, in bytes.
const PIECE_BYTES: usize = 1 << 20;
/// Ranges of one frame.
const MAX_RANGES: usize = 4096;

#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("written pages could not be told")]
    Track(#[from] TrackError),
    #[error("memory could not be read")]
    Read(#[from] ReadError),
    #[error("there is no room for compressing")]
    Pack(#[source] std::io::Error),
}

/// A frame on its way to the wire. In a round one `Barrier` is between what is void and what pages have come to hold; it
/// is for several connections only.
pub struct Outgoing {
    pub kind: Kind,
    pub payload: Vec<u8>,
}

/// What one round sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Pages that were written since the round before, in bytes.
    pub dirty_bytes: u64,
    /// Pages of content that were sent, in bytes: those that are zero cost nothing.
    pub sent_bytes: u64,
    /// For how long the processes stood still for the look at which pages these are.
    pub paused: Duration,
}

/// The memory of a container's processes. Plain threads: every method blocks.
pub struct Memory {
    tracker: Tracker,
    packer: Packer,
    rounds: u16,
}

impl Memory {
    /// `pause` is how all processes are made to stand still for a moment, where the kernel needs that.
    pub fn new(compression: Compression, pause: Arc<dyn Pause>) -> Result<Self, MemoryError> {
        let packer = Packer::new(compression).map_err(MemoryError::Pack)?;
        Ok(Self { tracker: Tracker::new(pause)?, packer, rounds: 0 })
    }

    /// For one round over processes that stand still, on a kernel that cannot tell written pages.
    pub fn for_one_round(compression: Compression) -> Result<Self, MemoryError> {
        let packer = Packer::new(compression).map_err(MemoryError::Pack)?;
        Ok(Self { tracker: Tracker::for_one_round()?, packer, rounds: 0 })
    }

    /// How written pages are told; `None`: they are not.
    pub fn means(&self) -> Option<Means> {
        self.tracker.means()
    }

    /// Makes a round over `pids`: `told` hears which pages it is about before any is read, then everything goes to
    /// `out`, compressed if `link` is slow. Ends early without an error when nobody listens there any more. If it is
    /// `late`, asked with the round, only the names of processes' pages go there: they are read later.
    pub fn round(
        &mut self,
        pids: &[i32],
        target: Target,
        out: &mpsc::Sender<Outgoing>,
        link: &LinkMeter,
        late: impl FnOnce(&Round) -> bool,
        told: impl FnOnce(&Arc<Round>),
    ) -> Result<RoundStats, MemoryError> {
        let begun = Instant::now();
        let round = Arc::new(self.tracker.round(pids, target)?);
        tracing::debug!(
            processes = pids.len(),
            objects = round.objects.len(),
            compared_bytes = round.objects.iter().filter(|o| o.compared).map(|o| o.size_bytes).sum::<u64>(),
            ranges = round.processes.iter().map(|p| p.pages.ranges().len()).sum::<usize>(),
            ms = begun.elapsed().as_secs_f64() * 1e3,
            paused_ms = round.paused.as_secs_f64() * 1e3,
            ?target,
            "a look at memory"
        );
        let number = self.rounds;
        self.rounds = self.rounds.saturating_add(1);
        let late = late(&round);
        told(&round);
        let mut frames = Frames { out, packer: &mut self.packer, link, number, sent_bytes: 0 };
        for inner_pid in &round.ended {
            frames.drop_key(Key::Process(*inner_pid));
        }
        for id in &round.dropped {
            frames.drop_key(Key::Object(*id));
        }
        let reset = round.processes.iter().filter(|p| p.reset).map(|p| Key::Process(p.inner_pid));
        reset.for_each(|key| frames.drop_key(key));
        let reset = round.objects.iter().filter(|o| o.reset).map(|o| Key::Object(o.id));
        reset.for_each(|key| frames.drop_key(key));
        // From here on each page comes once, on whatever connection.
        frames.send(Kind::Barrier, Vec::new());
        for process in &round.processes {
            let key = Key::Process(process.inner_pid);
            frames.empty(key, process.gone.ranges());
            if late {
                frames.ranges(Kind::LateMemory, key, process.pages.ranges());
                continue;
            }
            let reader = self.tracker.read_process(process.pid, process.pages.clone());
            match frames.pages(key, reader) {
                // It ended after the look; the next round says so.
                Err(ReadError::Gone { .. }) if target == Target::Running => {}
                other => other?,
            }
        }
        for object in &round.objects {
            let key = Key::Object(object.id);
            frames.empty(key, object.gone.ranges());
            if let Some(reader) = self.tracker.read_object(object.id, object.pages.clone()) {
                frames.pages(key, reader)?;
            }
        }
        Ok(RoundStats { dirty_bytes: round.bytes(), sent_bytes: frames.sent_bytes, paused: round.paused })
    }

    /// Reads pages that a round has called late, and sends them to `out`.
    pub fn read_late(
        &mut self,
        key: Key,
        reader: PageReader,
        out: &mpsc::Sender<Outgoing>,
        link: &LinkMeter,
    ) -> Result<(), MemoryError> {
        let mut frames = Frames { out, packer: &mut self.packer, link, number: self.rounds, sent_bytes: 0 };
        Ok(frames.pages(key, reader)?)
    }
}

struct Frames<'a> {
    out: &'a mpsc::Sender<Outgoing>,
    packer: &'a mut Packer,
    link: &'a LinkMeter,
    number: u16,
    sent_bytes: u64,
}

impl Frames<'_> {
    /// `false`: nobody listens.
    fn send(&self, kind: Kind, payload: Vec<u8>) -> bool {
        self.out.blocking_send(Outgoing { kind, payload }).is_ok()
    }

    fn drop_key(&self, key: Key) {
        self.send(Kind::DropMemory, Head { key, round: self.number }.begin(&[], 0));
    }

    fn empty(&self, key: Key, ranges: &[PageRange]) {
        self.ranges(Kind::EmptyMemory, key, ranges);
    }

    fn ranges(&self, kind: Kind, key: Key, ranges: &[PageRange]) {
        for some in ranges.chunks(MAX_RANGES) {
            self.send(kind, Head { key, round: self.number }.begin(some, 0));
        }
    }

    fn pages(&mut self, key: Key, mut reader: PageReader) -> Result<(), ReadError> {
        let (mut buffer, mut pieces) = (vec![0; PIECE_BYTES], Vec::new());
        loop {
            reader.read(&mut buffer, &mut pieces)?;
            if pieces.is_empty() {
                return Ok(());
            }
            let (mut full, mut empty, mut bytes) = (Vec::new(), Vec::new(), 0);
            for Piece { range, content } in &pieces {
                match content {
                    Content::Data { .. } => {
                        full.push(*range);
                        bytes += range.bytes();
                    }
                    Content::Zero | Content::Absent => empty.push(*range),
                }
            }
            if !full.is_empty() {
                let mut payload = Head { key, round: self.number }.begin(&full, bytes as usize);
                for Piece { range, content } in &pieces {
                    if let Content::Data { at } = content {
                        payload.extend_from_slice(&buffer[*at..at + range.bytes() as usize]);
                    }
                }
                self.sent_bytes += bytes;
                let (kind, payload) = self.packer.pack(payload, self.link);
                if !self.send(kind, payload) {
                    return Ok(());
                }
            }
            self.empty(key, &empty);
        }
    }
}
