//! The source of a move, mirror image of [`crate::destination`].

mod dump;
mod files;
mod frozen;
mod lanes;
mod late;
mod memory;
mod rounds;
mod slow;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::{FileWatch, Means, Pause, Round};
use godwit_model::migration::{MoveOptions, Phase, Progress};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use self::files::files_followed;
use crate::files::{ScanError, Scanner};
use crate::memory::{Memory, MemoryError};
use crate::packing::LinkMeter;
use crate::wire::{
    Accept, Final, FrameReader, FrameWriter, Kind, MAX_CONNECTIONS, MEMORY_VERSION, OLDEST_VERSION, Offer, Refuse,
    VERSION, WireError,
};
pub use lanes::Lane;
use lanes::Lanes;
use memory::{NoRounds, memory_in_rounds, without_rounds};
use slow::Brake;

/// What a move without anything left to send stands still for, in milliseconds, before any has been measured
/// (docs/migration-performance.md).
pub const FIXED_MS: f64 = 100.0;
/// The other side answers the offer within this time, in milliseconds.
const OFFER_TIMEOUT_MS: u64 = 10_000;
/// Progress is told at most this often, in milliseconds.
const PROGRESS_EVERY_MS: u64 = 100;

/// Any error of the agent's part of a phase.
pub type PartError = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Error)]
pub enum SendError {
    #[error("{phase}: the destination refused: {reason}")]
    Refused { phase: Phase, reason: String },
    #[error("{phase}: the connection to the destination failed")]
    Wire { phase: Phase, source: WireError },
    #[error("{phase}: files could not be read")]
    Scan { phase: Phase, source: ScanError },
    #[error(
        "memory cannot be copied while the container runs: {why}; without --mode pre-copy and --max-downtime it is copied \
         while it stands still"
    )]
    NoRounds { why: String },
    #[error(
        "it writes faster than that can be sent: it would stand still for about {expected_ms} ms, {max_ms} ms are allowed; \
         raise --max-downtime, or move it at a quieter time"
    )]
    TooLong { expected_ms: u64, max_ms: u64 },
    #[error("{phase}: memory could not be copied")]
    Memory { phase: Phase, source: MemoryError },
    #[error("{phase}: {doing} failed")]
    Part { phase: Phase, doing: &'static str, source: PartError },
}

impl SendError {
    pub fn phase(&self) -> Phase {
        match self {
            Self::NoRounds { .. } => Phase::Check,
            Self::TooLong { .. } => Phase::Copy,
            Self::Refused { phase, .. } | Self::Wire { phase, .. } => *phase,
            Self::Scan { phase, .. } | Self::Memory { phase, .. } | Self::Part { phase, .. } => *phase,
        }
    }
}

/// How the memory of the frozen processes gets to the other side.
#[derive(Debug)]
pub enum DumpMemory {
    /// CRIU writes it to this socket, which is closed at the end.
    Stream(UnixStream),
    /// Past CRIU, which must leave out what this round says is carried.
    Carried(Arc<Round>),
}

/// The container that moves. Paused on success, resumed on failure: [`Workload::thaw`] is called on every error after
/// [`Workload::freeze`] was tried, and never after success.
pub trait Workload: Send {
    /// Name and directory of every tree of files that moves along.
    fn trees(&self) -> Vec<(String, PathBuf)>;
    /// Called when a phase begins and when the numbers grow; must not block.
    fn progress(&mut self, phase: Phase, progress: Progress);
    /// The numbers of all processes, here.
    fn pids(&self) -> Result<Vec<i32>, PartError>;
    /// How all processes are made to stand still for a moment, while they are copied.
    fn pause(&self) -> Arc<dyn Pause>;
    /// What was asked of this move.
    fn options(&self) -> MoveOptions;
    /// How many connections to use, where the destination takes as many.
    fn connections(&self) -> u32;
    /// One more connection to the destination.
    fn lane(&mut self) -> impl Future<Output = Result<Lane, PartError>> + Send;
    /// For how long a move like this stands still when nothing is left to send, in milliseconds: measured, or
    /// [`FIXED_MS`].
    fn fixed_ms(&self) -> f64;
    /// The processes get this share of the CPU time they used before, in percent, until [`Workload::full_speed`].
    /// `false`: that cannot be.
    fn slow_down(&mut self, percent: u32) -> Result<bool, PartError>;
    /// Back to what they may use; called on success just before the freeze, and after any error.
    fn full_speed(&mut self);
    /// Why what the processes write cannot be told by their page tables, if it cannot. Asked before the first round and
    /// again when they stand still.
    fn hidden_writes(&self) -> Option<String>;
    /// The freeze comes next: whatever takes time and can be done before it. What the destination has to know of the
    /// container; it does not change any more.
    fn before_freeze(&mut self, carried: bool) -> impl Future<Output = Result<serde_json::Value, PartError>> + Send;
    /// Processes stand still, frames go to the destination. Returns what must be sent again whatever its ctime says:
    /// tree and path of files that are mapped shared and writable.
    fn freeze(&mut self) -> impl Future<Output = Result<Vec<(String, Vec<u8>)>, PartError>> + Send;
    /// Everything but memory into files.
    ///
    /// Returns the directory they are in.
    fn dump(&mut self, memory: DumpMemory) -> impl Future<Output = Result<PathBuf, PartError>> + Send;
    /// Some memory goes to the other side while the container runs there already; called before the other side can know.
    /// Until [`send`] returns, what the frozen processes have must stay.
    fn still_needed(&mut self);
    /// As before the freeze.
    fn thaw(&mut self) -> impl Future<Output = ()> + Send;
}

/// What a successful send was; the container is frozen and everything is on the other side.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    pub bytes: u64,
    pub fin: Final,
}

/// Runs the source's side up to and including `Final`, and sends what is late.
///
/// On `Err` the container runs as before. On `Ok` it is frozen and only the store's verdict may free or thaw it.
pub async fn send<R, W, L>(
    reader: R,
    writer: W,
    move_id: &str,
    container: &str,
    workload: &mut L,
) -> Result<Sent, SendError>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
    L: Workload,
{
    let mut source = Source {
        reader: FrameReader::new(reader),
        writer: FrameWriter::new(writer),
        scanners: workload.trees().into_iter().map(|(name, dir)| Scanner::new(name, dir)).collect(),
        memory: None,
        watch: None,
        lanes: Lanes::default(),
        link: Arc::default(),
        brake: Brake::default(),
        version: OLDEST_VERSION,
        late: false,
        stood_still: None,
        paused: None,
        memory_bytes: 0,
        progress: Progress::default(),
        told: Instant::now(),
    };
    let version = source.handshake(move_id, container, workload).await?;
    if version >= MEMORY_VERSION {
        source.scanners.iter_mut().for_each(Scanner::send_patches);
    }
    source.version = version;
    match files_followed(version, workload).await {
        Ok(watch) => source.watch = Some(watch),
        Err(why) => tracing::info!(why, "changed files are read whole"),
    }
    // Where nobody can tell written pages, memory goes through CRIU while everything stands still.
    match memory_in_rounds(version, workload) {
        Ok(memory) => {
            source.paused = (memory.means() == Some(Means::SoftDirty)).then_some(Duration::ZERO);
            source.memory = Some(memory);
        }
        Err(NoRounds { why, after: Some(memory) }) => {
            tracing::info!(why, "memory follows after the hand-over");
            (source.memory, source.late, source.stood_still) = (Some(*memory), true, Some(why));
        }
        Err(NoRounds { why, after: None }) => source.stood_still = Some(without_rounds(why, workload.options())?),
    }
    let carried = source.memory.is_some();
    let share = source.lanes.pace(workload.options().bandwidth);
    source.writer.pace.set(share);
    let copied = source.copy(carried, workload).await;
    workload.full_speed();
    source.lanes.pace(None);
    source.writer.pace.set(None);
    let detail = copied?;
    let done = source.frozen_part(detail, workload).await;
    // Taking programs out of the kernel waits for all processors, and nobody waits for that.
    let watch = source.watch.take();
    tokio::task::spawn_blocking(move || drop(watch));
    match done {
        Ok((fin, late)) => {
            if let Some(late) = late
                && let Err(error) = source.send_late(late).await
            {
                // The other side notices by the end of the connection, and starts the container anew.
                tracing::error!(error, "memory that was to follow did not all get there");
            }
            Ok(Sent { bytes: source.sent_bytes(), fin })
        }
        Err(error) => {
            workload.thaw().await;
            Err(error)
        }
    }
}

struct Source<R, W> {
    reader: FrameReader<R>,
    writer: FrameWriter<W>,
    scanners: Vec<Scanner>,
    /// `None`: memory goes through CRIU.
    memory: Option<Memory>,
    /// `None`: a changed file is read whole.
    watch: Option<FileWatch>,
    /// More connections for pages.
    lanes: Lanes,
    link: Arc<LinkMeter>,
    brake: Brake,
    /// What both speak.
    version: u32,
    /// What is left of memory follows after `Final`.
    late: bool,
    /// Why there are no rounds of memory, where there are none; whether there is `memory` says what happens instead.
    stood_still: Option<String>,
    /// For how long it stood still for looks at its memory; `None` where it need not.
    paused: Option<Duration>,
    memory_bytes: u64,
    progress: Progress,
    told: Instant,
}

fn wire(phase: Phase) -> impl Fn(WireError) -> SendError {
    move |source| SendError::Wire { phase, source }
}

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// The version both speak.
    async fn handshake<L: Workload>(
        &mut self,
        move_id: &str,
        container: &str,
        workload: &mut L,
    ) -> Result<u32, SendError> {
        let phase = Phase::Prepare;
        let offer = Offer {
            oldest: OLDEST_VERSION,
            newest: VERSION,
            move_id: move_id.to_owned(),
            container: container.to_owned(),
            connections: workload.connections().clamp(1, MAX_CONNECTIONS),
        };
        self.writer.send_json(Kind::Offer, &offer).await.map_err(wire(phase))?;
        self.writer.flush().await.map_err(wire(phase))?;
        let answer = tokio::time::timeout(Duration::from_millis(OFFER_TIMEOUT_MS), self.reader.next())
            .await
            .map_err(|_| SendError::Wire { phase, source: WireError::Io(std::io::ErrorKind::TimedOut.into()) })?
            .map_err(wire(phase))?;
        match answer.kind {
            Kind::Accept => {
                let accept: Accept = answer.json().map_err(wire(phase))?;
                tracing::debug!(?accept, move_id, "the destination takes the container");
                for _ in 1..accept.connections.min(offer.connections) {
                    let lane = workload.lane().await;
                    let lane =
                        lane.map_err(|source| SendError::Part { phase, doing: "one more connection", source })?;
                    self.lanes.add(lane, move_id).await.map_err(wire(phase))?;
                }
                Ok(accept.version)
            }
            Kind::Refuse => {
                let refuse: Refuse = answer.json().map_err(wire(phase))?;
                Err(SendError::Refused { phase, reason: refuse.reason })
            }
            got => {
                Err(SendError::Wire { phase, source: WireError::Unexpected { got, wanted: "an answer to the offer" } })
            }
        }
    }

    /// On all connections.
    fn sent_bytes(&self) -> u64 {
        self.writer.sent_bytes + self.lanes.sent_bytes()
    }

    fn tell<L: Workload>(&mut self, phase: Phase, workload: Option<&mut L>) {
        self.progress.bytes_sent = self.sent_bytes();
        if let Some(workload) = workload
            && self.told.elapsed() >= Duration::from_millis(PROGRESS_EVERY_MS)
        {
            self.told = Instant::now();
            workload.progress(phase, self.progress);
        }
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
