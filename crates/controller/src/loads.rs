//! What containers use, as their hosts report it, and since when that has been too much for a host.
//!
//! Kept in memory: a controller that was restarted begins to measure anew. Times are of the monotonic clock, so that
//! setting the machine's clock makes no host overloaded.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use godwit_model::{Bytes, ContainerId, HostName, MilliCpu};
use godwit_plan::Policy;

use crate::core::{Core, locked};
use crate::state::World;

/// The time over which CPU is measured, at least, in milliseconds.
const WINDOW_MS: u64 = 5_000;

/// What a container uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub memory: Bytes,
    pub cpu: MilliCpu,
}

/// What the containers of a host use, in thousandths of what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    pub cpu_permille: u16,
    pub memory_permille: u16,
}

#[derive(Debug, Default)]
pub struct Loads {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    containers: BTreeMap<ContainerId, Measured>,
    overloaded: BTreeMap<HostName, Instant>,
}

/// The last window that is complete, and the beginning of the next.
#[derive(Debug, Clone)]
struct Measured {
    usage: Usage,
    on: HostName,
    began: Instant,
    cpu_usec: u64,
}

impl Loads {
    /// Takes in what hosts have reported. To be called again and again.
    pub fn look(&self, core: &Core, world: &World, policy: &Policy) {
        let now = Instant::now();
        let mut kept = locked(&self.kept);
        let mut there = Vec::new();
        let mut on: BTreeMap<&HostName, Vec<&ContainerId>> = BTreeMap::new();
        for record in world.containers.values().filter(|c| !c.removed) {
            there.push(record.spec.id.clone());
            let Some(host) = record.owner() else { continue };
            on.entry(host).or_default().push(&record.spec.id);
            let report = core.links.report(host).filter(|report| report.current);
            let Some(status) = report.as_ref().and_then(|r| r.containers.get(&record.spec.id)) else { continue };
            let memory = status.working_set.or(status.memory).unwrap_or_default();
            kept.sample(&record.spec.id, host, memory, status.cpu_usec.unwrap_or_default(), now);
        }
        there.sort();
        kept.containers.retain(|id, _| there.binary_search(id).is_ok());
        for (name, host) in &world.hosts {
            let owned = on.get(name).into_iter().flatten().copied();
            let load = kept.load(owned, host.facts.memory, host.facts.cpus);
            let too_much = load.cpu_permille >= policy.cpu_threshold_permille
                || load.memory_permille >= policy.memory_threshold_permille;
            kept.hold(name, too_much && core.links.connected(name), now);
        }
        kept.overloaded.retain(|host, _| world.hosts.contains_key(host));
    }

    pub fn usage(&self, id: &ContainerId) -> Usage {
        locked(&self.kept).containers.get(id).map(|measured| measured.usage).unwrap_or_default()
    }

    /// What these containers would use of a host with so much memory and CPU.
    pub fn load<'a>(&self, ids: impl Iterator<Item = &'a ContainerId>, memory: Bytes, cpus: MilliCpu) -> Load {
        locked(&self.kept).load(ids, memory, cpus)
    }

    /// For how long it has been too much for a host, in milliseconds; `None`: it is not.
    pub fn overloaded_ms(&self, host: &HostName) -> Option<u64> {
        let since = *locked(&self.kept).overloaded.get(host)?;
        Some(u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

impl Kept {
    /// A container that has come from another host is counted with what it used there until it was measured here.
    fn sample(&mut self, id: &ContainerId, host: &HostName, memory: Bytes, cpu_usec: u64, now: Instant) {
        let first = || Measured { usage: Usage::default(), on: host.clone(), began: now, cpu_usec };
        let measured = self.containers.entry(id.clone()).or_insert_with(first);
        measured.usage.memory = memory;
        // Its counter began anew with its cgroup.
        if measured.on != *host || cpu_usec < measured.cpu_usec {
            *measured = Measured { usage: measured.usage, ..first() };
            return;
        }
        let elapsed = now.saturating_duration_since(measured.began);
        if elapsed >= Duration::from_millis(WINDOW_MS) {
            let used_usec = u128::from(cpu_usec - measured.cpu_usec);
            let milli = used_usec * 1000 / elapsed.as_micros().max(1);
            measured.usage.cpu = MilliCpu(u32::try_from(milli).unwrap_or(u32::MAX));
            measured.began = now;
            measured.cpu_usec = cpu_usec;
        }
    }

    fn load<'a>(&self, ids: impl Iterator<Item = &'a ContainerId>, memory: Bytes, cpus: MilliCpu) -> Load {
        let used = ids.filter_map(|id| self.containers.get(id)).map(|measured| measured.usage);
        let (bytes, milli) = used.fold((0u128, 0u128), |(bytes, milli), usage| {
            (bytes + u128::from(usage.memory.0), milli + u128::from(usage.cpu.0))
        });
        let permille = |used: u128, whole: u128| (used * 1000 / whole.max(1)).min(1000) as u16;
        Load { cpu_permille: permille(milli, cpus.0.into()), memory_permille: permille(bytes, memory.0.into()) }
    }

    fn hold(&mut self, host: &HostName, too_much: bool, now: Instant) {
        if too_much {
            self.overloaded.entry(host.clone()).or_insert(now);
        } else {
            self.overloaded.remove(host);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    #[test]
    fn cpu_is_measured_over_a_window_and_kept_across_a_move() {
        let (mut kept, begin) = (Kept::default(), Instant::now());
        let id: ContainerId = "0123456789ab".parse().unwrap();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let cpu = |kept: &Kept| kept.containers[&id].usage.cpu;
        kept.sample(&id, &host("h1"), Bytes(7), 100, at(0));
        kept.sample(&id, &host("h1"), Bytes(8), 900_000, at(1));
        assert_eq!((cpu(&kept), kept.containers[&id].usage.memory), (MilliCpu(0), Bytes(8)));
        kept.sample(&id, &host("h1"), Bytes(8), 5_000_100, at(10));
        assert_eq!(cpu(&kept), MilliCpu(500));
        // On the other host its counter begins anew, and it is as busy as it was.
        kept.sample(&id, &host("h2"), Bytes(8), 0, at(11));
        assert_eq!(cpu(&kept), MilliCpu(500));
        kept.sample(&id, &host("h2"), Bytes(8), 10_000_000, at(21));
        assert_eq!(cpu(&kept), MilliCpu(1000));
        let load = kept.load([&id].into_iter(), Bytes(32), MilliCpu(4000));
        assert_eq!(load, Load { cpu_permille: 250, memory_permille: 250 });
    }

    #[test]
    fn a_single_peak_ends_the_time_of_overload() {
        let (mut kept, begin) = (Kept::default(), Instant::now());
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        kept.hold(&host("h1"), true, at(0));
        kept.hold(&host("h1"), true, at(9));
        assert_eq!(kept.overloaded[&host("h1")], at(0));
        kept.hold(&host("h1"), false, at(10));
        kept.hold(&host("h1"), true, at(11));
        assert_eq!(kept.overloaded[&host("h1")], at(11));
    }
}
