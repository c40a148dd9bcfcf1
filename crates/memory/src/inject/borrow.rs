//! A thread, stopped, that makes system calls for us and is given back as it was.

use std::time::{Duration, Instant};

use super::{InjectError, arch, kernel, rseq};
use crate::sys::ptrace::{self, Registers, Stop};

/// Between two looks whether the thread has stopped, in microseconds.
const PAUSE_US: u64 = 20;

pub(crate) struct Borrowed {
    pid: i32,
    tid: i32,
    saved: Registers,
    mask: u64,
    since: Instant,
}

impl Borrowed {
    /// Stops thread `tid` of process `pid` within `limit`.
    pub(crate) fn new(pid: i32, tid: i32, limit: Duration) -> Result<Self, InjectError> {
        ptrace::seize(tid, ptrace::O_SUSPEND_SECCOMP | ptrace::O_TRACESYSGOOD)
            .map_err(|e| kernel("seizing", pid, e))?;
        let since = Instant::now();
        ptrace::interrupt(tid).map_err(|e| kernel("interrupting", pid, e))?;
        let deadline = since + limit;
        loop {
            match wait(pid, tid, Some(deadline))? {
                Some(Stop::Interrupted) => break,
                Some(Stop::Gone) => return Err(InjectError::Gone { pid }),
                // It came first: delivered as if we were not there. The interruption is still due.
                Some(Stop::Signal(signal)) => ptrace::go_on(tid, signal).map_err(|e| kernel("continuing", pid, e))?,
                Some(Stop::SystemCall) => ptrace::go_on(tid, 0).map_err(|e| kernel("continuing", pid, e))?,
                // The kernel lets go of the thread when this one ends; the registers are untouched.
                None => return Err(InjectError::NotStopping { pid, ms: limit.as_millis() as u64 }),
            }
        }
        let borrowed = Self::take(pid, tid, since);
        if borrowed.is_err() {
            let _ = ptrace::detach(tid);
        }
        borrowed
    }

    fn take(pid: i32, tid: i32, since: Instant) -> Result<Self, InjectError> {
        let saved = ptrace::registers(tid).map_err(|e| match e.kind() {
            std::io::ErrorKind::Unsupported => InjectError::Foreign { pid },
            _ => kernel("reading registers of", pid, e),
        })?;
        if arch::is_foreign(&saved) || ptrace::system_calls_are_dispatched(tid) {
            return Err(InjectError::Foreign { pid });
        }
        let saved = rseq::abort_if_inside(pid, tid, saved);
        let mask = ptrace::signal_mask(tid).map_err(|e| kernel("reading the signal mask of", pid, e))?;
        ptrace::set_signal_mask(tid, u64::MAX).map_err(|e| kernel("blocking signals of", pid, e))?;
        Ok(Self { pid, tid, saved, mask, since })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Makes one system call at `instruction`; its result, negative for an error number.
    pub(crate) fn call(&mut self, instruction: u64, number: u64, arguments: [u64; 3]) -> Result<i64, InjectError> {
        let registers = arch::call(&self.saved, instruction, number, arguments);
        ptrace::set_registers(self.tid, &registers).map_err(|e| kernel("setting registers of", self.pid, e))?;
        // Once at its entry, once at its exit.
        for _ in 0..2 {
            self.run_to(Stop::SystemCall)?;
        }
        let after = ptrace::registers(self.tid).map_err(|e| kernel("reading registers of", self.pid, e))?;
        Ok(arch::result(&after))
    }

    fn run_to(&self, wanted: Stop) -> Result<(), InjectError> {
        let mut signal = 0;
        loop {
            let to_call = wanted == Stop::SystemCall;
            let go = if to_call { ptrace::go_to_system_call } else { ptrace::go_on };
            go(self.tid, signal).map_err(|e| kernel("continuing", self.pid, e))?;
            // Unbounded on purpose: abandoned here, the thread would go on with our registers. A frozen process comes
            // back when it is thawed or killed; the caller of `userfaultfd` is told after its own limit.
            match wait(self.pid, self.tid, None)? {
                Some(Stop::Gone) => return Err(InjectError::Gone { pid: self.pid }),
                Some(stop) if stop == wanted => return Ok(()),
                // Only what cannot be blocked comes here.
                Some(Stop::Signal(s)) => signal = s,
                // Group stops begin and end.
                Some(_) => signal = 0,
                None => {}
            }
        }
    }

    /// Puts everything back and lets the thread go; how long it was stopped.
    pub(crate) fn give_back(mut self) -> Result<Duration, InjectError> {
        let (pid, tid) = (self.pid, self.tid);
        // Stopped by an interruption the thread is where the kernel looks whether a call must be restarted.
        ptrace::interrupt(tid).map_err(|e| kernel("interrupting", pid, e))?;
        self.run_to(Stop::Interrupted)?;
        // A signal that is due has ended the call by right.
        if !signal_is_due(tid, self.mask) {
            arch::call_again_if_interrupted(&mut self.saved);
        }
        ptrace::set_registers(tid, &self.saved).map_err(|e| kernel("restoring registers of", pid, e))?;
        ptrace::set_signal_mask(tid, self.mask).map_err(|e| kernel("restoring the signal mask of", pid, e))?;
        ptrace::detach(tid).map_err(|e| kernel("letting go of", pid, e))?;
        Ok(self.since.elapsed())
    }
}

/// The next stop; `None` if there was none before the deadline.
fn wait(pid: i32, tid: i32, deadline: Option<Instant>) -> Result<Option<Stop>, InjectError> {
    loop {
        let stop = ptrace::next_stop(tid, deadline.is_none()).map_err(|e| kernel("waiting for", pid, e))?;
        if stop.is_some() {
            return Ok(stop);
        }
        if deadline.is_some_and(|d| Instant::now() >= d) {
            return Ok(None);
        }
        if deadline.is_some() {
            std::thread::sleep(Duration::from_micros(PAUSE_US));
        }
    }
}

/// Whether a signal waits for the thread or its process that `mask` lets in.
fn signal_is_due(tid: i32, mask: u64) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let pending = |name| {
        let value = status.lines().find_map(|l: &str| l.strip_prefix(name)).map(str::trim);
        value.and_then(|v| u64::from_str_radix(v, 16).ok()).unwrap_or(0)
    };
    (pending("SigPnd:") | pending("ShdPnd:")) & !mask != 0
}
