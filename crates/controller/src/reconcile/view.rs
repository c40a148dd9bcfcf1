//! What placement sees: the store's records and the links, as `godwit_plan` wants them.

use godwit_model::HostName;
use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::migration::Outcome;
use godwit_plan::{Container, Fleet, Host, HostView, Machine, Placed, Request, View};

use crate::core::Core;
use crate::moves::why_unmovable;
use crate::state::World;
use crate::state::records::ContainerRecord;

/// Every host with what is there, on its way there, or not gone yet.
pub fn plan_view(core: &Core, world: &World) -> View {
    View { hosts: world.hosts.keys().filter_map(|name| host(core, world, name)).collect() }
}

fn host(core: &Core, world: &World, name: &HostName) -> Option<HostView> {
    let record = world.hosts.get(name)?;
    let arriving = |c: &ContainerRecord| {
        world.open_moves().any(|m| m.container == c.spec.id && m.to == *name && m.outcome == Outcome::Moving)
    };
    let leaving = |c: &ContainerRecord| c.leaving.iter().any(|l| l.host == *name);
    let here = world.containers.values().filter(|c| c.host.as_ref() == Some(name) || arriving(c) || leaving(c));
    Some(HostView {
        name: name.clone(),
        active: record.state == HostState::Active,
        connected: core.links.connected(name),
        memory: record.facts.memory,
        cpu: record.facts.cpus,
        placed: here.map(|c| placed(c)).collect(),
    })
}

/// The fleet as plans see it: who is where, what moves where, what cannot move and why.
pub fn fleet(core: &Core, world: &World) -> Fleet {
    let mut fleet = Fleet::new();
    for (name, record) in &world.hosts {
        let facts = &record.facts;
        // A host without CRIU has none of its versions: nothing moves to it, or from it.
        let line = facts.criu.as_deref().map_or("none", |version| version.split('.').next().unwrap_or(version));
        let machine = Machine {
            architecture: facts.architecture.clone(),
            criu_line: Some(line.to_owned()),
            features: facts.cpu_features.iter().cloned().collect(),
        };
        let connected = core.links.connected(name);
        let host = Host::new(name.clone(), facts.memory, facts.cpus);
        fleet.set_host(Host { state: record.state, connected, machine, labels: facts.labels.clone(), ..host });
    }
    for container in world.containers.values() {
        let name = container.name();
        fleet.set_container(member(core, world, container));
        let moving = world.open_moves().filter(|m| m.container == container.spec.id && m.outcome == Outcome::Moving);
        let also = container.leaving.iter().map(|l| &l.host).chain(moving.map(|m| &m.to));
        // A host that the world does not have holds no room.
        let known = |host: &&HostName| world.hosts.contains_key(*host);
        let result = (container.host.iter().filter(known).try_for_each(|host| fleet.put(name, host)))
            .and_then(|()| also.filter(known).try_for_each(|host| fleet.claim(name, host)));
        if let Err(error) = result {
            tracing::error!(%error, "a container is missing in what plans see");
        }
    }
    fleet
}

fn member(core: &Core, world: &World, container: &ContainerRecord) -> Container {
    let request = request(world, container);
    let resources = &container.spec.resources;
    let report = container.owner().and_then(|host| core.links.report(host));
    let status = report.as_ref().and_then(|r| r.containers.get(&container.spec.id));
    let plain = Container::new(request.name, resources.reserved_memory, resources.reserved_cpu, request.spread);
    Container {
        volumes_on: request.only,
        unmovable: why_unmovable(status, None),
        used_memory: status.and_then(|s| s.memory).unwrap_or_default(),
        bytes: status.and_then(|s| s.memory).unwrap_or_default(),
        ..plain
    }
}

pub fn placed(container: &ContainerRecord) -> Placed {
    Placed {
        name: container.name().clone(),
        reserved_memory: container.spec.resources.reserved_memory,
        reserved_cpu: container.spec.resources.reserved_cpu,
    }
}

/// What a container asks of its place.
pub fn request(world: &World, container: &ContainerRecord) -> Request {
    let name = container.name();
    let layer = world.envs.get(&name.env).and_then(|env| env.manifest.layers.get(&name.layer));
    Request {
        name: name.clone(),
        resources: container.spec.resources,
        spread: layer.map_or(Spread::default(), |layer| layer.spread),
        only: container.volumes_on.clone(),
        not: None,
    }
}
