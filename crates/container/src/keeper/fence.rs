//! The end of the host's lease: the container stands still, whether there is an agent or not.
//!
//! The agent writes into one file for the whole host until when its containers may run: `none`, or milliseconds of
//! CLOCK_BOOTTIME, which also counts while the machine sleeps (clock_gettime(2)). Every keeper looks itself when that
//! time comes; so a container that lives has somebody who stops it. It goes on only by the agent's word, which knows what
//! the host still owns.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};

use super::protocol::Reply;
use super::run::Keeper;
use super::state::Phase;
use super::{chain, note};

/// While the lease is over, how often it is seen to that nothing runs, in milliseconds.
const LOOK_AGAIN_MS: u64 = 1_000;
/// Where the lease has no end, how often it is seen whether it got one, in milliseconds. A first lease is longer.
const LOOK_FOR_END_MS: u64 = 5_000;
/// Longest content of the file that is read.
const MAX_BYTES: u64 = 64;

const ENDED: &str =
    "the lease of this host has ended: what it owns is not known until its agent reaches the controller";

/// Milliseconds of CLOCK_BOOTTIME.
pub fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Until when containers may run by the file's content; `None`: without an end. What cannot be read ends at once.
pub fn read_lease(file: &std::path::Path) -> Option<u64> {
    use std::io::Read;
    let mut text = String::new();
    let read = std::fs::File::open(file).and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text));
    match text.trim() {
        "none" if read.is_ok() => None,
        number => Some(number.parse().unwrap_or(0)),
    }
}

pub(super) struct Fence {
    /// `None`: nobody limits this keeper.
    file: Option<PathBuf>,
    timer: OwnedFd,
    /// The container stands still because the lease has ended.
    pub standing: bool,
}

impl Fence {
    pub fn new(file: Option<PathBuf>) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let fence = Self { file, timer, standing: false };
        fence.wind();
        Ok(fence)
    }

    pub fn guards(&self) -> bool {
        self.file.is_some()
    }

    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    fn until(&self) -> Option<u64> {
        read_lease(self.file.as_deref()?)
    }

    fn ended(&self) -> bool {
        self.until().is_some_and(|until| until <= boottime_ms())
    }

    /// Sets the timer to when there is something to look at; a lease that has no end may get one.
    fn wind(&self) {
        if self.file.is_none() {
            return;
        }
        let now = boottime_ms();
        let at = match self.until() {
            None => now + LOOK_FOR_END_MS,
            Some(until) if until > now => until,
            Some(_) => now + LOOK_AGAIN_MS,
        };
        let value = Timespec {
            tv_sec: i64::try_from(at / 1_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(at % 1_000 * 1_000_000).unwrap_or(0),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // Fails for times that cannot be: they are made from the clock itself.
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once) {
            note(&format!("the end of the lease is not waited for: {error}"));
        }
    }
}

impl Keeper {
    /// The timer has come. Who is frozen already, by a move, is taken over: it must not be thawed by anybody else.
    pub(super) fn look_at_lease(&mut self) {
        let mut expirations = [0; 8];
        let _ = rustix::io::read(self.fence.timer(), &mut expirations);
        // What is built or restored only does not run; its start is refused.
        if self.fence.ended() && self.state.phase == Phase::Running {
            self.stand_still();
        }
        self.fence.wind();
    }

    /// Nothing of the container runs when this returns.
    fn stand_still(&mut self) {
        let Some(init) = &self.init else { return };
        let frozen = init.cgroup.is_frozen().map_err(|e| chain(&e)).and_then(|frozen| match frozen {
            true => Ok(()),
            false => init.cgroup.freeze().map_err(|e| chain(&e)),
        });
        if let Err(error) = frozen {
            note(&format!("it does not stand still, and is ended: {error}"));
            let cgroup = init.cgroup.clone();
            if let Err(error) = cgroup.kill_all_reaping(|| self.reap()) {
                note(&format!("something of it may run: {}", chain(&error)));
            }
            self.reap();
            return;
        }
        if !std::mem::replace(&mut self.fence.standing, true) {
            note("the lease of this host has ended: the container stands still");
            self.state.fenced = true;
            self.save_state();
        }
    }

    /// Nothing begins to run after the end of the lease.
    pub(super) fn check_lease(&self) -> Result<(), String> {
        if self.fence.ended() { Err(ENDED.to_owned()) } else { Ok(()) }
    }

    /// The agent has frozen the container and must not thaw it: that is this keeper's business now.
    pub(super) fn fence(&mut self) -> Result<Reply, String> {
        self.stand_still();
        Ok(Reply::Done)
    }

    /// The agent's word that the container is still this host's.
    pub(super) fn unfence(&mut self) -> Result<Reply, String> {
        if !self.fence.standing {
            return Ok(Reply::Done);
        }
        self.check_lease()?;
        if let Some(init) = &self.init {
            init.cgroup.thaw().map_err(|e| chain(&e))?;
        }
        note("the container goes on");
        self.fence.standing = false;
        self.state.fenced = false;
        self.save_state();
        self.fence.wind();
        Ok(Reply::Done)
    }
}
