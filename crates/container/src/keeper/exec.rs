//! The keeper's half of running a command in its container.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open};

use super::launch::{INIT_TIMEOUT_MS, end, executed, sentence};
use super::protocol::ExecSpec;
use super::{LaunchError, fds};
use crate::cgroup::Cgroup;
use crate::init::exec::{self, Inherited, PID, Streams};
use crate::init::{FAILED, GO};
use crate::sys::{self, Cloned};

/// A running command.
pub struct Command {
    pub id: u64,
    pub pid: u32,
    pub pidfd: OwnedFd,
}

fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> LaunchError {
    move |source| LaunchError::Host { action, source: source.into() }
}

/// Runs `spec` next to the process behind `container`. Gives the command and the descriptors
/// for the agent: a terminal's master, or stdin, stdout and stderr.
pub fn start(
    id: u64,
    spec: &ExecSpec,
    container: &OwnedFd,
    cgroup: &Cgroup,
    id_base: u32,
) -> Result<(Command, Vec<OwnedFd>), LaunchError> {
    let (mut sync, theirs) = UnixStream::pair().map_err(host("make a socket pair"))?;
    let timeout = Some(Duration::from_millis(INIT_TIMEOUT_MS));
    sync.set_read_timeout(timeout).map_err(host("set a timeout"))?;
    let container = container.try_clone().map_err(host("copy a descriptor"))?;
    let (streams, ours) = match spec.tty {
        Some(size) => (Streams::Terminal(size), Vec::new()),
        None => {
            let ((stdin, a), (b, stdout), (c, stderr)) = (pipe()?, pipe()?, pipe()?);
            for fd in [&stdin, &stdout, &stderr] {
                let owner = (id_base + spec.user.uid, id_base + spec.user.gid);
                let (uid, gid) = (rustix::fs::Uid::from_raw(owner.0), rustix::fs::Gid::from_raw(owner.1));
                rustix::fs::fchown(fd, Some(uid), Some(gid)).map_err(host("give a pipe to the container's user"))?;
            }
            (Streams::Pipes([stdin, stdout, stderr]), vec![a, b, c])
        }
    };
    let inherited = Inherited { sync: theirs, container, cgroup: cgroup.clone(), streams };
    // SAFETY: the keeper has one thread.
    let messenger = match unsafe { sys::clone_process(0) }.map_err(host("fork"))? {
        Cloned::Child => exec::run(spec, inherited),
        Cloned::Parent { pid, pidfd } => (u32::try_from(pid).unwrap_or(0), pidfd),
    };
    drop(inherited);
    let announced = announced_pid(&mut sync);
    if announced.is_err() {
        end(messenger.0, &messenger.1);
    } else if let Some(pid) = i32::try_from(messenger.0).ok().and_then(Pid::from_raw) {
        // It exits right after its announcement.
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()));
    }
    let pid = announced?;
    let command = Pid::from_raw(i32::try_from(pid).unwrap_or(0))
        .ok_or(LaunchError::Ended { action: "run the command" })
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(host("watch the command")));
    let pidfd = command?;
    match connect(&mut sync, spec) {
        Ok(terminal) => {
            let ours = terminal.map_or(ours, |master| vec![master]);
            Ok((Command { id, pid, pidfd }, ours))
        }
        Err(error) => {
            end(pid, &pidfd);
            Err(error)
        }
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), LaunchError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(host("make a pipe"))
}

fn announced_pid(sync: &mut UnixStream) -> Result<u32, LaunchError> {
    let mut byte = [0];
    match sync.read(&mut byte).map_err(host("hear from the command's process"))? {
        1 if byte[0] == PID => {}
        1 if byte[0] == FAILED => return Err(LaunchError::Inside { sentence: sentence(sync) }),
        _ => return Err(LaunchError::Ended { action: "join the container" }),
    }
    let mut pid = [0; 4];
    sync.read_exact(&mut pid).map_err(host("hear from the command's process"))?;
    Ok(u32::from_le_bytes(pid))
}

/// Lets the command go on and waits until it is executed.
fn connect(sync: &mut UnixStream, spec: &ExecSpec) -> Result<Option<OwnedFd>, LaunchError> {
    sync.write_all(&[GO]).map_err(host("talk to the command's process"))?;
    let mut byte = [0];
    let (count, mut fds) = fds::receive(&*sync, &mut byte).map_err(host("hear from the command's process"))?;
    if count == 1 && byte[0] == FAILED {
        return Err(LaunchError::Inside { sentence: sentence(sync) });
    }
    if count == 0 || (spec.tty.is_some() && fds.is_empty()) {
        return Err(LaunchError::Ended { action: "run the command" });
    }
    executed(sync)?;
    Ok(fds.pop())
}
