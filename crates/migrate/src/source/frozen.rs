//! What is done while the container stands still.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use godwit_memory::Target;
use godwit_model::migration::Phase;
use tokio::io::{AsyncRead, AsyncWrite};

use super::late::{LATE_FROM_BYTES, Late, late_bytes};
use super::memory::{shared_places, without_rounds};
use super::{DumpMemory, SendError, Source, Workload, ms, wire};
use crate::wire::{Final, Frozen, Kind, RoundEnd, SharedPlace};

/// CRIU's image that lists files it has given a name during the dump.
const REMAPPED_FILES: &str = "remap-fpath.img";

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// From the freeze to the last word.
    ///
    /// ```text
    ///   freeze ─┬─ which pages ─▶ CRIU dumps the rest ─────────────────────────────┬─▶ images ─▶ Final
    ///           └──────────────── files that changed ─▶ RoundEnd ─▶ the last pages ┘
    /// ```
    /// The destination makes everything ready for its CRIU as soon as it has all files.
    pub(super) async fn frozen_part<L: Workload>(
        &mut self,
        detail: serde_json::Value,
        workload: &mut L,
    ) -> Result<(Final, Option<Late>), SendError> {
        let phase = Phase::Freeze;
        let part = |doing| move |source| SendError::Part { phase, doing, source };
        let file_bytes_before = self.sent_bytes().saturating_sub(self.memory_bytes);
        workload.progress(phase, self.progress);
        let begun = Instant::now();
        let always = workload.freeze().await.map_err(part("freezing the container"))?;
        let freeze_ms = ms(begun);
        self.progress.rounds += 1;
        if (self.memory.is_some() || self.watch.is_some())
            && let Some(why) = workload.hidden_writes()
        {
            // What goes to files past the page cache may be on its way.
            self.watch = None;
            if self.memory.take().is_some() {
                self.stood_still = Some(without_rounds(why, workload.options())?);
            }
        }
        let last = if self.memory.is_some() {
            let frozen = Frozen { carried: true, detail: detail.clone() };
            self.writer.send_json(Kind::Frozen, &frozen).await.map_err(wire(phase))?;
            self.writer.flush().await.map_err(wire(phase))?;
            self.carried_part(&always, workload).await?
        } else {
            self.writer.send(Kind::Frozen, &[]).await.map_err(wire(phase))?;
            self.writer.flush().await.map_err(wire(phase))?;
            self.streamed_part(&always, workload).await?
        };
        self.images(&last.images_dir)?.send(&mut self.writer).await.map_err(wire(phase))?;
        let fin = Final {
            freeze_ms,
            dump_ms: last.dump_ms,
            files_ms: last.files_ms,
            elapsed_ms: ms(begun),
            memory_bytes: self.memory_bytes,
            file_bytes: file_bytes_before + last.file_bytes,
            rounds: self.progress.rounds,
            stood_still: self.stood_still.clone(),
            detail,
            shared: last.shared,
            late_bytes: last.late.as_ref().map_or(0, Late::bytes),
            slowed_to_percent: self.brake.to_percent,
            paused_ms: self.paused.map(|paused| paused.as_secs_f64() * 1e3),
        };
        if last.late.is_some() {
            workload.still_needed();
        }
        self.writer.send_json(Kind::Final, &fin).await.map_err(wire(phase))?;
        self.writer.flush().await.map_err(wire(phase))?;
        self.progress.bytes_sent = self.sent_bytes();
        workload.progress(phase, self.progress);
        Ok((fin, last.late))
    }

    async fn carried_part<L: Workload>(
        &mut self,
        always: &[(String, Vec<u8>)],
        workload: &mut L,
    ) -> Result<LastPart, SendError> {
        let phase = Phase::Freeze;
        let begun = Instant::now();
        let (told, frames, work) = self.begin_memory(phase, Target::Frozen, workload)?;
        let Ok(last) = told.await else {
            // It ended before it knew which pages: with an error.
            self.end_memory(phase, work).await?;
            return Err(SendError::Part { phase, doing: "copying memory", source: "nothing was told".into() });
        };
        let shared = shared_places(&last);
        let late = (self.late && late_bytes(&last) >= LATE_FROM_BYTES).then(|| Arc::clone(&last));
        let dump = async {
            let dumped = workload.dump(DumpMemory::Carried(last)).await;
            let dumped = dumped.map_err(|source| SendError::Part { phase, doing: "the dump by CRIU", source });
            dumped.map(|images_dir| (images_dir, ms(begun)))
        };
        let round = self.progress.rounds;
        let send = async {
            let changed = self.file_round::<L>(phase, always, None).await?;
            self.writer.send_json(Kind::RoundEnd, &RoundEnd { round }).await.map_err(wire(phase))?;
            self.writer.flush().await.map_err(wire(phase))?;
            self.memory_frames::<L>(phase, frames, None).await?;
            self.writer.flush().await.map_err(wire(phase))?;
            Ok::<_, SendError>(changed.bytes_sent)
        };
        // Both to their ends: who thaws the container must not do it under CRIU's hands.
        let (dumped, sent) = tokio::join!(dump, send);
        let ((images_dir, dump_ms), mut file_bytes) = (dumped?, sent?);
        self.end_memory(phase, work).await?;
        // CRIU has given names to files that are open, deleted and still linked from elsewhere.
        if images_dir.join(REMAPPED_FILES).exists() {
            file_bytes += self.file_round::<L>(phase, &[], None).await?.bytes_sent;
            self.writer.send_json(Kind::RoundEnd, &RoundEnd { round }).await.map_err(wire(phase))?;
        }
        // No round follows.
        let late = late.and_then(|last| Some(Late::new(self.memory.take()?, &last)));
        Ok(LastPart { images_dir, file_bytes, dump_ms, files_ms: ms(begun) - dump_ms, shared: Some(shared), late })
    }

    /// Memory goes through CRIU, files follow.
    async fn streamed_part<L: Workload>(
        &mut self,
        always: &[(String, Vec<u8>)],
        workload: &mut L,
    ) -> Result<LastPart, SendError> {
        let begun = Instant::now();
        let (images_dir, bytes) = self.dump_with_pages(workload).await?;
        let dump_ms = ms(begun);
        self.memory_bytes = bytes;
        let changed = self.file_round(Phase::Freeze, always, Some(workload)).await?;
        let files_ms = ms(begun) - dump_ms;
        Ok(LastPart { images_dir, file_bytes: changed.bytes_sent, dump_ms, files_ms, shared: None, late: None })
    }
}

struct LastPart {
    images_dir: PathBuf,
    file_bytes: u64,
    dump_ms: f64,
    /// What files, and pages past CRIU, took beyond the dump.
    files_ms: f64,
    shared: Option<Vec<SharedPlace>>,
    late: Option<Late>,
}
