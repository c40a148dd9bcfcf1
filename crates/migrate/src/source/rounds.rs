//! Rounds of files and memory while the container runs.

use std::time::{Duration, Instant};

use godwit_memory::Target;
use godwit_model::migration::{CopyMode, MoveOptions, Phase};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{SendError, Source, Workload, wire};
use crate::converge::{AIM_MS, Convergence, Decision, Measured};
use crate::wire::{Kind, LATE_VERSION, MARK_VERSION, RoundEnd, WireError};

/// Rounds of files while the container runs, at the most.
const MAX_FILE_ROUNDS: u32 = 6;
/// A round of files that sends less than this is the last before the freeze, in bytes.
const SMALL_ROUND_BYTES: u64 = 8 << 20;
/// Rounds of memory at the most after everything is ready for the freeze.
const MAX_LAST_ROUNDS: u32 = 4;
/// What is in buffers on the way has been taken in within this time, in milliseconds: 6 MiB at 1 Mbit/s.
const SETTLE_TIMEOUT_MS: u64 = 60_000;

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// Everything that can be done while the container runs.
    pub(super) async fn copy<L: Workload>(
        &mut self,
        carried: bool,
        workload: &mut L,
    ) -> Result<serde_json::Value, SendError> {
        let phase = Phase::Copy;
        self.rounds(workload).await?;
        let ready = workload.before_freeze(carried).await;
        let detail = ready.map_err(|source| SendError::Part { phase, doing: "getting ready to freeze", source })?;
        // Getting ready took a while; what was written meanwhile need not be sent while everything stands still.
        let memory = carried && !self.late;
        for _ in 0..MAX_LAST_ROUNDS {
            if self.watch.is_some() {
                self.file_round(phase, &[], Some(workload)).await?;
            }
            if memory {
                self.memory_round(phase, Target::Running, workload).await?;
            }
            if self.settle(phase).await?.as_secs_f64() * 1e3 <= AIM_MS {
                break;
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

    /// Whether memory is copied while the container runs.
    fn memory_in_rounds(&self) -> bool {
        self.memory.is_some() && self.stood_still.is_none()
    }

    /// Files and memory while the container runs, until what is left is small or does not get smaller.
    async fn rounds<L: Workload>(&mut self, workload: &mut L) -> Result<(), SendError> {
        let phase = Phase::Copy;
        let mut convergence = Convergence::default();
        let mut files_before = Some(u64::MAX);
        let mut last_look: Option<Instant> = None;
        let written_back = |source: &Self| source.watch.as_ref().map_or(Duration::ZERO, |watch| watch.written_back);
        for round in 1.. {
            self.progress.rounds = round;
            let (begun, disk) = (Instant::now(), written_back(self));
            let (mut looked, mut held_back) = (begun, self.writer.pace.held_back);
            let mut file_bytes = 0;
            if let Some(before) = files_before {
                let sent = self.file_round(phase, &[], Some(workload)).await?.bytes_sent;
                let followed = self.watch.is_some() && self.memory_in_rounds();
                // Not shrinking any more: further rounds would only repeat this one. Where only what was written is
                // read, that is for the estimate to say, as it is for memory.
                let stuck = sent > before / 2 || round == MAX_FILE_ROUNDS;
                let enough = sent < SMALL_ROUND_BYTES || (stuck && !followed);
                files_before = (!enough).then_some(sent);
                if followed {
                    file_bytes = sent;
                } else {
                    (looked, held_back) = (Instant::now(), self.writer.pace.held_back);
                }
            }
            let mut decision = Decision::Freeze { expected_ms: 0.0 };
            if self.memory_in_rounds() {
                let stats = self.memory_round(phase, Target::Running, workload).await?;
                self.settle(phase).await?;
                // The disk takes its time while the container runs only.
                let waited = (self.writer.pace.held_back - held_back) + (written_back(self) - disk);
                let measured = Measured {
                    dirty_bytes: stats.dirty_bytes + file_bytes,
                    sent_bytes: stats.sent_bytes + file_bytes,
                    since_last_s: last_look.replace(looked).map(|last| (looked - last).as_secs_f64()),
                    sending_s: looked.elapsed().saturating_sub(waited).as_secs_f64(),
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
