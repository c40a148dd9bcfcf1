//! The hard rules: what keeps a container off a host. There is one list of them, for every kind of decision.

use std::fmt;
use std::ops::ControlFlow;

use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, MilliCpu};

use crate::draft::Draft;
use crate::fleet::{CPU_OVERCOMMIT, Container, Fleet, HostId, LooseTies, MachineId, MemberId};
use crate::step::How;

/// Who wants a place, and what is asked of it.
#[derive(Debug, Clone)]
pub(crate) struct Ask<'a> {
    pub container: &'a Container,
    pub ties: LooseTies,
    /// Itself, which does not stand in its own way.
    pub own: Option<MemberId>,
    /// Bytes.
    pub memory: u64,
    /// Thousandths of a core.
    pub cpu: u64,
    pub only: Option<HostId>,
    /// Its volumes are on a host that the fleet does not have.
    pub volumes_lost: bool,
    pub not: Option<HostId>,
    /// Only these hosts; empty: any.
    pub among: &'a [HostId],
    /// It comes running from such a machine.
    pub from: Option<MachineId>,
    /// Layers that come along to the same host.
    pub along: &'a [crate::fleet::LayerId],
}

impl<'a> Ask<'a> {
    /// A new start of a container, which the fleet may know or not.
    pub fn start(fleet: &Fleet, container: &'a Container) -> Self {
        let volumes = container.volumes_on.as_ref();
        let only = volumes.and_then(|host| fleet.host_ids.get(host).copied());
        Self {
            container,
            ties: fleet.tables.loose_ties(container),
            own: fleet.member_ids.get(&container.name).copied(),
            memory: container.reserved_memory.0,
            cpu: u64::from(container.reserved_cpu.0),
            only,
            volumes_lost: volumes.is_some() && only.is_none(),
            not: None,
            among: &[],
            from: None,
            along: &[],
        }
    }
}

impl<'f> Draft<'f> {
    /// A move of a container from where the fleet has it, however far the draft has got. Its volumes come along if it
    /// moves live.
    pub fn ask(&self, member: MemberId, how: How) -> Ask<'f> {
        let known = self.member(member);
        let (memory, cpu) = self.size(member);
        let from = known.home.filter(|_| how == How::Live);
        Ask {
            container: &known.container,
            ties: LooseTies::from(&known.ties),
            own: Some(member),
            memory,
            cpu,
            only: None,
            volumes_lost: false,
            not: known.home,
            among: &[],
            from: from.map(|home| self.slot(home).machine),
            along: &[],
        }
    }

    /// The same, to one of these hosts; empty: to any.
    pub fn among<'a>(ask: Ask<'a>, hosts: &'a [HostId]) -> Ask<'a> {
        Ask { among: hosts, ..ask }
    }
}

/// One reason against one host.
#[derive(Debug, Clone)]
pub(crate) enum Why<'a> {
    VolumesElsewhere,
    VolumesLost,
    ThereAlready,
    NotAmong,
    NotConnected,
    State(HostState),
    Closed,
    Memory { need: u64, free: u64 },
    Cpu { need: u64, free: u64, capacity: u64 },
    LayerStrict(&'a Container),
    LayerFull { container: &'a Container, there: u32, most: u32 },
    Group(&'a str),
    Near(&'a str),
    Label { label: &'a str, value: &'a str },
    Machine(String),
}

impl fmt::Display for Why<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus = |milli: u64| MilliCpu(milli.min(u64::from(u32::MAX)) as u32);
        match self {
            Self::VolumesElsewhere => f.write_str("its volumes are on another host"),
            Self::VolumesLost => f.write_str("its volumes are on a host that is gone"),
            Self::ThereAlready => f.write_str("it is there already"),
            Self::NotAmong => f.write_str("it is not among the hosts that were named"),
            Self::NotConnected => f.write_str("its agent is not connected"),
            Self::State(state) => write!(f, "it takes no new containers ({})", state.as_str()),
            Self::Closed => f.write_str("it takes no new containers (it is to be emptied)"),
            Self::Memory { need, free } => {
                write!(f, "{} of memory is reserved for it and {} is free", Bytes(*need), Bytes(*free))
            }
            Self::Cpu { need, free, capacity } => write!(
                f,
                "{} CPUs are reserved for it and {} of {} are free ({CPU_OVERCOMMIT} times the cores)",
                cpus(*need),
                cpus(*free),
                cpus(*capacity)
            ),
            Self::LayerStrict(c) => {
                write!(f, "another container of the layer {} is there, and the layer is spread strictly", c.name.layer)
            }
            Self::LayerFull { container, there, most } => {
                write!(f, "{there} of the layer {} are there, and {most} is the most on one host", container.name.layer)
            }
            Self::Group(group) => write!(f, "another member of the group {group} is there, and they are kept apart"),
            Self::Near(layer) => write!(f, "no container of the layer {layer} is there, and it must be near one"),
            Self::Label { label, value } => write!(f, "it has no label {label}={value}"),
            Self::Machine(because) => f.write_str(because),
        }
    }
}

impl<'f> Draft<'f> {
    /// Every reason against the host, until `tell` has heard enough.
    pub fn against<'a>(&self, host: HostId, ask: &Ask<'a>, mut tell: impl FnMut(Why<'a>) -> ControlFlow<()>) {
        // Each arm is one rule; the closure lets `?` end at the first where that is enough.
        let _ = self.every_rule(host, ask, &mut tell);
    }

    pub fn fits(&self, host: HostId, ask: &Ask<'_>) -> bool {
        let mut fits = true;
        self.against(host, ask, |_| {
            fits = false;
            ControlFlow::Break(())
        });
        fits
    }

    pub fn reasons_against(&self, host: HostId, ask: &Ask<'_>) -> Vec<String> {
        let mut reasons = Vec::new();
        self.against(host, ask, |why| {
            reasons.push(why.to_string());
            ControlFlow::Continue(())
        });
        reasons
    }

    fn every_rule<'a>(
        &self,
        id: HostId,
        ask: &Ask<'a>,
        tell: &mut impl FnMut(Why<'a>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let slot = self.slot(id);
        let container = ask.container;
        if ask.only.is_some_and(|only| only != id) {
            tell(Why::VolumesElsewhere)?;
        }
        if ask.volumes_lost {
            tell(Why::VolumesLost)?;
        }
        if ask.not == Some(id) {
            tell(Why::ThereAlready)?;
        }
        if !ask.among.is_empty() && !ask.among.contains(&id) {
            tell(Why::NotAmong)?;
        }
        if !slot.host.connected {
            tell(Why::NotConnected)?;
        }
        if !slot.host.state.takes_containers() {
            tell(Why::State(slot.host.state))?;
        } else if self.is_closed(id) {
            tell(Why::Closed)?;
        }
        let occupied = self.occupied(id);
        let free = slot.memory_free(occupied);
        if ask.memory > free {
            tell(Why::Memory { need: ask.memory, free })?;
        }
        let free = slot.cpu_free(occupied);
        if ask.cpu > free {
            tell(Why::Cpu { need: ask.cpu, free, capacity: slot.host.cpu_capacity() })?;
        }
        if let (Some(most), Some(layer)) = (container.most_per_host(), ask.ties.layer) {
            let there = self.of_layer(id, layer, ask.own);
            if there >= most {
                match container.spread {
                    Spread::Strict => tell(Why::LayerStrict(container))?,
                    _ => tell(Why::LayerFull { container, there, most })?,
                }
            }
        }
        for (group, name) in ask.ties.groups.iter().zip(&container.apart) {
            if group.is_some_and(|group| self.of_group(id, group, ask.own) > 0) {
                tell(Why::Group(name))?;
            }
        }
        for (layer, name) in ask.ties.near.iter().zip(&container.near) {
            let there = layer.is_some_and(|l| ask.along.contains(&l) || self.of_layer(id, l, ask.own) > 0);
            if !there {
                tell(Why::Near(name.as_str()))?;
            }
        }
        for (label, value) in &container.labels {
            if slot.host.labels.get(label) != Some(value) {
                tell(Why::Label { label, value })?;
            }
        }
        if let Some(from) = ask.from.filter(|from| *from != slot.machine) {
            for because in self.fleet.tables.refusals(from, slot.machine) {
                tell(Why::Machine(because.clone()))?;
            }
        }
        ControlFlow::Continue(())
    }
}
