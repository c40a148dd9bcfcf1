//! A user namespace without a user: the kernel takes the id map of an idmapped mount from one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::libc;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions};

use crate::sys::{self, Cloned};

#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    #[error("cannot start its process")]
    Clone { source: io::Error },
    #[error("cannot write {path}")]
    Map { path: PathBuf, source: io::Error },
    #[error("cannot open {path}")]
    Open { path: PathBuf, source: io::Error },
}

/// A user namespace that maps ids 0 to `count` - 1 to `base` and up. Its process ends before
/// this returns; the descriptor keeps the namespace.
pub fn user_namespace(base: u32, count: u32) -> Result<OwnedFd, UserNamespaceError> {
    let clone_failed = |source: io::Error| UserNamespaceError::Clone { source };
    let (wait, release) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| clone_failed(error.into()))?;
    let (wait_raw, release_raw) = (wait.as_raw_fd(), release.as_raw_fd());
    // SAFETY: the agent has threads, so the child makes bare system calls only: it asks to end with
    // its parent, waits for a byte, exits.
    let cloned = unsafe { sys::clone_process(libc::CLONE_NEWUSER as u64) }.map_err(clone_failed)?;
    let pid = match cloned {
        Cloned::Child => {
            let mut byte = 0u8;
            // SAFETY: descriptors and buffer are this process' own copies; no allocation.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(release_raw);
                libc::read(wait_raw, (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        Cloned::Parent { pid, .. } => pid,
    };
    let namespace = map_and_open(pid, base, count);
    // A byte and not the end of the pipe: a child that another thread has cloned meanwhile holds a copy of the write end,
    // and this one may hold a copy of that one's.
    let _ = rustix::io::retry_on_intr(|| rustix::io::write(&release, &[1]));
    drop(release);
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()));
    }
    namespace
}

fn map_and_open(pid: i32, base: u32, count: u32) -> Result<OwnedFd, UserNamespaceError> {
    for file in ["uid_map", "gid_map"] {
        let path = PathBuf::from(format!("/proc/{pid}/{file}"));
        std::fs::write(&path, format!("0 {base} {count}\n"))
            .map_err(|source| UserNamespaceError::Map { path, source })?;
    }
    let path = PathBuf::from(format!("/proc/{pid}/ns/user"));
    match File::open(&path) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(UserNamespaceError::Open { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Children that are cloned at the same time hold copies of each other's pipes; none may wait for another.
    #[test]
    fn many_at_once_do_not_wait_for_each_other() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let threads: Vec<_> = (0..8)
            .map(|_| std::thread::spawn(|| (0..25).for_each(|_| drop(user_namespace(1_048_576, 65_536).unwrap()))))
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
