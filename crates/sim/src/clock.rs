//! Virtual time: what will happen when. Things of one moment happen in the order in which they were arranged.

use std::collections::BTreeMap;

pub const SECOND_MS: u64 = 1_000;
pub const MINUTE_MS: u64 = 60 * SECOND_MS;
pub const HOUR_MS: u64 = 60 * MINUTE_MS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Power is lost: everything on it is gone at once.
    HostFails(usize),
    /// The network is lost: everything on it runs on.
    HostCutOff(usize),
    /// The host, away since that episode, is seen no more.
    Suspect(usize, u32),
    /// It stops what it may own no longer.
    Fence(usize, u32),
    /// Nothing can run there any more; others may start what it had.
    Declare(usize, u32),
    /// Power or network is back.
    HostBack(usize, u32),
    /// A container's start on a host ends; the number tells starts of one container apart.
    Started(usize, usize, u32),
    MoveEnds(u64),
    Grow,
    Shrink,
    Resize,
    Evacuate,
    /// Another plan for a host that is not empty yet.
    EvacuateAgain(usize),
    Activate(usize),
    Balance,
    Measure,
    Retry,
    HourEnds,
}

#[derive(Debug, Default)]
pub struct Clock {
    pub now_ms: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Event>,
}

impl Clock {
    pub fn after(&mut self, ms: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now_ms.saturating_add(ms), self.sequence), event);
    }

    /// The next event; time goes on to its moment.
    pub fn next(&mut self) -> Option<Event> {
        let ((at, _), event) = self.queue.pop_first()?;
        self.now_ms = at;
        Some(event)
    }
}
