//! How the process is started: away from the agent's signals, with nothing of the agent but a socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::libc;

use super::CONTROL;
use crate::filler::FillError;

/// `KCMP_FILE` (linux/kcmp.h)
const KCMP_FILE: libc::c_int = 0;

/// A started process.
pub(super) struct Started {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub control: UnixStream,
}

fn process(doing: &'static str) -> impl FnOnce(io::Error) -> FillError {
    move |source| FillError::Process { doing, source }
}

/// Starts it. It is waited for by a thread, whether or not anybody looks at it: forking twice instead would leave the
/// zombie to the nearest reaper, which is the agent itself where it adopts restored containers.
pub(super) fn start(mut command: Command) -> Result<Started, FillError> {
    let (control, theirs) = UnixStream::pair().map_err(process("its socket could not be made"))?;
    let (socket, agent) = (theirs.as_raw_fd(), std::process::id());
    // Made here, not in the child, where only system calls are allowed.
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(process("/dev/null could not be opened"))?;
    let null_fd = null.as_raw_fd();
    // SAFETY: between fork and exec the closure makes plain system calls only.
    unsafe { command.pre_exec(move || prepare(socket, null_fd, agent)) };
    let mut child = command.spawn().map_err(process("it could not be started"))?;
    drop(theirs);
    let pid = child.id().cast_signed();
    let pidfd = match watch(&child) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
    };
    let reaper = std::thread::Builder::new().name("godwit-reaper".to_owned()).stack_size(64 << 10);
    let reap = reaper.spawn(move || child.wait());
    if let Err(source) = reap {
        // Its zombie stays until we end; the process itself must not.
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        return Err(FillError::Thread(source));
    }
    Ok(Started { pid, pidfd, control })
}

fn watch(child: &Child) -> Result<OwnedFd, FillError> {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
    pidfd.map_err(|e| process("it cannot be watched")(e.into()))
}

/// In the child.
fn prepare(socket: RawFd, null: RawFd, agent: u32) -> io::Result<()> {
    // SAFETY: plain system calls on descriptors of this process, which is a copy that nobody else uses.
    unsafe {
        if libc::setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        for standard in 0..3 {
            // What the caller has not set is the agent's own: a terminal or a pipe whose reader waits for its end.
            let (us, them) = (libc::getpid(), agent.cast_signed());
            if libc::syscall(libc::SYS_kcmp, us, them, KCMP_FILE, standard, standard) == 0
                && libc::dup2(null, standard) < 0
            {
                return Err(io::Error::last_os_error());
            }
        }
        let moved =
            if socket == CONTROL { libc::fcntl(CONTROL, libc::F_SETFD, 0) } else { libc::dup2(socket, CONTROL) };
        if moved < 0 {
            return Err(io::Error::last_os_error());
        }
        // It may live long after the agent: nothing of the agent's stays open in it. A kernel without the call leaves
        // what was opened without O_CLOEXEC.
        let first = (CONTROL + 1).cast_unsigned();
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    Ok(())
}

impl Started {
    /// Kills it and waits until it is gone, `limit_ms` milliseconds at most.
    pub(super) fn kill(&self, limit_ms: i64) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        let limit = rustix::time::Timespec { tv_sec: limit_ms / 1000, tv_nsec: limit_ms % 1000 * 1_000_000 };
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(self.pidfd.as_fd(), rustix::event::PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&limit));
    }
}
