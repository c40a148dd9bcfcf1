//! The host's half of starting a container: cgroup, pipes, mount sources, clone, id maps.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;
use rustix::fs::{Gid, Uid};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, WaitOptions};

use super::note;
use crate::cgroup::{Cgroup, CgroupError};
use crate::init::{self, FAILED, GO, READY, START};
use crate::mounts::{self, PrepareError};
use crate::spec::LaunchSpec;
use crate::sys::{self, Cloned};

/// How long building the container's world may take, and its program's start.
pub const INIT_TIMEOUT_MS: u64 = 20_000;
/// Longest sentence taken from a failed child.
const MAX_FAILURE_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("cannot prepare the container's cgroup")]
    Cgroup(#[from] CgroupError),
    #[error("cannot prepare the container's mounts")]
    Mounts(#[from] PrepareError),
    #[error("cannot {action}")]
    Host { action: &'static str, source: io::Error },
    #[error("cannot write {path}")]
    IdMap { path: PathBuf, source: io::Error },
    #[error("inside the container: {sentence}")]
    Inside { sentence: String },
    #[error("the container's process ended before it could {action}")]
    Ended { action: &'static str },
}

fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> LaunchError {
    move |source| LaunchError::Host { action, source: source.into() }
}

/// A container's process that waits for [`start`].
pub struct Created {
    pub pid: u32,
    pub pidfd: OwnedFd,
    pub sync: UnixStream,
    pub output: OutputPipes,
    pub cgroup: Cgroup,
}

/// The keeper's ends of stdout and stderr, non-blocking, with their inode numbers.
pub struct OutputPipes {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub stdout_inode: u64,
    pub stderr_inode: u64,
}

/// Makes the two output pipes: the keeper's ends, then the program's ends (stdout, stderr),
/// owned by the container's user so that it may open /dev/stdout again.
pub fn output_pipes(spec: &LaunchSpec) -> Result<(OutputPipes, [OwnedFd; 2]), LaunchError> {
    let make = || -> Result<(OwnedFd, OwnedFd, u64), LaunchError> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(host("make a pipe"))?;
        rustix::io::ioctl_fionbio(&read, true).map_err(host("set a pipe to not block"))?;
        let owner = (spec.id_base + spec.user.uid, spec.id_base + spec.user.gid);
        rustix::fs::fchown(&write, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))
            .map_err(host("give a pipe to the container's user"))?;
        let inode = rustix::fs::fstat(&read).map_err(host("look at a pipe"))?.st_ino;
        Ok((read, write, inode))
    };
    let (stdout, stdout_write, stdout_inode) = make()?;
    let (stderr, stderr_write, stderr_inode) = make()?;
    let pipes = OutputPipes { stdout, stderr, stdout_inode, stderr_inode };
    Ok((pipes, [stdout_write, stderr_write]))
}

/// Builds the container up to the point where its program may run. On failure everything made
/// here is gone again.
pub fn create(spec: &LaunchSpec, dir: &Path) -> Result<Created, LaunchError> {
    mounts::prepare_sources(dir, spec.id_base)?;
    let cgroup = Cgroup::create(&spec.cgroup_parent, &spec.id, &spec.resources)?;
    let created = create_in(spec, dir, &cgroup);
    if created.is_err()
        && let Err(error) = cgroup.kill_all().and_then(|()| cgroup.delete())
    {
        note(&format!("cgroup {} is left behind: {error}", cgroup.path()));
    }
    created
}

fn create_in(spec: &LaunchSpec, dir: &Path, cgroup: &Cgroup) -> Result<Created, LaunchError> {
    let (output, [stdout, stderr]) = output_pipes(spec)?;
    let mounts = mounts::clone_sources(spec, dir)?;
    let (mut sync, theirs) = UnixStream::pair().map_err(host("make a socket pair"))?;
    let timeout = Some(Duration::from_millis(INIT_TIMEOUT_MS));
    sync.set_read_timeout(timeout).map_err(host("set a timeout"))?;
    // All at once: the network namespace must belong to the container's user namespace.
    let namespaces = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET;
    // SAFETY: the keeper has one thread.
    let cloned = unsafe { sys::clone_process(namespaces as u64) }.map_err(host("clone"))?;
    let (pid, pidfd) = match cloned {
        Cloned::Child => init::run(spec, init::Inherited { sync: theirs, stdout, stderr, mounts }),
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop((theirs, stdout, stderr, mounts));
    let pid = u32::try_from(pid).unwrap_or(0);
    let built = (|| {
        admit(spec, pid, cgroup)?;
        sync.write_all(&[GO]).map_err(host("talk to the container's process"))?;
        expect_ready(&mut sync)
    })();
    if let Err(error) = built {
        end(pid, &pidfd);
        return Err(error);
    }
    Ok(Created { pid, pidfd, sync, output, cgroup: cgroup.clone() })
}

/// What only the host's root can give the new process: ids, cgroup, limits.
fn admit(spec: &LaunchSpec, pid: u32, cgroup: &Cgroup) -> Result<(), LaunchError> {
    for file in ["uid_map", "gid_map"] {
        let path = PathBuf::from(format!("/proc/{pid}/{file}"));
        std::fs::write(&path, format!("0 {} {}\n", spec.id_base, spec.id_count))
            .map_err(|source| LaunchError::IdMap { path, source })?;
    }
    // Written from here so that the container cannot go below it.
    if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
        note(&format!("oom_score_adj of pid {pid} stays as it is: {error}"));
    }
    limit(pid, Resource::Nofile, spec.rlimits.nofile);
    // A core dump would be handled by the host's core pattern, outside of the container.
    limit(pid, Resource::Core, 0);
    cgroup.join(pid)?;
    Ok(())
}

/// Without the right to raise a limit the process gets as much as the keeper has.
fn limit(pid: u32, resource: Resource, value: u64) {
    let have = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let set = |value| {
        let new = Rlimit { current: Some(value), maximum: Some(value) };
        rustix::process::prlimit(process, resource, new)
    };
    if set(value).is_err()
        && let Err(error) = set(value.min(have))
    {
        note(&format!("limit {resource:?} of pid {pid} stays as it is: {error}"));
    }
}

fn expect_ready(sync: &mut UnixStream) -> Result<(), LaunchError> {
    let mut byte = [0];
    match sync.read(&mut byte) {
        Ok(1) if byte[0] == READY => Ok(()),
        Ok(1) if byte[0] == FAILED => Err(LaunchError::Inside { sentence: sentence(sync) }),
        Ok(_) => Err(LaunchError::Ended { action: "build its file systems" }),
        Err(error) => Err(host("hear from the container's process")(error)),
    }
}

/// The rest of the stream as text.
pub fn sentence(sync: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let _ = sync.take(MAX_FAILURE_BYTES).read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Lets the program run; returns when it has been executed or says why not.
pub fn start(sync: &mut UnixStream) -> Result<(), LaunchError> {
    sync.write_all(&[START]).map_err(host("talk to the container's process"))?;
    executed(sync)
}

/// The end of the stream is the exec: the child's end is closed by it.
pub fn executed(sync: &mut UnixStream) -> Result<(), LaunchError> {
    let mut byte = [0];
    match sync.read(&mut byte) {
        Ok(0) => Ok(()),
        Ok(_) => Err(LaunchError::Inside { sentence: sentence(sync) }),
        Err(error) => Err(host("hear from the container's process")(error)),
    }
}

/// Kills a child and waits for it, so that its cgroup is empty.
pub fn end(pid: u32, pidfd: &OwnedFd) {
    let _ = sys::send_signal(pidfd.as_fd(), libc::SIGKILL);
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()));
    }
}
