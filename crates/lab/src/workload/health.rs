//! What the server knows about itself, shared by all its threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::gap::unix_ms;

/// Most violations kept; one is enough to fail.
const MAX_VIOLATIONS: usize = 20;

/// The answer to `status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub ok: bool,
    pub violations: Vec<String>,
    /// Differs for every start of the server: the same number means the same process.
    pub instance: u64,
    pub pid: u32,
    pub started_unix_ms: u64,
    /// Complete passes over the memory, each page verified.
    pub memory_passes: u64,
    pub memory_pages_written: u64,
    pub file_rounds: u64,
    /// Messages verified on pipes, sockets, eventfds and with the child process.
    pub wire_messages: u64,
    pub timer_ticks: u64,
    pub streams_accepted: u64,
    /// Streams that ended otherwise than by the client closing them.
    pub streams_broken: u64,
    pub stream_bytes_received: u64,
    pub stream_bytes_sent: u64,
}

#[derive(Debug)]
pub(crate) struct Health {
    violations: Mutex<Vec<String>>,
    first: Condvar,
    instance: u64,
    started: SystemTime,
    pub memory_passes: AtomicU64,
    pub memory_pages_written: AtomicU64,
    pub file_rounds: AtomicU64,
    pub wire_messages: AtomicU64,
    pub timer_ticks: AtomicU64,
    pub streams_accepted: AtomicU64,
    pub streams_broken: AtomicU64,
    pub stream_bytes_received: AtomicU64,
    pub stream_bytes_sent: AtomicU64,
}

impl Health {
    pub fn new(instance: u64) -> Self {
        Self {
            violations: Mutex::default(),
            first: Condvar::new(),
            instance,
            started: SystemTime::now(),
            memory_passes: AtomicU64::new(0),
            memory_pages_written: AtomicU64::new(0),
            file_rounds: AtomicU64::new(0),
            wire_messages: AtomicU64::new(0),
            timer_ticks: AtomicU64::new(0),
            streams_accepted: AtomicU64::new(0),
            streams_broken: AtomicU64::new(0),
            stream_bytes_received: AtomicU64::new(0),
            stream_bytes_sent: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        // A thread that panicked while it held the list has left a list.
        self.violations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is wrong: the server will say so and end.
    pub fn violate(&self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("violation: {what}");
        let mut violations = self.lock();
        if violations.len() < MAX_VIOLATIONS {
            violations.push(what);
        }
        drop(violations);
        self.first.notify_all();
    }

    /// Blocks until the first violation.
    pub fn wait_violation(&self) {
        let mut violations = self.lock();
        while violations.is_empty() {
            violations = self.first.wait(violations).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn status(&self) -> Status {
        let violations = self.lock().clone();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Status {
            ok: violations.is_empty(),
            violations,
            instance: self.instance,
            pid: std::process::id(),
            started_unix_ms: unix_ms(self.started),
            memory_passes: get(&self.memory_passes),
            memory_pages_written: get(&self.memory_pages_written),
            file_rounds: get(&self.file_rounds),
            wire_messages: get(&self.wire_messages),
            timer_ticks: get(&self.timer_ticks),
            streams_accepted: get(&self.streams_accepted),
            streams_broken: get(&self.streams_broken),
            stream_bytes_received: get(&self.stream_bytes_received),
            stream_bytes_sent: get(&self.stream_bytes_sent),
        }
    }
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
