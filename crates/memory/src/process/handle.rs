//! The agent's end.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::filler::{FillError, FillReport, Progress, SharedReport, SharedUse};
use crate::store::PageStore;

/// A running process that fills one restore. Dropping this closes the connection to it and does not end it.
pub struct FillerProcess {
    pid: i32,
}

impl FillerProcess {
    /// Starts `command` (which is to call [`serve_filler`](super::serve_filler) with descriptor 3) and returns when it
    /// listens on `lazy-pages.socket` in `work_directory`.
    pub fn start(command: Command, work_directory: &Path) -> Result<Self, FillError> {
        let _ = (command, work_directory);
        Err(FillError::Cancelled)
    }

    /// Its number here.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Hands the pages over.
    pub fn load(&self, store: Arc<PageStore>) -> Result<(), FillError> {
        let _ = store;
        Err(FillError::Cancelled)
    }

    /// As [`Filler::restored`](crate::Filler::restored).
    pub fn restored(&self, uses: Vec<SharedUse>) -> Result<SharedReport, FillError> {
        let _ = uses;
        Err(FillError::Cancelled)
    }

    /// As [`Filler::progress`](crate::Filler::progress).
    pub fn progress(&self) -> Result<Progress, FillError> {
        Err(FillError::Cancelled)
    }

    /// As [`Filler::wait`](crate::Filler::wait).
    pub fn wait(&self, limit: Duration) -> Result<Option<FillReport>, FillError> {
        let _ = limit;
        Err(FillError::Cancelled)
    }

    /// Ends it, whatever it does: the restored processes must be gone, or their missing pages would read as zero.
    pub fn abandon(&self) {}
}
