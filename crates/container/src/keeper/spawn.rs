//! The agent's ways to a keeper: start one, and clear up after one that died.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::state::{self, StateError};
use crate::cgroup::{Cgroup, CgroupError};
use crate::spec::{LaunchSpec, SpecError};

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("cannot run {binary}")]
    Run { binary: PathBuf, source: io::Error },
    #[error("the keeper of {dir} did not start: {said}")]
    Refused { dir: PathBuf, said: String },
}

/// Writes `spec` into `dir` and starts its keeper, which outlives the caller. Returns when the
/// keeper accepts connections.
pub fn spawn(binary: &Path, dir: &Path, spec: &LaunchSpec) -> Result<(), SpawnError> {
    spec.save(dir)?;
    let output = Command::new(binary)
        .arg("keeper")
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|source| SpawnError::Run { binary: binary.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(SpawnError::Refused { dir: dir.to_owned(), said })
}

#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    #[error("the keeper of {dir} is alive: ask it to quit first")]
    Alive { dir: PathBuf },
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot remove {path}")]
    Remove { path: PathBuf, source: io::Error },
}

/// After a keeper is gone, however it went: ends what still runs of its container, deletes the
/// cgroup and the socket. The records, the log and the root file system stay.
pub fn clear_after_keeper(dir: &Path) -> Result<(), ClearError> {
    if state::is_keeper_alive(dir)? {
        return Err(ClearError::Alive { dir: dir.to_owned() });
    }
    let cgroup = Cgroup::open(&LaunchSpec::load(dir)?.cgroup_path())?;
    if cgroup.exists() {
        cgroup.kill_all()?;
        cgroup.delete()?;
    }
    let path = dir.join(super::SOCKET_FILE);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ClearError::Remove { path, source }),
        _ => Ok(()),
    }
}
