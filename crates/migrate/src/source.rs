//! The source of a move, mirror image of [`crate::destination`].

mod dump;
mod files;
mod frozen;
mod lanes;
mod late;
mod memory;
mod slow;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::{Round, Target};
use godwit_model::migration::{CopyMode, MoveOptions, Phase, Progress};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use crate::converge::{AIM_MS, Convergence, Decision, Measured};
use crate::files::{ScanError, Scanner};
use crate::memory::{Memory, MemoryError};
use crate::packing::LinkMeter;
use crate::wire::{
    Accept, Final, FrameReader, FrameWriter, Kind, LATE_VERSION, MARK_VERSION, MAX_CONNECTIONS, MEMORY_VERSION,
    OLDEST_VERSION, Offer, Refuse, RoundEnd, VERSION, WireError,
};
pub use lanes::Lane;
use lanes::Lanes;
use memory::{memory_in_rounds, without_rounds};
use slow::Brake;

/// Rounds of files while the container runs, at the most.
pub const MAX_FILE_ROUNDS: u32 = 6;
/// A round of files that sends less than this is the last before the freeze, in bytes.
pub const SMALL_ROUND_BYTES: u64 = 8 << 20;
/// What a move without anything left to send stands still for, in milliseconds, before any has been measured
/// (docs/migration-performance.md).
pub const FIXED_MS: f64 = 100.0;
/// Rounds of memory at the most after everything is ready for the freeze.
const MAX_LAST_ROUNDS: u32 = 4;
/// What is in buffers on the way has been taken in within this time, in milliseconds: 6 MiB at 1 Mbit/s.
const SETTLE_TIMEOUT_MS: u64 = 60_000;
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
        lanes: Lanes::default(),
        link: Arc::default(),
        brake: Brake::default(),
        version: OLDEST_VERSION,
        late: false,
        stood_still: None,
        memory_bytes: 0,
        progress: Progress::default(),
        told: Instant::now(),
    };
    let version = source.handshake(move_id, container, workload).await?;
    if version >= MEMORY_VERSION {
        source.scanners.iter_mut().for_each(Scanner::send_patches);
    }
    source.version = version;
    // Where nobody can tell written pages, memory goes through CRIU while everything stands still.
    match memory_in_rounds(version, workload) {
        Ok(memory) => source.memory = Some(memory),
        Err(why) => source.stood_still = Some(without_rounds(why, workload.options())?),
    }
    let carried = source.memory.is_some();
    let share = source.lanes.pace(workload.options().bandwidth);
    source.writer.pace.set(share);
    let copied = source.copy(carried, workload).await;
    workload.full_speed();
    source.lanes.pace(None);
    source.writer.pace.set(None);
    let detail = copied?;
    match source.frozen_part(detail, workload).await {
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
    /// More connections for pages.
    lanes: Lanes,
    link: Arc<LinkMeter>,
    brake: Brake,
    /// What both speak.
    version: u32,
    /// What is left of memory follows after `Final`.
    late: bool,
    /// Why there are no rounds of memory, where there are none.
    stood_still: Option<String>,
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

    /// Everything that can be done while the container runs.
    async fn copy<L: Workload>(&mut self, carried: bool, workload: &mut L) -> Result<serde_json::Value, SendError> {
        let phase = Phase::Copy;
        self.rounds(workload).await?;
        let ready = workload.before_freeze(carried).await;
        let detail = ready.map_err(|source| SendError::Part { phase, doing: "getting ready to freeze", source })?;
        if carried && !self.late {
            // Getting ready took a while; what was written meanwhile need not be sent while everything stands still.
            for _ in 0..MAX_LAST_ROUNDS {
                self.memory_round(phase, Target::Running, workload).await?;
                if self.settle(phase).await?.as_secs_f64() * 1e3 <= AIM_MS {
                    break;
                }
            }
        }
        Ok(detail)
    }

    /// Waits until the destination has taken in all that was sent: what is still in buffers on the way would have to be
    /// waited for while the container stands still. For how long that took.
    async fn settle(&mut self, phase: Phase) -> Result<Duration, SendError> {
        self.writer.flush().await.map_err(wire(phase))?;
        let begun = Instant::now();
        if self.version < MARK_VERSION {
            return Ok(Duration::ZERO);
        }
        self.writer.send(Kind::Mark, &[]).await.map_err(wire(phase))?;
        self.writer.flush().await.map_err(wire(phase))?;
        let answer = self.reader.expect(Kind::Mark, "the answer to a mark");
        let stalled = |_| SendError::Wire { phase, source: WireError::Stalled };
        tokio::time::timeout(Duration::from_millis(SETTLE_TIMEOUT_MS), answer)
            .await
            .map_err(stalled)?
            .map_err(wire(phase))?;
        Ok(begun.elapsed())
    }

    /// Files and memory while the container runs, until what is left is small or does not get smaller.
    async fn rounds<L: Workload>(&mut self, workload: &mut L) -> Result<(), SendError> {
        let phase = Phase::Copy;
        let mut convergence = Convergence::default();
        let mut files_before = Some(u64::MAX);
        let mut last_look: Option<Instant> = None;
        for round in 1.. {
            self.progress.rounds = round;
            let begun = Instant::now();
            if let Some(before) = files_before {
                let sent = self.file_round(phase, &[], Some(workload)).await?.bytes_sent;
                // Not shrinking any more: further rounds would only repeat this one.
                let enough = sent < SMALL_ROUND_BYTES || sent > before / 2 || round == MAX_FILE_ROUNDS;
                files_before = (!enough).then_some(sent);
            }
            let mut decision = Decision::Freeze { expected_ms: 0.0 };
            if self.memory.is_some() {
                let (looked, held_back) = (Instant::now(), self.writer.pace.held_back);
                let stats = self.memory_round(phase, Target::Running, workload).await?;
                self.settle(phase).await?;
                let measured = Measured {
                    dirty_bytes: stats.dirty_bytes,
                    sent_bytes: stats.sent_bytes,
                    since_last_s: last_look.replace(looked).map(|last| (looked - last).as_secs_f64()),
                    sending_s: (looked.elapsed() - (self.writer.pace.held_back - held_back)).as_secs_f64(),
                    took_s: begun.elapsed().as_secs_f64(),
                };
                decision = convergence.after(measured);
                tracing::debug!(round, ?measured, ?decision, "round of memory");
            }
            self.writer.send_json(Kind::RoundEnd, &RoundEnd { round }).await.map_err(wire(phase))?;
            self.writer.flush().await.map_err(wire(phase))?;
            let post_copy =
                workload.options().mode == CopyMode::PostCopy && self.version >= LATE_VERSION && self.memory.is_some();
            if post_copy && files_before.is_none() {
                // Everything was sent once; what was written since follows.
                self.late = true;
                break;
            }
            match decision {
                Decision::Again => godwit_hold::reach("copy").await,
                Decision::Freeze { .. } if files_before.is_some() => {}
                Decision::Freeze { expected_ms } => {
                    allowed(expected_ms, convergence.fixed_ms(workload.fixed_ms()), workload.options())?;
                    break;
                }
                Decision::Stuck { expected_ms } if self.brake.press(expected_ms, &mut convergence, workload)? => {}
                Decision::Stuck { expected_ms } => {
                    let (fixed_ms, options) = (convergence.fixed_ms(workload.fixed_ms()), workload.options());
                    let Err(too_long) = allowed(expected_ms, fixed_ms, options) else {
                        tracing::info!(expected_ms, "more rounds would not make the pause shorter");
                        break;
                    };
                    if self.version < LATE_VERSION || options.mode == CopyMode::PreCopy {
                        return Err(too_long);
                    }
                    allowed(0.0, fixed_ms, options)?;
                    tracing::info!(expected_ms, "what is left of memory follows after the hand-over");
                    self.late = true;
                    break;
                }
            }
        }
        Ok(())
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

/// Whether the container may stand still for what is left, which takes `expected_ms` and what any move takes.
fn allowed(expected_ms: f64, fixed_ms: f64, options: MoveOptions) -> Result<(), SendError> {
    let expected_ms = expected_ms + fixed_ms;
    match options.max_downtime_ms {
        Some(max_ms) if expected_ms > max_ms as f64 => {
            Err(SendError::TooLong { expected_ms: expected_ms.min(1e9) as u64, max_ms })
        }
        _ => Ok(()),
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
