//! What a pull tells while it runs.

use crate::digest::Digest;

/// One step of a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The manifest is known.
    Resolved {
        manifest: Digest,
        layers: usize,
        /// Compressed bytes of all layers, also of those that are here already.
        total_bytes: u64,
    },
    /// A layer is being fetched and unpacked; compressed bytes so far and in all. Never goes back.
    Layer { diff_id: Digest, done_bytes: u64, total_bytes: u64 },
    /// A layer is in the store. `reused`: it was there before, nothing was fetched.
    LayerDone { diff_id: Digest, reused: bool },
}

/// Receives progress; called from the task that pulls, so it must not block.
pub trait ProgressSink: Send + Sync {
    fn report(&self, progress: Progress);
}

/// Drops all progress.
pub struct NoProgress;

impl ProgressSink for NoProgress {
    fn report(&self, _: Progress) {}
}
