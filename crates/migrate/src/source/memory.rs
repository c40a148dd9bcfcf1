//! Rounds of memory: read by a thread, sent as it comes.

use std::sync::Arc;

use godwit_memory::{ObjectKind, Round, SharedMapping, Target};
use godwit_model::migration::{Compression, CopyMode, MoveOptions, Phase};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::late::{LATE_FROM_BYTES, late_bytes};
use super::{SendError, Source, Workload, lanes, wire};
use crate::memory::{Memory, MemoryError, Outgoing, RoundStats};
use crate::wire::{Kind, LATE_VERSION, MEMORY_VERSION, PACKED_VERSION, SharedKind, SharedPlace};

/// Frames from this size on tell how fast the link is, in bytes.
pub(super) const METERED_BYTES: usize = 64 << 10;
/// Frames of memory that may wait between reading and sending; one is 1 MiB at most.
const QUEUE_FRAMES: usize = 16;

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// A round of memory while the processes run.
    pub(super) async fn memory_round<L: Workload>(
        &mut self,
        phase: Phase,
        target: Target,
        workload: &mut L,
    ) -> Result<RoundStats, SendError> {
        let (_, frames, work) = self.begin_memory(phase, target, workload)?;
        self.memory_frames(phase, frames, Some(workload)).await?;
        self.end_memory(phase, work).await
    }

    /// Starts the reading of a round; which pages it is about is told first.
    #[allow(clippy::type_complexity, reason = "three ends of one thread, used at once")]
    pub(super) fn begin_memory<L: Workload>(
        &mut self,
        phase: Phase,
        target: Target,
        workload: &L,
    ) -> Result<(oneshot::Receiver<Arc<Round>>, mpsc::Receiver<Outgoing>, JoinHandle<Reading>), SendError> {
        let part = |source| SendError::Part { phase, doing: "copying memory", source };
        let mut memory = self.memory.take().ok_or_else(|| part("memory is being copied already".into()))?;
        let pids = workload.pids().map_err(part)?;
        let (out, frames) = mpsc::channel(QUEUE_FRAMES);
        let (told, last) = oneshot::channel();
        let link = Arc::clone(&self.link);
        let late = self.late && target == Target::Frozen;
        let work = tokio::task::spawn_blocking(move || {
            let late = |round: &Round| late && late_bytes(round) >= LATE_FROM_BYTES;
            let result = memory.round(&pids, target, &out, &link, late, |round| {
                // Nobody waits for it while the processes run.
                let _ = told.send(Arc::clone(round));
            });
            (memory, result)
        });
        Ok((last, frames, work))
    }

    pub(super) async fn memory_frames<L: Workload>(
        &mut self,
        phase: Phase,
        mut frames: mpsc::Receiver<Outgoing>,
        mut workload: Option<&mut L>,
    ) -> Result<(), SendError> {
        let connections = self.lanes.connections();
        while let Some(frame) = frames.recv().await {
            if frame.kind == Kind::Barrier {
                break;
            }
            lanes::send(&mut self.writer, &frame, &self.link, connections).await.map_err(wire(phase))?;
        }
        let several = !self.lanes.is_empty();
        let frames: lanes::Shared = Arc::new(tokio::sync::Mutex::new(frames));
        let others = self.lanes.begin(&frames, &self.link);
        if several {
            self.writer.send(Kind::Barrier, &[]).await.map_err(wire(phase))?;
        }
        while let Some(frame) = lanes::next(&frames).await {
            lanes::send(&mut self.writer, &frame, &self.link, connections).await.map_err(wire(phase))?;
            self.tell(phase, workload.as_deref_mut());
        }
        if several {
            self.writer.send(Kind::Barrier, &[]).await.map_err(wire(phase))?;
        }
        self.lanes.end(others).await.map_err(wire(phase))
    }

    pub(super) async fn end_memory(
        &mut self,
        phase: Phase,
        work: JoinHandle<Reading>,
    ) -> Result<RoundStats, SendError> {
        // A panic of the reader is a bug of ours; it ends the move like any other error.
        let done = work.await.map_err(|e| SendError::Part { phase, doing: "copying memory", source: e.into() });
        let (memory, result) = done?;
        self.memory = Some(memory);
        let stats = result.map_err(|source| SendError::Memory { phase, source })?;
        self.memory_bytes += stats.sent_bytes;
        self.paused = self.paused.map(|before| before + stats.paused);
        Ok(stats)
    }
}

/// Why memory is not copied while the container runs.
pub(super) struct NoRounds {
    pub why: String,
    /// All that is missing is a kernel that tells written pages; then memory can follow after the hand-over, if that is
    /// allowed.
    pub after: Option<Box<Memory>>,
}

impl From<String> for NoRounds {
    fn from(why: String) -> Self {
        Self { why, after: None }
    }
}

/// The means to copy memory while the container runs; why there are none otherwise.
pub(super) fn memory_in_rounds<L: Workload>(version: u32, workload: &L) -> Result<Memory, NoRounds> {
    let options = workload.options();
    if version < MEMORY_VERSION {
        return Err(format!("the destination speaks version {version} of the migration protocol").into());
    }
    if options.mode == CopyMode::StopAndCopy {
        return Err("stop-and-copy was asked for".to_owned().into());
    }
    if let Some(why) = workload.hidden_writes() {
        return Err(why.into());
    }
    let compression = if version >= PACKED_VERSION { options.compression } else { Compression::Never };
    Memory::new(compression, workload.pause()).map_err(|error| {
        // How long all of it would take is not known before anything was sent; so a limit is reason enough.
        let asked =
            options.mode == CopyMode::PostCopy || (options.mode == CopyMode::Auto && options.max_downtime_ms.is_some());
        let after = (asked && version >= LATE_VERSION).then(|| Memory::for_one_round(compression));
        NoRounds { why: chain(&error), after: after.and_then(Result::ok).map(Box::new) }
    })
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// Whether memory may be copied while the container stands still instead, and why it is. For how long is not known then.
pub(super) fn without_rounds(why: String, options: MoveOptions) -> Result<String, SendError> {
    if options.mode == CopyMode::PreCopy || options.max_downtime_ms.is_some() {
        return Err(SendError::NoRounds { why });
    }
    tracing::warn!(why, "memory is copied while the container stands still");
    Ok(why)
}

/// What the reading thread gives back.
pub(super) type Reading = (Memory, Result<RoundStats, MemoryError>);

/// Where the content of shared objects belongs.
pub(super) fn shared_places(last: &Round) -> Vec<SharedPlace> {
    let kind_of = |id| last.objects.iter().find(|o| o.id == id).map(|o| o.kind);
    let places = last.processes.iter().flat_map(|p| p.shared.iter().map(move |m| (p.inner_pid, m)));
    let place = |(inner_pid, mapping): (i32, &SharedMapping)| {
        let kind = match kind_of(mapping.object)? {
            ObjectKind::Anonymous => SharedKind::Anonymous,
            ObjectKind::Memfd => SharedKind::Memfd,
            ObjectKind::SysV => SharedKind::SysV,
            ObjectKind::File => SharedKind::File,
        };
        Some(SharedPlace {
            inner_pid,
            start: mapping.range.start,
            end: mapping.range.end,
            device: mapping.object.device,
            inode: mapping.object.inode,
            kind,
            offset: mapping.offset,
        })
    };
    places.filter_map(place).collect()
}
