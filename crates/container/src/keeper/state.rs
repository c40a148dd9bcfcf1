//! What a keeper writes down about its container, and whether a keeper is there.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub const STATE_FILE: &str = "state.json";
pub const EXIT_FILE: &str = "exit.json";
/// Locked by the keeper as long as it lives.
pub const LOCK_FILE: &str = "keeper.lock";

/// Largest of these files that is read.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The keeper is there, nothing else.
    New,
    /// The world is built, the program waits.
    Created,
    Running,
    /// CRIU is at work.
    Restoring,
    /// Everything is restored and waits for the agent's word.
    Restored,
    Exited,
}

/// `state.json`, and the answer to a status request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub phase: Phase,
    pub keeper_pid: u32,
    /// Clock ticks after boot (proc_pid_stat(5)); names the process together with its id.
    pub keeper_start_ticks: u64,
    pub pid: Option<u32>,
    pub pid_start_ticks: Option<u64>,
    pub created_unix_ms: Option<u64>,
    pub started_unix_ms: Option<u64>,
    /// Inode numbers N of `pipe:[N]` that are the program's stdout and stderr.
    pub stdout_pipe: Option<u64>,
    pub stderr_pipe: Option<u64>,
    /// Commands running by exec; while there is one the container cannot move.
    pub execs: u32,
    /// Output that could not be written to the log.
    pub log_lost_bytes: u64,
    pub cgroup: String,
    pub exit: Option<Exit>,
    /// It stands still when the host's lease ends. Keepers of earlier versions do not.
    #[serde(default)]
    pub guarded: bool,
    /// The host's lease has ended, and the container stands still for it.
    #[serde(default)]
    pub fenced: bool,
}

/// `exit.json`: how a process ended; one of `code` and `signal` is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// The kernel killed a process of the container for want of memory.
    pub oom_killed: bool,
    pub finished_at_unix_ms: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is damaged")]
    Parse { path: PathBuf, source: serde_json::Error },
}

/// What the last keeper of `dir` wrote; `None` when there never was one.
pub fn read_state(dir: &Path) -> Result<Option<State>, StateError> {
    read_json(&dir.join(STATE_FILE))
}

/// How the container ended; `None` when it has not, or nobody was there to see it.
pub fn read_exit(dir: &Path) -> Result<Option<Exit>, StateError> {
    read_json(&dir.join(EXIT_FILE))
}

/// True while a keeper holds the directory.
pub fn is_keeper_alive(dir: &Path) -> Result<bool, StateError> {
    let path = dir.join(LOCK_FILE);
    let lock = match File::open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(StateError::Read { path, source }),
    };
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(StateError::Read { path, source: error.into() }),
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    use std::io::Read;
    let failed = |source| StateError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(failed)?;
    serde_json::from_slice(&text).map(Some).map_err(|source| StateError::Parse { path: path.to_owned(), source })
}

/// Writes a file so that a reader sees the old or the new content and a crash loses neither.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let temporary = path.with_extension("json.new");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.sync_data()?;
    std::fs::rename(&temporary, path)
}

pub(crate) fn unix_ms_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
