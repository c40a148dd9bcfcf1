//! The rules, counted anew on the hosts that an event has touched. Nothing here asks `godwit_plan` what it thinks.

use std::collections::{BTreeMap, BTreeSet};

use godwit_model::HostName;
use godwit_model::manifest::Spread;
use godwit_plan::{CPU_OVERCOMMIT, Fleet};

/// What is wrong on a host; `None`: nothing.
pub fn broken(fleet: &Fleet, name: &HostName) -> Option<String> {
    let host = fleet.host(name)?;
    let here = fleet.containers_on(name);
    let memory: u64 = here.iter().map(|c| c.reserved_memory.0).sum();
    if memory > host.memory.0 {
        return Some(format!("{memory} bytes are reserved of {}", host.memory.0));
    }
    let cpu: u64 = here.iter().map(|c| u64::from(c.reserved_cpu.0)).sum();
    if cpu > u64::from(host.cpu.0) * u64::from(CPU_OVERCOMMIT) {
        return Some(format!("{cpu} thousandths of a core are reserved of {CPU_OVERCOMMIT} times {}", host.cpu.0));
    }
    let mut layers = BTreeMap::<_, u32>::new();
    let mut groups = BTreeSet::new();
    for c in here {
        let count = layers.entry((&c.name.env, &c.name.layer)).or_default();
        *count += 1;
        if c.spread == Spread::Strict && *count > 1 {
            return Some(format!("{} is not alone of its layer", c.name));
        }
        if let Some(group) = c.apart.iter().find(|group| !groups.insert((*group).clone())) {
            return Some(format!("{} is not alone of the group {group}", c.name));
        }
        if c.labels.iter().any(|(label, value)| host.labels.get(label) != Some(value)) {
            return Some(format!("{} wants labels that are not there", c.name));
        }
    }
    None
}

/// Containers that are to be spread and share their host with another of their layer.
pub fn doubled(fleet: &Fleet) -> usize {
    let mut doubled = 0;
    for host in fleet.hosts() {
        let mut layers = BTreeMap::<_, usize>::new();
        for c in fleet.containers_on(&host.name).iter().filter(|c| c.spread != Spread::None) {
            *layers.entry((&c.name.env, &c.name.layer)).or_default() += 1;
        }
        doubled += layers.values().filter(|n| **n > 1).sum::<usize>();
    }
    doubled
}
