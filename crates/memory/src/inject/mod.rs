//! One thread of a process is borrowed to make a userfaultfd: a userfaultfd belongs to the address space of who
//! makes it, and there is no other way to have one for somebody else (userfaultfd(2)).
//!
//! The thread makes two system calls, `userfaultfd` and `close`, with the instruction the vdso has for that; no byte
//! of the process is written. In between the descriptor is copied out with pidfd_getfd(2). What is kept as it was:
//!
//! - **Registers**, all of them.
//! - **A system call the thread was in.** It was interrupted with ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND or
//!   ERESTART_RESTARTBLOCK in its result register. The kernel turns these into a restart only on its way out of a
//!   signal stop. So the thread is stopped like that once more before the registers go back, and the kernel does the
//!   rest: nanosleep(2) sleeps what was left. epoll_wait(2) and some others return EINTR whenever a thread is stopped
//!   (signal(7)); unless a signal is due, they are called again, with their whole time limit.
//! - **Signals.** All are blocked meanwhile and stay pending; the mask goes back with the registers. A mask that
//!   ppoll(2) and its like had replaced is put in place again by their restart.
//! - **Restartable sequences.** A thread inside one goes on at its abort address, as after any preemption.
//! - **Stopped processes** (SIGSTOP) are stopped again by the kernel when the thread is let go.
//!
//! Other threads run on. What a reader must not do meanwhile: wait for any child (waitpid(-1)) in this process.

#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod arch;
#[cfg(not(target_arch = "x86_64"))]
#[path = "unsupported.rs"]
mod arch;
mod borrow;
mod rseq;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::libc;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use thiserror::Error;

use crate::maps::Mapping;
use crate::sys::uffd::{USER_MODE_ONLY, Userfaultfd};
use borrow::Borrowed;

/// How long a thread may take to stop, in milliseconds: a CPU limit can hold it back for 100. One that waits
/// uninterruptibly does not stop.
const STOP_TIMEOUT_MS: u64 = 200;
/// Threads that are tried, one after the other.
const THREADS_TRIED: usize = 4;
/// How long the two calls may take, in milliseconds; they take some tens of microseconds unless the process is frozen.
const CALL_TIMEOUT_MS: u64 = 1_000;
/// How much of a mapping is searched for the instruction, in bytes.
const SEARCH_BYTES: u64 = 1 << 20;

/// Why no userfaultfd could be made for a process. Its pages are then always "to be sent", never lost.
#[derive(Debug, Error)]
pub enum InjectError {
    #[error("written pages cannot be tracked on this processor architecture yet")]
    Architecture,
    #[error("process {pid} is gone")]
    Gone { pid: i32 },
    #[error(
        "process {pid} runs a 32-bit program or turns system calls into signals; its written pages are not tracked"
    )]
    Foreign { pid: i32 },
    #[error("no thread of process {pid} could be stopped within {ms} ms; is it frozen, or does it wait for a disk?")]
    NotStopping { pid: i32, ms: u64 },
    #[error("process {pid} was frozen in the middle; it goes on untouched when it is thawed")]
    Frozen { pid: i32 },
    #[error("no system call instruction was found in process {pid}")]
    NoInstruction { pid: i32 },
    #[error("process {pid} could not make a userfaultfd")]
    Refused {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("{doing} process {pid}")]
    Kernel {
        doing: &'static str,
        pid: i32,
        #[source]
        source: io::Error,
    },
}

/// A userfaultfd of process `pid`'s address space, and how long the borrowed thread stood still. `mappings` are the
/// process's.
pub(crate) fn userfaultfd(pid: i32, mappings: &[Mapping]) -> Result<(Userfaultfd, Duration), InjectError> {
    if !arch::SUPPORTED {
        return Err(InjectError::Architecture);
    }
    let instruction = find_instruction(pid, mappings)?;
    let pidfd = Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|p| rustix::process::pidfd_open(p, PidfdFlags::empty()))
        .map_err(|e| kernel("opening", pid, e.into()))?;
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    // A thread of its own: the kernel lets go of what it traces when it ends, whatever happens. Where a process is
    // frozen in the middle the thread outlives this call: it must put the registers back after the thaw.
    std::thread::Builder::new()
        .name("godwit-inject".to_owned())
        .spawn(move || {
            // The thread that is borrowed stands still while this one waits for a processor.
            crate::sys::ptrace::run_first();
            let _ = sender.send(on_any_thread(pid, instruction, &pidfd));
        })
        .map_err(|e| kernel("starting a thread for", pid, e))?;
    let limit = Duration::from_millis(STOP_TIMEOUT_MS * THREADS_TRIED as u64 + CALL_TIMEOUT_MS);
    receiver.recv_timeout(limit).unwrap_or(Err(InjectError::Frozen { pid }))
}

fn kernel(doing: &'static str, pid: i32, source: io::Error) -> InjectError {
    match source.raw_os_error() {
        Some(libc::ESRCH) => InjectError::Gone { pid },
        _ => InjectError::Kernel { doing, pid, source },
    }
}

fn on_any_thread(pid: i32, instruction: u64, pidfd: &OwnedFd) -> Result<(Userfaultfd, Duration), InjectError> {
    for tid in threads(pid) {
        match Borrowed::new(pid, tid, Duration::from_millis(STOP_TIMEOUT_MS)) {
            Ok(mut thread) => {
                let made = make(&mut thread, instruction, pidfd);
                let stood = thread.give_back();
                return made.and_then(|fd| Ok((fd, stood?)));
            }
            Err(InjectError::NotStopping { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Err(InjectError::NotStopping { pid, ms: STOP_TIMEOUT_MS })
}

/// The process's own first thread first: its table of descriptors is the one that pidfd_getfd looks into.
fn threads(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let others = tasks.filter_map(|t| t.file_name().to_str()?.parse().ok()).filter(|tid| *tid != pid);
    std::iter::once(pid).chain(others).take(THREADS_TRIED).collect()
}

fn make(thread: &mut Borrowed, instruction: u64, pidfd: &OwnedFd) -> Result<Userfaultfd, InjectError> {
    let pid = thread.pid();
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;
    let inside = thread.call(instruction, arch::USERFAULTFD, [flags, 0, 0])?;
    let inside = i32::try_from(inside)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(|| InjectError::Refused { pid, source: io::Error::from_raw_os_error(-inside as i32) })?;
    let taken = rustix::process::pidfd_getfd(pidfd, inside, PidfdGetfdFlags::empty());
    thread.call(instruction, arch::CLOSE, [inside as u64, 0, 0])?;
    let taken = taken.map_err(|e| kernel("taking a descriptor from", pid, e.into()))?;
    // A thread may have a table of descriptors of its own.
    let link = std::fs::read_link(format!("/proc/self/fd/{}", taken.as_fd().as_raw_fd()));
    match link {
        Ok(name) if name.to_str() == Some("anon_inode:[userfaultfd]") => Ok(Userfaultfd::new(taken)),
        _ => Err(InjectError::Foreign { pid }),
    }
}

/// Where the process has a system call instruction: in the vdso, else in any code.
fn find_instruction(pid: i32, mappings: &[Mapping]) -> Result<u64, InjectError> {
    let vdso = mappings.iter().filter(|m| m.path == "[vdso]");
    let rest = mappings.iter().filter(|m| m.executable && m.path != "[vdso]" && m.path != "[vsyscall]");
    for mapping in vdso.chain(rest) {
        let end = mapping.range.end.min(mapping.range.start + SEARCH_BYTES);
        let range = crate::pages::PageRange { start: mapping.range.start, end };
        let mut code = vec![0; range.bytes() as usize];
        let Ok(read) = crate::sys::vm::read(pid, &[range], &mut code) else { continue };
        let found = code[..read].windows(arch::INSTRUCTION.len()).position(|w| w == arch::INSTRUCTION);
        if let Some(at) = found {
            return Ok(range.start + at as u64);
        }
    }
    Err(InjectError::NoInstruction { pid })
}
