//! What runs in a container's process between clone and exec.
//!
//! The keeper has one thread, so the child may allocate and use files like any program. It
//! talks to the keeper over one socket: the keeper writes [`GO`] when identities and cgroup are
//! set, the child writes [`READY`] when its world is built, the keeper writes [`START`] when the
//! program may run. A failure is written as [`FAILED`] and a sentence; success of the exec shows
//! as the end of the stream.

pub mod exec;
pub mod files;
pub mod identity;

use std::ffi::{CString, OsStr};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::mounts::Detached;
use crate::spec::LaunchSpec;
use crate::{seccomp, sys};

pub const GO: u8 = b'g';
pub const READY: u8 = b'r';
pub const START: u8 = b's';
pub const FAILED: u8 = b'!';

/// Exit codes of a child that could not become the program, as shells use them.
const EXIT_NOT_FOUND: i32 = 127;
const EXIT_NOT_STARTED: i32 = 126;

/// What failed in the child, as a sentence for the keeper.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("{action}: {source}")]
    Step { action: String, source: io::Error },
    #[error("no program {program:?} in the container")]
    NoProgram { program: String },
}

impl InitError {
    /// For `map_err`: names the step that failed.
    pub fn at<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> InitError {
        let action = action.into();
        move |source| InitError::Step { action, source: source.into() }
    }

    fn exit_code(&self) -> i32 {
        match self {
            InitError::NoProgram { .. } => EXIT_NOT_FOUND,
            InitError::Step { .. } => EXIT_NOT_STARTED,
        }
    }
}

/// Everything the child takes from the keeper.
pub struct Inherited {
    pub sync: UnixStream,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub mounts: Vec<Detached>,
}

/// Becomes the container's program; returns never.
pub fn run(spec: &LaunchSpec, inherited: Inherited) -> ! {
    let Inherited { mut sync, stdout, stderr, mounts } = inherited;
    let error = match become_program(spec, &mut sync, [stdout, stderr], mounts) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    report(&mut sync, &error);
    sys::exit_now(error.exit_code())
}

/// Tells the keeper what failed; if it is gone there is nobody to tell.
fn report(sync: &mut UnixStream, error: &InitError) {
    let mut message = vec![FAILED];
    message.extend_from_slice(error.to_string().as_bytes());
    let _ = sync.write_all(&message);
}

fn become_program(
    spec: &LaunchSpec,
    sync: &mut UnixStream,
    [stdout, stderr]: [OwnedFd; 2],
    mounts: Vec<Detached>,
) -> Result<std::convert::Infallible, InitError> {
    let mut keep = vec![sync.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()];
    keep.extend(mounts.iter().map(|mount| mount.tree.as_raw_fd()));
    // The keeper's listener, log files and connection are not the container's.
    sys::close_all_except(3, &keep).map_err(InitError::at("close the keeper's files"))?;
    sys::reset_signals().map_err(InitError::at("reset signals"))?;
    expect(sync, GO)?;

    rustix::process::setsid().map_err(InitError::at("start a process session"))?;
    sys::new_session_keyring().map_err(InitError::at("start a keyring"))?;
    // The caller is in the container's cgroup by now, so it becomes the namespace's root.
    sys::new_cgroup_namespace().map_err(InitError::at("make the cgroup namespace"))?;
    rustix::system::sethostname(spec.hostname.as_bytes()).map_err(InitError::at("set the host name"))?;
    sys::loopback_up().map_err(InitError::at("bring the loopback interface up"))?;
    files::build(spec, mounts)?;
    // Standard input is opened inside so that it can be found again inside after a move.
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())
        .map_err(InitError::at("open /dev/null"))?;
    for (fd, target) in [(null.as_fd(), 0), (stdout.as_fd(), 1), (stderr.as_fd(), 2)] {
        sys::make_standard_stream(fd, target).map_err(InitError::at("connect standard streams"))?;
    }
    sync.write_all(&[READY]).map_err(InitError::at("report to the keeper"))?;

    expect(sync, START)?;
    enter_directory(&spec.cwd)?;
    identity::restrict(&spec.user)?;
    // Credentials changed for the last time, so the kernel keeps this now.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(InitError::at("tie the container to its keeper"))?;
    if keeper_gone(sync) {
        sys::exit_now(EXIT_NOT_STARTED);
    }
    execute(&spec.argv, &spec.env)
}

/// Waits for one byte; the end of the stream means that the keeper is gone, and then the
/// container must go too.
fn expect(sync: &mut UnixStream, wanted: u8) -> Result<(), InitError> {
    let mut byte = [0];
    match sync.read_exact(&mut byte) {
        Ok(()) if byte[0] == wanted => Ok(()),
        Ok(()) => Err(InitError::Step {
            action: "wait for the keeper".into(),
            source: io::Error::other(format!("unexpected message {:#x}", byte[0])),
        }),
        Err(_) => sys::exit_now(EXIT_NOT_STARTED),
    }
}

/// The keeper may have died between its last message and the death signal being set.
fn keeper_gone(sync: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(sync, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(ready) if ready > 0)
}

/// An absent working directory is made, as container engines do.
fn enter_directory(cwd: &str) -> Result<(), InitError> {
    let entered = match std::env::set_current_dir(cwd) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(cwd).and_then(|()| std::env::set_current_dir(cwd))
        }
        other => other,
    };
    entered.map_err(InitError::at(format!("enter working directory {cwd}")))
}

/// The last steps, the same for the container's program and for commands run in it later.
pub fn execute(argv: &[String], env: &[String]) -> Result<std::convert::Infallible, InitError> {
    let invalid = |text: &str| InitError::at(format!("pass {text:?}"))(io::Error::from(io::ErrorKind::InvalidInput));
    let c_strings = |all: &[String]| -> Result<Vec<CString>, InitError> {
        all.iter().map(|text| CString::new(text.as_str()).map_err(|_| invalid(text))).collect()
    };
    let (arguments, environment) = (c_strings(argv)?, c_strings(env)?);
    let program = find_program(argv, env)?;
    let path = CString::new(program.as_os_str().as_bytes()).map_err(|_| invalid("program"))?;
    let filter = seccomp::program();
    sys::close_on_exec_from(3).map_err(InitError::at("close files"))?;
    // Last: the filter refuses much of what came before.
    rustix::thread::set_no_new_privs(true).map_err(InitError::at("set no_new_privs"))?;
    sys::install_seccomp(&filter).map_err(InitError::at("install the system call filter"))?;
    match nix::unistd::execve(&path, &arguments, &environment) {
        Ok(never) => match never {},
        Err(errno) => Err(InitError::at(format!("run {}", program.display()))(errno)),
    }
}

/// As execvp(3) does, with the container's PATH.
fn find_program(argv: &[String], env: &[String]) -> Result<PathBuf, InitError> {
    const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let name = argv.first().map(String::as_str).unwrap_or_default();
    if name.contains('/') {
        return match Path::new(name).exists() {
            true => Ok(PathBuf::from(name)),
            false => Err(InitError::NoProgram { program: name.to_owned() }),
        };
    }
    let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let executable =
        |candidate: &PathBuf| candidate.is_file() && rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok();
    path.split(':')
        .filter(|dir| !dir.is_empty())
        .map(|dir| Path::new(OsStr::new(dir)).join(name))
        .find(executable)
        .ok_or_else(|| InitError::NoProgram { program: name.to_owned() })
}
