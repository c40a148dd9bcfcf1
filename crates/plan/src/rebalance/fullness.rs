//! How full hosts are while advice is made: what is reserved and what is measured, after the moves so far.

use std::collections::{BTreeMap, BTreeSet};

use crate::draft::Draft;
use crate::fleet::{Container, HostId, HostSlot, MemberId};

/// What a host holds, in thousandths of what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    pub reserved_memory: u64,
    pub reserved_cpu: u64,
    pub used_memory: u64,
    pub used_cpu: u64,
}

impl Parts {
    pub fn fullest(&self) -> u64 {
        self.reserved().max(self.used_memory).max(self.used_cpu)
    }

    pub fn reserved(&self) -> u64 {
        self.reserved_memory.max(self.reserved_cpu)
    }
}

/// What has come to a host less what has gone from it, as measured: bytes, thousandths of a core.
type Shift = (i64, i64);

/// Every host that takes containers, the least full first, and those that do not, which only give.
pub(super) struct Fullness {
    shifts: BTreeMap<HostId, Shift>,
    order: BTreeSet<(u64, HostId)>,
    /// The same by what is reserved only, which no peak changes.
    by_reserved: BTreeSet<(u64, HostId)>,
}

impl Fullness {
    pub fn new(draft: &Draft<'_>) -> Self {
        let mut fullness = Self { shifts: BTreeMap::new(), order: BTreeSet::new(), by_reserved: BTreeSet::new() };
        for host in draft.fleet.host_ids.values() {
            let slot = draft.slot(*host);
            if slot.host.connected && slot.host.state.takes_containers() {
                let parts = fullness.of(draft, *host);
                fullness.order.insert((parts.fullest(), *host));
                fullness.by_reserved.insert((parts.reserved(), *host));
            }
        }
        fullness
    }

    pub fn of(&self, draft: &Draft<'_>, host: HostId) -> Parts {
        let shift = self.shifts.get(&host).copied().unwrap_or_default();
        let occupied = draft.occupied(host);
        parts(draft.slot(host), occupied.memory, occupied.cpu, shift)
    }

    /// With one container more, or less.
    pub fn with(&self, draft: &Draft<'_>, host: HostId, member: MemberId, more: bool) -> Parts {
        let (memory, cpu) = draft.size(member);
        let shift = self.shifts.get(&host).copied().unwrap_or_default();
        let used = used(&draft.member(member).container);
        let occupied = draft.occupied(host);
        let slot = draft.slot(host);
        if more {
            let shift = (shift.0 + used.0, shift.1 + used.1);
            parts(slot, occupied.memory.saturating_add(memory), occupied.cpu + cpu, shift)
        } else {
            let shift = (shift.0 - used.0, shift.1 - used.1);
            parts(slot, occupied.memory.saturating_sub(memory), occupied.cpu.saturating_sub(cpu), shift)
        }
    }

    /// Moves it in the draft, and what is measured with it.
    pub fn relocate(&mut self, draft: &mut Draft<'_>, member: MemberId, from: HostId, to: HostId) {
        let before = [from, to].map(|host| (self.of(draft, host), host));
        let used = used(&draft.member(member).container);
        draft.relocate(member, Some(to));
        for (host, sign) in [(from, -1), (to, 1)] {
            let shift = self.shifts.entry(host).or_default();
            *shift = (shift.0 + sign * used.0, shift.1 + sign * used.1);
        }
        for (parts, host) in before {
            if self.order.remove(&(parts.fullest(), host)) && self.by_reserved.remove(&(parts.reserved(), host)) {
                let parts = self.of(draft, host);
                self.order.insert((parts.fullest(), host));
                self.by_reserved.insert((parts.reserved(), host));
            }
        }
    }

    /// The least full first.
    pub fn emptiest(&self) -> impl Iterator<Item = (u64, HostId)> {
        self.order.iter().copied()
    }

    /// By what is reserved, the least first.
    pub fn by_reserved(&self) -> impl DoubleEndedIterator<Item = (u64, HostId)> {
        self.by_reserved.iter().copied()
    }
}

fn used(container: &Container) -> Shift {
    (container.used_memory.0.min(i64::MAX as u64) as i64, i64::from(container.used_cpu.0))
}

fn parts(slot: &HostSlot, memory: u64, cpu: u64, shift: Shift) -> Parts {
    let permille = |part: u64, whole: u64| match whole {
        0 => 1000,
        whole => (u128::from(part) * 1000 / u128::from(whole)).min(1000) as u64,
    };
    let measured = |permille: u16, shift: i64, whole: u64| match whole {
        0 => 1000,
        whole => {
            let whole = i128::from(whole);
            let used = i128::from(permille) * whole + i128::from(shift) * 1000;
            (used / whole).clamp(0, 1000) as u64
        }
    };
    Parts {
        reserved_memory: permille(memory, slot.host.memory.0),
        reserved_cpu: permille(cpu, slot.host.cpu_capacity()),
        used_memory: measured(slot.host.memory_load_permille, shift.0, slot.host.memory.0),
        used_cpu: measured(slot.host.cpu_load_permille, shift.1, u64::from(slot.host.cpu.0)),
    }
}
