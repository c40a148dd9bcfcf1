//! The controller's side.

use std::collections::{BTreeMap, VecDeque};

use godwit_model::HostName;

use super::{Beat, Grant, LEASE_MS, MARGIN_MS, SLACK_MS, Witness, majority};

/// Grants to one host of which the echo is known; they are seconds apart.
const MAX_GRANTS: usize = 16;
/// A controller that did not look for so long, in milliseconds, stood still itself, and knows nothing of the time between.
const STALL_MS: u64 = 3_000;

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// It was sent at this time or later, by the controller's clock.
    sent_after: u64,
    received: u64,
    held_ms: u64,
    left_ms: u64,
}

#[derive(Debug, Default)]
struct Entry {
    grants: VecDeque<(u64, u64)>,
    granted_at: Option<u64>,
    seen: Option<Seen>,
    /// Somebody decides about its containers: no grant.
    seized: bool,
    /// It has to be told at least this revision before it is granted anything.
    barrier: u64,
}

/// Why a host still counts as one that may run what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// Its lease, with the margin, may last so many milliseconds more.
    For { ms: u64 },
    /// It may go on without end: no other host could vouch when it last heard of the controller.
    WithoutEnd,
    /// Too few of the hosts that could vouch for it are known to have had this controller all the time.
    NoMajority { known: usize, of: usize },
    /// Somebody decides about it already.
    Seized,
}

/// What a controller knows of all hosts' leases. All times are milliseconds of one clock that never goes back. A new
/// controller knows nothing of what an earlier one granted, so that every host has a whole lease from its start on.
#[derive(Debug)]
pub struct Book {
    hosts: BTreeMap<HostName, Entry>,
    last_number: u64,
    since: u64,
    looked: u64,
}

impl Book {
    pub fn new(now: u64) -> Self {
        Self { hosts: BTreeMap::new(), last_number: 0, since: now, looked: now }
    }

    /// To be called at least every second. A controller that stood still itself gives everybody a whole lease.
    pub fn look(&mut self, now: u64) {
        if now.saturating_sub(self.looked) > STALL_MS {
            self.since = now;
        }
        self.looked = now;
    }

    /// A host asks. `told`: the revision of the last word to it on this link; `witnesses` as the store has them for it. `None`:
    /// it has to hear a newer word first.
    pub fn asked(
        &mut self,
        host: &HostName,
        beat: &Beat,
        told: u64,
        witnesses: Vec<Witness>,
        now: u64,
    ) -> Option<Grant> {
        let entry = self.hosts.entry(host.clone()).or_default();
        let echoed = beat.grant.and_then(|echo| {
            entry.grants.iter().find(|(number, _)| *number == echo.number).map(|(_, at)| at + echo.since_ms)
        });
        entry.seen = echoed.map(|sent_after| Seen {
            sent_after: sent_after.min(now),
            received: now,
            held_ms: beat.held_ms,
            left_ms: beat.left_ms,
        });
        if entry.seized || told < entry.barrier {
            return None;
        }
        self.last_number += 1;
        entry.granted_at = Some(now);
        entry.grants.push_back((self.last_number, now));
        if entry.grants.len() > MAX_GRANTS {
            entry.grants.pop_front();
        }
        Some(Grant { number: self.last_number, beat_ms: beat.sent_ms, for_ms: LEASE_MS, witnesses, revision: told })
    }

    /// Whether nothing of the host runs any more, if it is true that it may have any of these sets of witnesses.
    pub fn lost(&self, host: &HostName, witnesses: &[&[HostName]], now: u64) -> Result<(), Held> {
        let entry = self.hosts.get(host);
        if entry.is_some_and(|entry| entry.seized) {
            return Err(Held::Seized);
        }
        let last = entry.and_then(|entry| entry.granted_at).unwrap_or(0).max(self.since);
        let over = last + LEASE_MS + MARGIN_MS;
        if now < over {
            return Err(Held::For { ms: over - now });
        }
        if witnesses.iter().any(|set| set.is_empty()) || witnesses.is_empty() {
            return Err(Held::WithoutEnd);
        }
        for set in witnesses {
            let known = set.iter().filter(|witness| self.held_all_the_time(witness, now)).count();
            // Of an even number the controller is one more.
            let votes = known + usize::from(set.len() % 2 == 0);
            if !majority(set.len(), votes) {
                return Err(Held::NoMajority { known, of: set.len() });
            }
        }
        Ok(())
    }

    /// Whether this host held its lease from before the last moment at which it could have vouched for one whose lease is
    /// over now.
    fn held_all_the_time(&self, host: &HostName, now: u64) -> bool {
        let Some(seen) = self.hosts.get(host).and_then(|entry| entry.seen) else { return false };
        now + SLACK_MS <= seen.sent_after + seen.left_ms
            && seen.received.saturating_sub(seen.held_ms) + LEASE_MS + MARGIN_MS <= now
    }

    /// As [`Book::lost`]; the host gets no grant until [`Book::decided`].
    pub fn seize(&mut self, host: &HostName, witnesses: &[&[HostName]], now: u64) -> Result<(), Held> {
        self.lost(host, witnesses, now)?;
        self.hosts.entry(host.clone()).or_default().seized = true;
        Ok(())
    }

    /// As [`Book::seize`], where somebody has seen that nothing of the host runs.
    pub fn seize_by_word(&mut self, host: &HostName) -> Result<(), Held> {
        let entry = self.hosts.entry(host.clone()).or_default();
        if std::mem::replace(&mut entry.seized, true) { Err(Held::Seized) } else { Ok(()) }
    }

    /// What was decided about the host is in the store at this revision: it is granted something when it has heard of it.
    pub fn decided(&mut self, host: &HostName, revision: u64) {
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.seized = false;
            entry.barrier = entry.barrier.max(revision);
        }
    }
}
