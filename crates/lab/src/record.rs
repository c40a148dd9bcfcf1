//! What a lab is, on its tmpfs: written before anything else is made.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::spec::LabSpec;

/// Format of the record. A record of another version is refused by `open`, never by `down`.
pub(crate) const RECORD_VERSION: u32 = 1;

/// A record that could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {}: is the lab up? `godwit lab list` shows all", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a lab record; `godwit lab down` removes the lab all the same", .path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("{} has record version {found}, this godwit knows {RECORD_VERSION}; `godwit lab down` removes the lab all the same", .path.display())]
    Version { path: PathBuf, found: u32 },
}

/// `lab.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LabRecord {
    pub version: u32,
    pub spec: LabSpec,
}

/// `<host>.daemon.json`: which process is the host's daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DaemonRecord {
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)), in clock ticks since boot: tells a process
    /// from a later one with the same pid.
    pub start_ticks: u64,
}

/// Writes `value` so that a reader sees the old content or the new, never a part.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), RecordError> {
    let wrong = |source| RecordError::Write { path: path.to_owned(), source };
    let temporary = path.with_extension("tmp");
    let bytes = serde_json::to_vec_pretty(value).map_err(|e| wrong(e.into()))?;
    let mut file = fs::File::create(&temporary).map_err(wrong)?;
    file.write_all(&bytes).map_err(wrong)?;
    fs::rename(&temporary, path).map_err(wrong)
}

pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let bytes = fs::read(path).map_err(|source| RecordError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| RecordError::Parse { path: path.to_owned(), source })
}
