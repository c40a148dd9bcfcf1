//! A fleet in short, for a caller that has no [`Fleet`] at hand: hosts with what is on them.

use godwit_model::container::Resources;
use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, ContainerName, HostName, MilliCpu};

use crate::draft::Draft;
use crate::fleet::{Container, Fleet, Host};
use crate::place::{Placement, Refusal};
use crate::rules::{Ask, Why};

/// Every host and everything placed on them, moves in flight included on both sides.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct View {
    pub hosts: Vec<HostView>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HostView {
    pub name: HostName,
    /// Takes new containers: not cordoned.
    pub active: bool,
    pub connected: bool,
    pub memory: Bytes,
    pub cpu: MilliCpu,
    pub placed: Vec<Placed>,
}

/// One container that has a place on a host.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub name: ContainerName,
    pub reserved_memory: Bytes,
    pub reserved_cpu: MilliCpu,
}

/// One container that needs a place.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub name: ContainerName,
    pub resources: Resources,
    pub spread: Spread,
    /// Only this host will do (its volumes are there); `None`: any.
    pub only: Option<HostName>,
    /// Not this host (it is to be moved away from there).
    pub not: Option<HostName>,
}

impl From<&View> for Fleet {
    fn from(view: &View) -> Self {
        let mut fleet = Self::new();
        for host in &view.hosts {
            let state = if host.active { HostState::Active } else { HostState::Cordoned };
            let connected = host.connected;
            fleet.set_host(Host { state, connected, ..Host::new(host.name.clone(), host.memory, host.cpu) });
        }
        for host in &view.hosts {
            for placed in &host.placed {
                let (memory, cpu) = (placed.reserved_memory, placed.reserved_cpu);
                if fleet.container(&placed.name).is_none() {
                    fleet.set_container(Container::new(placed.name.clone(), memory, cpu, Spread::None));
                }
                let claimed = fleet.claim(&placed.name, &host.name);
                debug_assert!(claimed.is_ok(), "both were added above");
            }
        }
        fleet
    }
}

impl Request {
    fn container(&self) -> Container {
        let (memory, cpu) = (self.resources.reserved_memory, self.resources.reserved_cpu);
        Container { volumes_on: self.only.clone(), ..Container::new(self.name.clone(), memory, cpu, self.spread) }
    }
}

fn ask<'a>(fleet: &Fleet, container: &'a Container, request: &Request) -> Ask<'a> {
    let not = request.not.as_ref().and_then(|host| fleet.host_ids.get(host).copied());
    Ask { not, ..Ask::start(fleet, container) }
}

/// Picks the host for one container; a tie goes to the first name.
pub fn place(view: &View, request: &Request) -> Result<Placement, Refusal> {
    let (fleet, container) = (Fleet::from(view), request.container());
    Draft::new(&fleet).place(&ask(&fleet, &container, request))
}

/// Whether the hard rules let this host take the container; all the reasons if not.
pub fn check(host: &HostView, request: &Request) -> Result<(), Vec<String>> {
    let fleet = Fleet::from(&View { hosts: vec![host.clone()] });
    let mut reasons = Vec::new();
    if request.only.as_ref().is_some_and(|only| *only != host.name) {
        reasons.push(Why::VolumesElsewhere.to_string());
    }
    let request = Request { only: None, ..request.clone() };
    let container = request.container();
    for id in fleet.host_ids.values() {
        reasons.extend(Draft::new(&fleet).reasons_against(*id, &ask(&fleet, &container, &request)));
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}
