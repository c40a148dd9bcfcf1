//! The keeper: one small process with one thread per container. It is the parent of the
//! container's pid 1, holds its output, and knows how it ended, whatever happens to the agent.
//!
//! Invariants: the keeper never starts a thread; it never blocks on the agent; it lives until
//! its container has ended and that is written down.

pub mod client;
mod connection;
mod exec;
pub mod fds;
pub mod fence;
mod launch;
pub mod protocol;
mod restore;
mod run;
pub mod spawn;
pub mod state;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::fs::{FlockOperation, flock};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::cgroup::{Cgroup, CgroupError};
use crate::spec::{LaunchSpec, SpecError};
use crate::sys::{self, Cloned};

pub use launch::LaunchError;

pub const SOCKET_FILE: &str = "keeper.sock";
pub const OWN_LOG_FILE: &str = "keeper.log";
/// The agents' and containers' memory is to be taken before a keeper's.
const OOM_SCORE_ADJ: &str = "-900";

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("cannot {action} {path}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("another keeper holds {path}: end it first")]
    Held { path: PathBuf },
    #[error("cannot {action}")]
    Process { action: &'static str, source: io::Error },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("cannot move the keeper into its cgroup")]
    Cgroup(#[from] CgroupError),
}

fn process<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> KeeperError {
    move |source| KeeperError::Process { action, source: source.into() }
}

/// Entry point of `godwit keeper --dir DIR`, to be called before any thread exists. Detaches
/// itself and returns 0 in the calling process once the keeper listens on `dir/keeper.sock`,
/// 1 with a message on stderr when it could not.
/// `lease`: the file that says until when the container may run, see [`fence`].
pub fn keeper_main(dir: &Path, lease: Option<&Path>) -> i32 {
    match detach(dir, lease) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("godwit keeper: {}", chain(&error));
            1
        }
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A line for `keeper.log`.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{:.3} {text}", jiff::Timestamp::now());
}

/// Takes the directory, forks twice and waits for the grandchild's word that it listens.
fn detach(dir: &Path, lease: Option<&Path>) -> Result<i32, KeeperError> {
    sys::close_all_except(3, &[]).map_err(process("close inherited files"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    std::env::set_current_dir(dir).map_err(|source| KeeperError::File {
        action: "enter",
        path: dir.to_owned(),
        source,
    })?;
    let dir = std::env::current_dir().map_err(process("learn the directory's path"))?;
    let lock = take_lock(&dir)?;
    let spec = LaunchSpec::load(&dir)?;
    if let Some(path) = &spec.keeper_cgroup {
        Cgroup::ensure(path)?.join(std::process::id())?;
    }
    let (ready, tell_ready) = pipe_with(PipeFlags::CLOEXEC).map_err(process("make a pipe"))?;
    // SAFETY: the caller promises that no thread was started.
    match unsafe { sys::clone_process(0) }.map_err(process("fork"))? {
        Cloned::Parent { .. } => {
            drop(tell_ready);
            let mut byte = [0];
            let told = File::from(ready).read(&mut byte).map_err(process("wait for the keeper"))?;
            if told == 0 {
                let path = dir.join(OWN_LOG_FILE);
                let why = io::Error::other(format!("it ended early, see {}", path.display()));
                return Err(process("start the keeper")(why));
            }
            Ok(0)
        }
        Cloned::Child => {
            drop(ready);
            let result = become_keeper(&dir, spec, lease, lock, File::from(tell_ready));
            if let Err(error) = &result {
                note(&chain(error));
            }
            sys::exit_now(i32::from(result.is_err()))
        }
    }
}

/// The lock is shared with the processes forked from here on and ends with the last of them
/// that has not closed it: a container's process closes it first of all.
fn take_lock(dir: &Path) -> Result<File, KeeperError> {
    let path = dir.join(state::LOCK_FILE);
    let failed = |action| {
        let path = path.clone();
        move |source| KeeperError::File { action, path, source }
    };
    let lock = OpenOptions::new().create(true).append(true).open(&path).map_err(failed("open"))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(KeeperError::Held { path }),
        Err(error) => Err(failed("lock")(error.into())),
    }
}

fn become_keeper(
    dir: &Path,
    spec: LaunchSpec,
    lease: Option<&Path>,
    lock: File,
    mut tell_ready: File,
) -> Result<(), KeeperError> {
    rustix::process::setsid().map_err(process("start a process session"))?;
    // Not a session leader, so that no terminal can become its own.
    // SAFETY: this process has one thread.
    if let Cloned::Parent { .. } = unsafe { sys::clone_process(0) }.map_err(process("fork"))? {
        sys::exit_now(0);
    }
    redirect_own_output(dir)?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        note(&format!("the keeper is not protected from memory shortage: {error}"));
    }
    // What is meant for the agent's process group or unit must not reach the container.
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGPIPE] {
        let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
        // SAFETY: ignoring installs no handler code.
        unsafe { sigaction(signal, &ignore) }.map_err(process("ignore signals"))?;
    }
    let listener = listen(dir)?;
    let mut keeper = run::Keeper::new(dir, spec, listener, lease.map(Path::to_owned))?;
    tell_ready.write_all(b"r").map_err(process("report to the agent"))?;
    drop(tell_ready);
    let result = keeper.run();
    let _ = std::fs::remove_file(dir.join(SOCKET_FILE));
    drop(lock);
    result
}

fn redirect_own_output(dir: &Path) -> Result<(), KeeperError> {
    let path = dir.join(OWN_LOG_FILE);
    let failed = |source| KeeperError::File { action: "open", path: path.clone(), source };
    let log = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
    let null = OpenOptions::new().read(true).open("/dev/null").map_err(failed)?;
    for (fd, target) in [(null.as_fd(), 0), (log.as_fd(), 1), (log.as_fd(), libc::STDERR_FILENO)] {
        sys::make_standard_stream(fd, target).map_err(process("redirect standard streams"))?;
    }
    Ok(())
}

/// By relative name: the full path may be longer than a socket address can be.
fn listen(dir: &Path) -> Result<UnixListener, KeeperError> {
    let failed = |source| KeeperError::File { action: "listen on", path: dir.join(SOCKET_FILE), source };
    match std::fs::remove_file(SOCKET_FILE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(SOCKET_FILE).map_err(failed)?;
    rustix::fs::chmod(SOCKET_FILE, rustix::fs::Mode::from_raw_mode(0o600)).map_err(|e| failed(e.into()))?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
