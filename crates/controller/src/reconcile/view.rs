//! What placement sees: the store's records and the links, as `godwit_plan` wants them.

use std::collections::BTreeMap;

use godwit_model::container::{ContainerStatus, Movable};
use godwit_model::migration::Outcome;
use godwit_model::{ContainerId, ContainerName, HostName};
use godwit_plan::{Container, Fleet, Host, Machine, NO_CRIU};

use super::held::{self, Spared};
use crate::core::Core;
use crate::moves::why_unmovable;
use crate::state::records::{ContainerRecord, EnvRecord};
use crate::state::{Shared, World};

/// The fleet as plans see it: who is where, what moves where, what cannot move and why, and what room is held.
pub fn fleet(core: &Core, world: &World) -> Fleet {
    fleet_but(core, world, Spared::default())
}

/// The same without the room that is held for these.
pub fn fleet_but(core: &Core, world: &World, spared: Spared<'_>) -> Fleet {
    let mut fleet = fleet_as_it_is(core, world);
    held::count(core, world, spared, &mut fleet);
    fleet
}

fn fleet_as_it_is(core: &Core, world: &World) -> Fleet {
    let mut fleet = Fleet::new();
    for (name, record) in &world.hosts {
        let facts = &record.facts;
        let line = facts.criu.as_deref().map_or(NO_CRIU, |version| version.split('.').next().unwrap_or(version));
        let machine = Machine {
            architecture: facts.architecture.clone(),
            criu_line: Some(line.to_owned()),
            features: facts.cpu_features.iter().cloned().collect(),
        };
        let connected = core.links.connected(name);
        let host = Host::new(name.clone(), facts.memory, facts.cpus);
        fleet.set_host(Host { state: record.state, connected, machine, labels: facts.labels.clone(), ..host });
    }
    let mut moving: BTreeMap<&ContainerId, Vec<&HostName>> = BTreeMap::new();
    for open in world.open_moves().filter(|m| m.outcome == Outcome::Moving) {
        moving.entry(&open.container).or_default().push(&open.to);
    }
    for container in world.containers.values() {
        let name = container.name();
        fleet.set_container(member(core, world, container, None));
        let moving = moving.get(&container.spec.id).into_iter().flatten().copied();
        let also = container.leaving.iter().map(|l| &l.host).chain(moving);
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

/// A container with the rules of its layer. `seen`: what its host says at this moment of whether it can move, newer than
/// the last report.
pub fn member(core: &Core, world: &World, container: &ContainerRecord, seen: Option<&Movable>) -> Container {
    let name = container.name();
    let layer = world.envs.get(&name.env).and_then(|env| env.manifest.layers.get(&name.layer));
    // A layer that is gone has no rules; what is left of it goes, too.
    let (spread, rules) = layer.map(|layer| (layer.spread, layer.rules.clone())).unwrap_or_default();
    let resources = &container.spec.resources;
    let report = container.owner().and_then(|host| core.links.report(host));
    let status = report.as_ref().and_then(|r| r.containers.get(&container.spec.id));
    Container {
        max_per_host: rules.max_per_host,
        apart: rules.apart,
        near: rules.near,
        labels: rules.require,
        importance: rules.importance,
        may_recreate_volumes: rules.volumes_may_be_lost,
        image: container.spec.image.clone(),
        volumes_on: container.volumes_on.clone(),
        unmovable: unmovable(world, container, status, seen),
        used_memory: status.and_then(|s| s.memory).unwrap_or_default(),
        bytes: status.and_then(|s| s.memory).unwrap_or_default(),
        ..Container::new(name.clone(), resources.reserved_memory, resources.reserved_cpu, spread)
    }
}

/// By what containers are sorted before they are placed: what others must be near comes before them.
pub fn turn(world: &World, name: &ContainerName) -> (usize, ContainerName) {
    // A layer has more companions than any that it is near.
    let companions = |env: &Shared<EnvRecord>| env.manifest.companions(&name.layer).count();
    (world.envs.get(&name.env).map_or(0, companions), name.clone())
}

fn unmovable(
    world: &World,
    container: &ContainerRecord,
    status: Option<&ContainerStatus>,
    seen: Option<&Movable>,
) -> Vec<String> {
    let mut because = why_unmovable(status, seen);
    if let Some(host) = container.owner().and_then(|host| world.hosts.get(host))
        && host.facts.criu.is_none()
    {
        because.push(format!("its host {} has no usable CRIU; `godwit doctor` there says why", host.facts.name));
    }
    because
}
