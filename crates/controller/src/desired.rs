//! What one host shall be, from the store alone: complete, level-triggered, the same for the same snapshot.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use godwit_api::link::{Assignment, Desired, EndpointSpec, MoveRef, MoveRole, NetworkSpec, PortSpec};
use godwit_model::HostName;
use godwit_model::migration::Outcome;

use crate::state::World;
use crate::state::records::{ContainerRecord, EnvRecord, SUBNET_PREFIX_LEN};

/// Everything `host` shall be at this snapshot.
pub fn desired(world: &World, host: &HostName) -> Desired {
    let containers = world.containers.values().filter(|c| c.owner() == Some(host));
    let moves = world.open_moves().filter(|m| m.from == *host || m.to == *host);
    Desired {
        store_id: world.store_id.clone(),
        revision: world.revision.0,
        containers: containers
            .map(|c| Assignment {
                spec: c.spec.clone(),
                generation: c.generation,
                run: c.run,
                start_count: c.start_count,
            })
            .collect(),
        volumes: volumes(world, host),
        networks: world.envs.values().filter_map(|env| network(world, env, host)).collect(),
        hosts: world.hosts.values().map(|h| h.facts.tunnel_address).collect(),
        moving: world
            .open_moves()
            .filter_map(|m| world.containers.get(&m.name).filter(|c| c.spec.id == m.container))
            .map(|c| c.spec.network.mac)
            .collect(),
        moves: moves
            .map(|m| MoveRef {
                id: m.id.clone(),
                container: m.container.clone(),
                role: if m.from == *host { MoveRole::Source } else { MoveRole::Destination },
                handed_over: m.outcome == Outcome::HandedOver,
            })
            .collect(),
    }
}

fn volumes(world: &World, host: &HostName) -> Vec<godwit_model::ContainerName> {
    let waiting = world.containers.values().filter(|c| !c.removed && c.host.is_none());
    let kept = waiting.filter(|c| c.volumes_on.as_ref() == Some(host)).map(|c| c.name().clone());
    let arriving = world.open_moves().filter(|m| m.to == *host && m.outcome == Outcome::Moving).map(|m| m.name.clone());
    kept.chain(arriving).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The hosts on which an environment's network exists: where its containers are, come from or go to; all of them if
/// it publishes ports, because a published port answers on every host.
pub fn members<'a>(world: &'a World, env: &'a EnvRecord) -> BTreeSet<&'a HostName> {
    if env.manifest.layers.values().any(|layer| !layer.ports.is_empty()) && !env.deleted {
        return world.hosts.keys().collect();
    }
    let name = &env.manifest.name;
    let moves = world.open_moves().filter(|m| m.name.env == *name);
    let here = world.containers_of(name).flat_map(|c| c.host.iter().chain(c.leaving.iter().map(|l| &l.host)));
    here.chain(moves.flat_map(|m| [&m.from, &m.to])).collect()
}

fn network(world: &World, env: &EnvRecord, host: &HostName) -> Option<NetworkSpec> {
    let members = members(world, env);
    if !members.contains(host) {
        return None;
    }
    let own = world.hosts.get(host)?;
    let tunnel = |name: &HostName| world.hosts.get(name).map(|h| h.facts.tunnel_address);
    let placed: Vec<&ContainerRecord> =
        world.containers_of(&env.manifest.name).map(|c| &c.value).filter(|c| c.owner().is_some()).collect();
    Some(NetworkSpec {
        env: env.manifest.name.to_string(),
        vni: env.vni(),
        subnet: env.subnet(),
        prefix_len: SUBNET_PREFIX_LEN,
        gateway: env.gateway(),
        host_address: env.host_address(own.index),
        remotes: members.iter().filter(|name| **name != host).filter_map(|name| tunnel(name)).collect(),
        endpoints: placed.iter().filter_map(|c| endpoint(env, c, host, &tunnel)).collect(),
        ports: ports(env, &placed),
    })
}

fn endpoint(
    env: &EnvRecord,
    container: &ContainerRecord,
    host: &HostName,
    tunnel: &impl Fn(&HostName) -> Option<Ipv4Addr>,
) -> Option<EndpointSpec> {
    let owner = container.owner()?;
    let remote = if owner == host { None } else { Some(tunnel(owner)?) };
    let name = container.name();
    let mut names = vec![name.local()];
    // A container that was stopped keeps its own name; the layer's names lead to those that answer.
    if container.run {
        names.push(name.layer.to_string());
        names.extend(env.manifest.layers.get(&name.layer).into_iter().flat_map(|layer| layer.aliases.iter().cloned()));
    }
    let network = &container.spec.network;
    Some(EndpointSpec {
        container: container.spec.id.clone(),
        mac: network.mac,
        address: network.address,
        remote,
        names,
    })
}

fn ports(env: &EnvRecord, placed: &[&ContainerRecord]) -> Vec<PortSpec> {
    if env.deleted {
        return Vec::new();
    }
    let mut ports = Vec::new();
    for (name, layer) in &env.manifest.layers {
        let members = placed.iter().filter(|c| c.name().layer == *name && c.run);
        let addresses: Vec<Ipv4Addr> = members.map(|c| c.spec.network.address).collect();
        ports.extend(layer.ports.iter().map(|port| PortSpec {
            host_port: port.host_port,
            udp: port.udp,
            targets: addresses.iter().map(|address| (*address, port.container_port)).collect(),
        }));
    }
    ports
}
