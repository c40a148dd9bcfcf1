//! A host's side.

use godwit_model::HostName;

use super::{Beat, Echo, Grant, LEASE_MS, UNLINKED_MS, VOUCH_TIMEOUT_MS, Witness, majority};

/// What a host may do, as it knows. All times are milliseconds of one clock of the host that also runs while it sleeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// End of the granted lease; `None`: there never was one.
    granted_until: Option<u64>,
    vouched_until: u64,
    last_grant: Option<(u64, u64)>,
    held_since: u64,
    witnesses: Vec<Witness>,
    /// The lease had ended, and what is still owned is not known yet.
    lapsed: bool,
    /// Nobody has been told of that yet.
    untold: bool,
    /// The revision that has to be carried out to know it.
    renewed_at: Option<u64>,
}

impl Holder {
    /// A host that never had a lease: it may run what it has, as nobody else may start it.
    pub fn free(now: u64) -> Self {
        Self {
            granted_until: None,
            vouched_until: 0,
            last_grant: None,
            held_since: now,
            witnesses: Vec::new(),
            lapsed: false,
            untold: false,
            renewed_at: None,
        }
    }

    /// A host that had one with these witnesses, by what an earlier agent wrote down; `until` is its end, and `None` if that
    /// is not known because the host was started anew.
    pub fn resumed(witnesses: Vec<Witness>, until: Option<u64>, now: u64) -> Self {
        let mut holder = Self { granted_until: Some(until.unwrap_or(0)), witnesses, ..Self::free(now) };
        holder.note(now);
        holder
    }

    /// Until when the host may run what it has; `None`: without an end.
    pub fn until(&self) -> Option<u64> {
        let granted = self.granted_until.filter(|_| !self.witnesses.is_empty())?;
        Some(granted.max(self.vouched_until))
    }

    /// Whether the host may let something run now.
    pub fn may_run(&self, now: u64) -> bool {
        self.until().is_none_or(|until| now < until && !self.lapsed)
    }

    /// Notes that time has passed. `true`: the lease has ended since this was asked last, and everything has to stand still.
    pub fn look(&mut self, now: u64) -> bool {
        self.note(now);
        std::mem::take(&mut self.untold)
    }

    fn note(&mut self, now: u64) {
        if self.until().is_none_or(|until| now < until) {
            return;
        }
        self.renewed_at = None;
        self.untold |= !std::mem::replace(&mut self.lapsed, true);
    }

    /// What to send to the controller.
    pub fn beat(&self, now: u64) -> Beat {
        let left_ms = self.granted_until.unwrap_or(0).saturating_sub(now);
        Beat {
            sent_ms: now,
            grant: self.last_grant.map(|(number, at)| Echo { number, since_ms: now.saturating_sub(at) }),
            held_ms: if left_ms > 0 { now.saturating_sub(self.held_since) } else { 0 },
            left_ms,
            witnesses: self.witnesses.iter().map(|w| w.host.clone()).collect(),
        }
    }

    /// The controller's answer.
    pub fn granted(&mut self, grant: Grant, now: u64) {
        self.note(now);
        let until = grant.beat_ms.saturating_add(grant.for_ms);
        if self.granted_until.is_none_or(|old| old <= now) {
            self.held_since = now;
        }
        self.granted_until = Some(self.granted_until.unwrap_or(0).max(until));
        self.last_grant = Some((grant.number, now));
        self.witnesses = grant.witnesses;
        if self.lapsed {
            self.renewed_at = Some(grant.revision);
        }
    }

    /// What the host shall be is carried out, as of this revision. `true`: after a lapse it is known again what it owns, and
    /// that may run.
    pub fn carried_out(&mut self, revision: u64, now: u64) -> bool {
        self.note(now);
        let known = self.lapsed && self.renewed_at.is_some_and(|needed| revision >= needed);
        if known {
            self.lapsed = false;
            self.renewed_at = None;
            // Whoever has not heard of the end must not hear of it after this.
            self.untold = false;
        }
        known
    }

    /// Whether it is time to ask the witnesses: no grant for a while, and the lease has not ended.
    pub fn needs_witnesses(&self, now: u64) -> bool {
        self.until().is_some() && self.may_run(now) && self.unlinked(now)
    }

    pub fn witnesses(&self) -> &[Witness] {
        &self.witnesses
    }

    fn unlinked(&self, now: u64) -> bool {
        self.last_grant.is_none_or(|(_, at)| now.saturating_sub(at) > UNLINKED_MS)
    }

    /// The answer to another host, or to itself: whether this one has no controller either. Whoever says so counts as one
    /// that was away.
    pub fn vouch(&mut self, now: u64) -> bool {
        let unlinked = self.unlinked(now);
        if unlinked {
            self.held_since = now;
        }
        unlinked
    }

    /// Counts those who vouched when they were asked at `asked` or later. `true`: the host may go on.
    pub fn vouched(&mut self, asked: u64, by: &[HostName], now: u64) -> bool {
        self.note(now);
        if self.lapsed || now.saturating_sub(asked) > VOUCH_TIMEOUT_MS {
            return false;
        }
        let votes = self.witnesses.iter().filter(|witness| by.contains(&witness.host)).count();
        if !majority(self.witnesses.len(), votes) {
            return false;
        }
        self.vouched_until = self.vouched_until.max(asked + LEASE_MS);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(beat_ms: u64, revision: u64) -> Grant {
        let witness =
            |n| Witness { host: HostName::new(format!("h{n}")).unwrap(), address: ([127, 0, 0, 1], n).into() };
        Grant { number: 1, beat_ms, for_ms: LEASE_MS, witnesses: vec![witness(1), witness(2)], revision }
    }

    #[test]
    fn an_end_is_told_once_whoever_notes_it_and_only_the_word_of_after_it_counts() {
        let mut holder = Holder::free(0);
        holder.granted(grant(0, 7), 100);
        assert!(!holder.look(LEASE_MS - 1) && holder.may_run(LEASE_MS - 1));
        // Noted on the way of something else.
        assert!(!holder.vouched(LEASE_MS, &[], LEASE_MS));
        assert!(holder.look(LEASE_MS) && !holder.look(LEASE_MS));
        assert!(!holder.carried_out(7, LEASE_MS), "without a new grant nothing is known");
        holder.granted(grant(LEASE_MS + 1_000, 9), LEASE_MS + 1_100);
        assert!(!holder.carried_out(8, LEASE_MS + 1_200) && !holder.may_run(LEASE_MS + 1_200));
        assert!(holder.carried_out(9, LEASE_MS + 1_300) && holder.may_run(LEASE_MS + 1_300));
    }

    #[test]
    fn an_end_that_is_over_is_not_told_any_more() {
        let mut holder = Holder::free(0);
        holder.granted(grant(0, 7), 100);
        holder.granted(grant(LEASE_MS + 100, 9), LEASE_MS + 200);
        assert!(holder.carried_out(9, LEASE_MS + 300));
        assert!(!holder.look(LEASE_MS + 400));
    }
}
