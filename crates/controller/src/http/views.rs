//! What people see: the store's records and the hosts' reports, put together. No I/O.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_api::types::{ContainerView, EnvironmentView, EvacuationView, GrowthView, HostView, LayerView};
use godwit_lease::Held;
use godwit_model::container::{ContainerState, ContainerStatus};
use godwit_model::host::HostState;
use godwit_model::manifest::PublishedPort;
use godwit_model::migration::{Move, Outcome};
use godwit_model::{Bytes, ContainerId, ContainerName, EnvName, HostName, LayerName, MilliCpu};

use crate::core::Core;
use crate::links::HostReport;
use crate::state::World;
use crate::state::records::{ContainerRecord, EnvRecord, HostRecord, Leaving, SUBNET_PREFIX_LEN};

/// The state of a container that is to go; see [`ContainerView::state`] for the others.
pub const REMOVING: &str = "removing";

/// Everything that views are made from, as of one moment.
#[derive(Default)]
pub struct Sight {
    pub world: Arc<World>,
    /// What each host that has been linked since the controller started last said.
    pub reports: BTreeMap<HostName, Arc<HostReport>>,
    /// Why containers have no host.
    pub waiting: BTreeMap<ContainerName, String>,
    /// Why containers of lost hosts are not started elsewhere.
    pub stranded: BTreeMap<ContainerName, String>,
    /// Why silent hosts do not count as lost yet.
    pub may_run: BTreeMap<HostName, String>,
    /// Why containers that are to grow cannot.
    pub not_growing: BTreeMap<ContainerName, String>,
    /// Moves that are not over, with their progress.
    pub moves: BTreeMap<ContainerId, Move>,
}

impl Sight {
    pub fn of(core: &Core) -> Self {
        let world = core.state.world();
        let reports = world.hosts.keys().filter_map(|h| Some((h.clone(), core.links.report(h)?))).collect();
        let unplaced = world.containers.iter().filter(|(_, c)| c.host.is_none());
        let waiting = unplaced.filter_map(|(name, _)| Some((name.clone(), core.waiting.reason(name)?))).collect();
        let silent =
            world.hosts.values().filter(|h| h.state != HostState::Failed && !core.links.connected(&h.facts.name));
        let held = silent.filter_map(|h| Some((h.facts.name.clone(), told(&core.leases.held(h)?))));
        let may_run = held.collect();
        let stranded = core.stranded.reasons();
        let growing = world.containers.iter().filter(|(_, c)| c.growth.is_some());
        let not_growing = growing.filter_map(|(name, _)| Some((name.clone(), core.rooms.refusal(name)?))).collect();
        let moves = world.open_moves().filter_map(|m| core.moves.view(&world, &m.id));
        let moves = moves.map(|m| (m.container.clone(), m)).collect();
        Self { reports, waiting, stranded, may_run, not_growing, moves, world }
    }

    pub fn hosts(&self) -> Vec<HostView> {
        self.world.hosts.values().map(|host| self.host(host)).collect()
    }

    fn host(&self, host: &HostRecord) -> HostView {
        let name = &host.facts.name;
        let report = self.reports.get(name);
        let mut view = HostView {
            name: name.clone(),
            // Silent, and not lost yet: what it has may run.
            state: match host.state {
                HostState::Failed => HostState::Failed,
                _ if report.is_some_and(|r| !r.connected) => HostState::Suspect,
                state => state,
            },
            connected: report.is_some_and(|r| r.connected),
            last_seen_ms: report.and_then(|r| r.last_seen_ms),
            facts: host.facts.clone(),
            containers: 0,
            reserved_memory: Bytes(0),
            reserved_cpu: MilliCpu(0),
            cloudlets: host.facts.cloudlets(),
            evacuation: None,
            may_run: self.may_run.get(name).cloned(),
        };
        for container in self.world.containers.values() {
            let owned = container.owner() == Some(name);
            view.containers += u32::from(owned);
            // As placement counts: also what is on its way here, or not gone yet.
            let arriving = self.moves.get(&container.spec.id);
            let arriving = arriving.is_some_and(|m| m.to == *name && m.outcome == Outcome::Moving);
            let growing = container.growth.as_ref().filter(|g| g.host.as_ref() == Some(name) && !container.removed);
            if owned || arriving || growing.is_some() || container.leaving.iter().any(|l| l.host == *name) {
                let resources = growing.map_or(&container.spec.resources, |growth| &growth.resources);
                view.reserved_memory.0 = view.reserved_memory.0.saturating_add(resources.reserved_memory.0);
                view.reserved_cpu.0 = view.reserved_cpu.0.saturating_add(resources.reserved_cpu.0);
            }
        }
        view.evacuation = host.evacuation.as_ref().map(|evacuation| EvacuationView {
            requested_at_ms: evacuation.requested_at_ms,
            total: evacuation.total,
            left: view.containers,
            stays: evacuation.stays.clone(),
        });
        view
    }

    /// Those being deleted are there until their last container is gone.
    pub fn environments(&self) -> Vec<EnvironmentView> {
        self.world.envs.values().map(|env| self.environment(env)).collect()
    }

    pub fn environment(&self, env: &EnvRecord) -> EnvironmentView {
        let name = &env.manifest.name;
        let containers = self.containers(Some(name));
        let layers = env.manifest.layers.iter().map(|(layer, wanted)| LayerView {
            name: layer.clone(),
            image: wanted.image.clone(),
            wanted: if env.deleted { 0 } else { wanted.replicas },
            running: self.running(name, layer),
            ports: wanted.ports.iter().map(port).collect(),
        });
        EnvironmentView {
            name: name.clone(),
            manifest: env.manifest.clone(),
            vni: env.vni(),
            subnet: format!("{}/{SUBNET_PREFIX_LEN}", env.subnet()),
            layers: layers.collect(),
            containers,
        }
    }

    /// How many containers of a layer run, as far as their hosts can be heard.
    fn running(&self, env: &EnvName, layer: &LayerName) -> u32 {
        let members = self.world.containers_of(env).filter(|c| c.name().layer == *layer && !c.removed);
        let running = members.filter(|c| {
            let heard = self.report_of(c).is_some_and(|r| r.connected);
            let state = self.status_of(c).map(|s| s.state);
            heard && matches!(state, Some(ContainerState::Running | ContainerState::Frozen))
        });
        u32::try_from(running.count()).unwrap_or(u32::MAX)
    }

    pub fn containers(&self, env: Option<&EnvName>) -> Vec<ContainerView> {
        let all = self.world.containers.values();
        all.filter(|c| env.is_none_or(|env| c.name().env == *env)).map(|c| self.container(c)).collect()
    }

    pub fn container(&self, container: &ContainerRecord) -> ContainerView {
        let (state, message) = self.state(container);
        let status = self.status_of(container).cloned();
        let heard = self.report_of(container).is_some_and(|r| r.connected);
        ContainerView {
            id: container.spec.id.clone(),
            name: container.name().clone(),
            image: container.spec.image.clone(),
            address: container.spec.network.address,
            host: container.host.clone(),
            generation: container.generation,
            state: state.to_owned(),
            message,
            health: status.as_ref().filter(|_| heard).and_then(|s| s.health),
            wanted_running: container.run,
            resources: container.spec.resources,
            status,
            moving: self.moving(container).map(|m| m.id.clone()).or_else(|| container.moving.clone()),
            growth: container.growth.as_ref().map(|growth| GrowthView {
                resources: growth.resources,
                requested_at_ms: growth.requested_at_ms,
                host: growth.host.clone(),
                refused: self.not_growing.get(container.name()).cloned(),
            }),
        }
    }

    fn moving(&self, container: &ContainerRecord) -> Option<&Move> {
        self.moves.get(&container.spec.id).filter(|_| !container.removed)
    }

    fn report_of(&self, container: &ContainerRecord) -> Option<&HostReport> {
        container.host.as_ref().and_then(|host| self.reports.get(host)).map(|report| &**report)
    }

    /// What its host last said of it, unless that was about an earlier owner's copy.
    fn status_of(&self, container: &ContainerRecord) -> Option<&ContainerStatus> {
        let status = self.report_of(container)?.containers.get(&container.spec.id);
        status.filter(|status| status.generation >= container.generation)
    }

    /// The state, and what a person may want to know about it.
    fn state(&self, container: &ContainerRecord) -> (&'static str, Option<String>) {
        if container.removed {
            let message = format!("waits until {} have removed it", hosts(&container.leaving));
            return (REMOVING, Some(message).filter(|_| !container.leaving.is_empty()));
        }
        let Some(host) = &container.host else { return self.without_host(container) };
        if let Some(moving) = self.moving(container) {
            return ("moving", Some(format!("from {} to {}: {}", moving.from, moving.to, moving.phase)));
        }
        if container.moving.is_some() {
            return ("moving", None);
        }
        if self.world.hosts.get(host).is_some_and(|h| h.state == HostState::Failed) {
            let why = self.stranded.get(container.name()).map_or("it starts elsewhere", String::as_str);
            return ("waiting", Some(format!("{host} is lost: {why}")));
        }
        let Some(report) = self.report_of(container) else {
            return ("unknown", Some(format!("{host} has not connected since the controller started")));
        };
        if !report.connected {
            return ("unknown", Some(silent(host, report.last_seen_ms)));
        }
        match self.status_of(container) {
            Some(status) => (status.state.as_str(), status.message.clone()),
            None if report.current => (ContainerState::Preparing.as_str(), None),
            None => ("unknown", Some(format!("{host} has just connected and has not reported yet"))),
        }
    }

    fn without_host(&self, container: &ContainerRecord) -> (&'static str, Option<String>) {
        if !container.leaving.is_empty() {
            let message = format!("waits until {} have removed what it replaces", hosts(&container.leaving));
            return ("waiting", Some(message));
        }
        if !container.run {
            return (ContainerState::Stopped.as_str(), None);
        }
        ("waiting", self.waiting.get(container.name()).cloned())
    }
}

fn told(held: &Held) -> String {
    match held {
        Held::For { ms } => format!("its lease may last {} s more", ms.div_ceil(1_000)),
        Held::WithoutEnd => "it has no lease that ends: only a person can know that it is dead".to_owned(),
        Held::NoMajority { known, of } => {
            format!("only {known} of the {of} hosts that it may have asked are known to have had this controller")
        }
        Held::Seized => "it is being called lost".to_owned(),
    }
}

fn hosts(leaving: &[Leaving]) -> String {
    let mut names: Vec<&str> = leaving.iter().map(|l| l.host.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

fn silent(host: &HostName, last_seen_ms: Option<u64>) -> String {
    let last_seen = last_seen_ms.and_then(|ms| i64::try_from(ms / 1000).ok());
    match last_seen.and_then(|s| jiff::Timestamp::from_second(s).ok()) {
        Some(at) => format!("{host} is not connected, it was last heard at {at}"),
        None => format!("{host} is not connected"),
    }
}

fn port(port: &PublishedPort) -> String {
    format!("{}:{}/{}", port.host_port, port.container_port, if port.udp { "udp" } else { "tcp" })
}

#[cfg(test)]
mod tests;
