//! Further connections of a move, which carry pages beside the first one.
//!
//! ```text
//!   reading ─▶ what is void ─▶ first connection ─┐
//!                                             barrier
//!           ─▶ pages ─▶ whichever connection is free
//!                                             barrier
//! ```
//! Within a round each page comes once, so the order between connections does not matter; a barrier on all of them,
//! before the first page and after the last, keeps rounds apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use godwit_model::units::BitRate;
use tokio::io::AsyncWrite;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use super::memory::METERED_BYTES;
use crate::memory::Outgoing;
use crate::packing::LinkMeter;
use crate::wire::{FrameWriter, Join, Kind, WireError};

/// One more connection to the destination, of which only this direction is used.
pub type Lane = Box<dyn AsyncWrite + Unpin + Send>;

/// What all connections of a move take their frames from.
pub(super) type Shared = Arc<Mutex<mpsc::Receiver<Outgoing>>>;

/// The connections beside the first one.
#[derive(Default)]
pub(super) struct Lanes {
    writers: Vec<FrameWriter<Lane>>,
    sent_bytes: Arc<AtomicU64>,
}

impl Lanes {
    pub(super) fn is_empty(&self) -> bool {
        self.writers.is_empty()
    }

    /// All connections, the first one included.
    pub(super) fn connections(&self) -> u32 {
        self.writers.len() as u32 + 1
    }

    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// Says on a new connection what it is for.
    pub(super) async fn add(&mut self, lane: Lane, move_id: &str) -> Result<(), WireError> {
        let mut writer = FrameWriter::new(lane);
        writer.send_json(Kind::Join, &Join { move_id: move_id.to_owned() }).await?;
        writer.flush().await?;
        self.writers.push(writer);
        Ok(())
    }

    /// Each connection gets its share.
    pub(super) fn pace(&mut self, all: Option<BitRate>) -> Option<BitRate> {
        let share = all.map(|rate| BitRate(rate.0 / u64::from(self.connections())));
        self.writers.iter_mut().for_each(|writer| writer.pace.set(share));
        share
    }

    /// Sends on every connection but the first, until there are no frames; returns the work, for [`Lanes::end`].
    pub(super) fn begin(
        &mut self,
        frames: &Shared,
        link: &Arc<LinkMeter>,
    ) -> JoinSet<Result<FrameWriter<Lane>, WireError>> {
        let connections = self.connections();
        let mut all = JoinSet::new();
        for mut writer in self.writers.drain(..) {
            let (frames, link, sent) = (Arc::clone(frames), Arc::clone(link), Arc::clone(&self.sent_bytes));
            all.spawn(async move {
                writer.send(Kind::Barrier, &[]).await?;
                while let Some(frame) = next(&frames).await {
                    let before = writer.sent_bytes;
                    send(&mut writer, &frame, &link, connections).await?;
                    sent.fetch_add(writer.sent_bytes - before, Ordering::Relaxed);
                }
                writer.send(Kind::Barrier, &[]).await?;
                writer.flush().await?;
                Ok(writer)
            });
        }
        all
    }

    /// Waits until they have sent everything.
    pub(super) async fn end(
        &mut self,
        mut all: JoinSet<Result<FrameWriter<Lane>, WireError>>,
    ) -> Result<(), WireError> {
        while let Some(done) = all.join_next().await {
            // A panic there is a bug of ours, and ends the move like any other error.
            self.writers.push(done.map_err(|e| WireError::Io(std::io::Error::other(e)))??);
        }
        Ok(())
    }
}

/// The next frame that no connection has taken.
pub(super) async fn next(frames: &Shared) -> Option<Outgoing> {
    frames.lock().await.recv().await
}

/// Sends a frame on one of so many `connections`; a large one tells how fast the link is.
pub(super) async fn send<W: AsyncWrite + Unpin>(
    writer: &mut FrameWriter<W>,
    Outgoing { kind, payload }: &Outgoing,
    link: &LinkMeter,
    connections: u32,
) -> Result<(), WireError> {
    let (begun, held_back) = (Instant::now(), writer.pace.held_back);
    writer.send(*kind, payload).await?;
    if payload.len() >= METERED_BYTES {
        // A limit asked for counts as the link's; the others send as much meanwhile.
        let took = begun.elapsed().max(writer.pace.held_back - held_back);
        link.sent(payload.len() * connections as usize, took);
    }
    Ok(())
}
