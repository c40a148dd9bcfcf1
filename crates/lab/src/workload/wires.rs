//! Pipes, socket pairs, eventfds, a timer and a child process, all verified message by message.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, retry_on_intr, write};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};

use super::health::{Health, count};
use super::pattern;

const PACE_MS: u64 = 5;
const TIMER_MS: i64 = 20;
/// The writer of a pair always has more than the reader takes, so that the kernel's buffer between
/// them is full at any moment, also at the one at which the program is moved.
const WRITE_BYTES: usize = 1000;
const READ_BYTES: usize = 700;

/// Starts everything. The threads live until the process ends.
pub(crate) fn start(health: &Arc<Health>, seed: u64, own_prefix: &[&str]) -> io::Result<()> {
    let (reader, writer) = io::pipe()?;
    full_pair(health, "pipe", seed ^ 11, reader, writer);
    let (one, other) = UnixStream::pair()?;
    full_pair(health, "unix socket pair", seed ^ 12, one, other);
    event_pair(health)?;
    timer(health)?;
    child(health, own_prefix)
}

fn full_pair(
    health: &Arc<Health>,
    what: &'static str,
    seed: u64,
    mut reader: impl Read + Send + 'static,
    mut writer: impl Write + Send + 'static,
) {
    let reading = health.clone();
    std::thread::spawn(move || {
        let mut position = 0;
        let mut buffer = [0; READ_BYTES];
        loop {
            let length = match reader.read(&mut buffer) {
                Ok(0) => return reading.violate(format!("{what}: the other end was closed")),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return reading.violate(format!("{what}: {error}")),
            };
            if let Some(at) = pattern::first_difference(seed, position, &buffer[..length]) {
                return reading.violate(format!("{what}: byte {at} is wrong"));
            }
            position += length as u64;
            count(&reading.wire_messages, 1);
            std::thread::sleep(Duration::from_millis(PACE_MS));
        }
    });
    let writing = health.clone();
    std::thread::spawn(move || {
        let mut position = 0;
        let mut buffer = [0; WRITE_BYTES];
        loop {
            pattern::fill(seed, position, &mut buffer);
            if let Err(error) = writer.write_all(&buffer) {
                return writing.violate(format!("{what}: {error}"));
            }
            position += WRITE_BYTES as u64;
        }
    });
}

/// Two eventfds: a number goes out on one and must come back on the other.
fn event_pair(health: &Arc<Health>) -> io::Result<()> {
    fn give(fd: &OwnedFd, number: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| write(fd, &number.to_ne_bytes())).map(drop)?)
    }
    fn take(fd: &OwnedFd) -> io::Result<u64> {
        let mut bytes = [0; 8];
        retry_on_intr(|| read(fd, &mut bytes))?;
        Ok(u64::from_ne_bytes(bytes))
    }
    let there = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let back = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let (echo_from, echo_to, echo_health) = (there.clone(), back.clone(), health.clone());
    std::thread::spawn(move || {
        loop {
            if let Err(error) = take(&echo_from).and_then(|number| give(&echo_to, number)) {
                return echo_health.violate(format!("eventfd: {error}"));
            }
        }
    });
    let health = health.clone();
    std::thread::spawn(move || {
        for number in 1.. {
            match give(&there, number).and_then(|()| take(&back)) {
                Ok(found) if found == number => count(&health.wire_messages, 1),
                Ok(found) => return health.violate(format!("eventfd: {found} came back for {number}")),
                Err(error) => return health.violate(format!("eventfd: {error}")),
            }
            std::thread::sleep(Duration::from_millis(PACE_MS));
        }
    });
    Ok(())
}

/// A periodic timer that must go on, and a clock that must not go back.
fn timer(health: &Arc<Health>) -> io::Result<()> {
    let interval = Timespec { tv_sec: 0, tv_nsec: TIMER_MS * 1_000_000 };
    let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    timerfd_settime(&fd, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: interval, it_value: interval })?;
    let health = health.clone();
    std::thread::spawn(move || {
        let mut before = clock_gettime(ClockId::Monotonic);
        loop {
            let mut bytes = [0; 8];
            if let Err(error) = retry_on_intr(|| read(&fd, &mut bytes)) {
                return health.violate(format!("timer: {error}"));
            }
            let now = clock_gettime(ClockId::Monotonic);
            if (now.tv_sec, now.tv_nsec) < (before.tv_sec, before.tv_nsec) {
                return health.violate(format!("timer: the monotonic clock went back from {before:?} to {now:?}"));
            }
            before = now;
            match u64::from_ne_bytes(bytes) {
                0 => return health.violate("timer: it fired without an expiration"),
                ticks => count(&health.timer_ticks, ticks),
            }
        }
    });
    Ok(())
}

/// A child process that answers on pipes.
fn child(health: &Arc<Health>, own_prefix: &[&str]) -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(own_prefix)
        .arg("peer")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let health = health.clone();
    std::thread::spawn(move || {
        let error = ask(&mut child, &health);
        health.violate(format!("child process: {error}"));
    });
    Ok(())
}

fn ask(child: &mut Child, health: &Health) -> String {
    let (Some(mut to), Some(mut from)) = (child.stdin.take(), child.stdout.take()) else {
        return "it has no pipes".to_owned();
    };
    for number in 0_u64.. {
        let mut answer = [0; 8];
        if let Err(error) = to.write_all(&number.to_le_bytes()).and_then(|()| from.read_exact(&mut answer)) {
            return error.to_string();
        }
        if u64::from_le_bytes(answer) != pattern::mix(number) {
            return format!("it gave the wrong answer to {number}");
        }
        count(&health.wire_messages, 1);
        std::thread::sleep(Duration::from_millis(PACE_MS));
    }
    "it was asked everything".to_owned()
}

/// The child's side: answers every number until its parent is gone.
pub(crate) fn peer() -> io::Result<()> {
    let (mut from, mut to) = (io::stdin().lock(), io::stdout().lock());
    let mut number = [0; 8];
    loop {
        match from.read_exact(&mut number) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        to.write_all(&pattern::mix(u64::from_le_bytes(number)).to_le_bytes())?;
        to.flush()?;
    }
}
