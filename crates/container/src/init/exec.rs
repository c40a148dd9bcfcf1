//! A command started in a running container: join its cgroup and namespaces, then the same
//! restrictions as its program.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::libc;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::tcsetwinsize;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::{EXIT_NOT_STARTED, GO, InitError, READY, enter_directory, execute, expect, identity, report};
use crate::cgroup::Cgroup;
use crate::keeper::fds;
use crate::keeper::protocol::{ExecSpec, WindowSize};
use crate::sys::{self, Cloned};

/// Announces the command's process id, which follows in four bytes, little-endian.
pub const PID: u8 = b'p';

/// Standard streams of a command: pipes made by the keeper, or a terminal made inside.
pub enum Streams {
    Pipes([OwnedFd; 3]),
    Terminal(WindowSize),
}

/// Everything the child takes from the keeper.
pub struct Inherited {
    pub sync: UnixStream,
    /// Of the container's pid 1.
    pub container: OwnedFd,
    pub cgroup: Cgroup,
    pub streams: Streams,
}

/// Joins the container and becomes the parent's messenger: the command itself is cloned as the
/// keeper's child, so that the keeper reaps it. Returns never.
pub fn run(spec: &ExecSpec, inherited: Inherited) -> ! {
    let Inherited { mut sync, container, cgroup, streams } = inherited;
    match join_and_start(spec, &mut sync, container, &cgroup, streams) {
        Ok(pid) => {
            let mut message = vec![PID];
            message.extend_from_slice(&pid.to_le_bytes());
            let sent = sync.write_all(&message).is_ok();
            sys::exit_now(if sent { 0 } else { EXIT_NOT_STARTED })
        }
        Err(error) => {
            report(&mut sync, &error);
            sys::exit_now(error.exit_code())
        }
    }
}

fn join_and_start(
    spec: &ExecSpec,
    sync: &mut UnixStream,
    container: OwnedFd,
    cgroup: &Cgroup,
    streams: Streams,
) -> Result<i32, InitError> {
    let mut keep = vec![sync.as_raw_fd(), container.as_raw_fd()];
    if let Streams::Pipes(pipes) = &streams {
        keep.extend(pipes.iter().map(AsRawFd::as_raw_fd));
    }
    sys::close_all_except(3, &keep).map_err(InitError::at("close the keeper's files"))?;
    sys::reset_signals().map_err(InitError::at("reset signals"))?;
    identity::hide_from_container()?;
    sys::new_session_keyring().map_err(InitError::at("start a keyring"))?;
    // Best effort: a keeper that could lower its own value may raise it again.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    cgroup.join(std::process::id()).map_err(|error| InitError::Step {
        action: "join the container's cgroup".into(),
        source: std::io::Error::other(error),
    })?;
    // Of time too: a container that was moved has clocks of its own, set back to what they were at the freeze.
    let all = ThreadNameSpaceType::from_bits_retain(
        (libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWTIME) as u32,
    );
    move_into_thread_name_spaces(container.as_fd(), all).map_err(InitError::at("join the container's namespaces"))?;
    drop(container);
    // The pid namespace holds for children only, hence one more process.
    // SAFETY: this process has one thread.
    match unsafe { sys::clone_process(libc::CLONE_PARENT as u64) } {
        Ok(Cloned::Parent { pid, .. }) => Ok(pid),
        Ok(Cloned::Child) => {
            let error = match become_command(spec, sync, streams) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            report(sync, &error);
            sys::exit_now(error.exit_code())
        }
        Err(source) => Err(InitError::Step { action: "start a process".into(), source }),
    }
}

fn become_command(
    spec: &ExecSpec,
    sync: &mut UnixStream,
    streams: Streams,
) -> Result<std::convert::Infallible, InitError> {
    expect(sync, GO)?;
    rustix::process::setsid().map_err(InitError::at("start a process session"))?;
    identity::become_root_inside()?;
    let connect = |fd: &OwnedFd, target| {
        sys::make_standard_stream(fd.as_fd(), target).map_err(InitError::at("connect standard streams"))
    };
    match streams {
        Streams::Pipes(pipes) => {
            for (fd, target) in pipes.iter().zip(0..) {
                connect(fd, target)?;
            }
            sync.write_all(&[READY]).map_err(InitError::at("report to the keeper"))?;
        }
        Streams::Terminal(size) => {
            let (master, slave) = open_terminal(size, spec.user.uid)?;
            sys::take_terminal(&slave).map_err(InitError::at("take the terminal"))?;
            for target in 0..3 {
                connect(&slave, target)?;
            }
            fds::send(sync, &[READY], &[master.as_fd()]).map_err(InitError::at("hand the terminal over"))?;
        }
    }
    enter_directory(&spec.cwd)?;
    identity::restrict(&spec.user)?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(InitError::at("tie the command to its keeper"))?;
    execute(&spec.argv, &spec.env)
}

/// A terminal of the container's own devpts; by its mount, which the container cannot replace.
fn open_terminal(size: WindowSize, uid: u32) -> Result<(OwnedFd, OwnedFd), InitError> {
    let failed = || InitError::at("open a terminal");
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()).map_err(failed())?;
    unlockpt(&master).map_err(failed())?;
    let slave =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(failed())?;
    let size = rustix::termios::Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&master, size).map_err(failed())?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None).map_err(failed())?;
    Ok((master, slave))
}
