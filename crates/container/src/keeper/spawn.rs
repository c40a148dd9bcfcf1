//! The agent's ways to a keeper: start one, and clear up after one that died.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::state::{self, StateError};
use crate::cgroup::{Cgroup, CgroupError};
use crate::spec::{LaunchSpec, SpecError};

/// In a keeper's environment, and in that of what it starts on the host: its directory. A container's own processes do
/// not have it.
const MARK: &str = "GODWIT_KEEPER";
/// Looks for processes of a keeper that is gone; each may have made others before it was ended.
const MAX_LOOKS: usize = 8;
/// A killed process is gone within this time, in seconds.
const END_TIMEOUT_S: i64 = 5;

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
/// keeper accepts connections. `lease`: the file by which its container stands still, see [`super::fence`].
pub fn spawn(binary: &Path, dir: &Path, spec: &LaunchSpec, lease: Option<&Path>) -> Result<(), SpawnError> {
    spec.save(dir)?;
    let lease: Vec<&std::ffi::OsStr> = lease.iter().flat_map(|file| ["--lease".as_ref(), file.as_os_str()]).collect();
    let output = Command::new(binary)
        .arg("keeper")
        .arg("--dir")
        .arg(dir)
        .args(lease)
        .env(MARK, dir)
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

/// Ends what a keeper that is gone has left among `keepers`, the cgroup that all keepers of a host share: a criu that was
/// killed in the middle of a restore leaves helpers and half-made processes, which wait for it. The keeper itself, if it
/// is still ending, is left alone.
///
/// Errors: the cgroup cannot be read; processes are left after some looks.
pub fn end_leftovers(dir: &Path, keepers: &Cgroup) -> Result<(), CgroupError> {
    let mark = [MARK.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
    let keeper = state::read_state(dir).ok().flatten().map(|state| state.keeper_pid);
    let is_left = |pid: u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        Some(pid) != keeper && environment.split(|byte| *byte == 0).any(|variable| variable == mark)
    };
    for _ in 0..MAX_LOOKS {
        let open =
            |pid: u32| pidfd_open(Pid::from_raw(pid.cast_signed())?, PidfdFlags::empty()).ok().map(|fd| (pid, fd));
        let left: Vec<_> = keepers.pids()?.into_iter().filter(|pid| is_left(*pid)).filter_map(open).collect();
        // Again, now that the number cannot become another's.
        let left: Vec<_> = left.into_iter().filter(|(pid, _)| is_left(*pid)).collect();
        if left.is_empty() {
            return Ok(());
        }
        for (_, pidfd) in &left {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        for (_, pidfd) in &left {
            let limit = Timespec { tv_sec: END_TIMEOUT_S, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit));
        }
    }
    let timeout_ms = END_TIMEOUT_S.unsigned_abs() * 1000;
    Err(CgroupError::Timeout { path: keepers.path().to_owned(), wanted: "without what a keeper left", timeout_ms })
}
