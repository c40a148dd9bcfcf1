//! From a layer of a manifest to the specification of one of its containers.

use godwit_model::container::{ContainerSpec, NetworkIdentity, Resources};
use godwit_model::manifest::{Layer, LayerResources};
use godwit_model::network::MacAddress;
use godwit_model::{Bytes, ContainerId, ContainerName, MilliCpu};
use std::net::Ipv4Addr;

use crate::state::records::{EnvRecord, SUBNET_PREFIX_LEN};

/// Cloudlets become CPU shares at this clock, in MHz, on every host alike, so that a container keeps its limits when
/// it moves between hosts of different speed.
pub const CLOUDLET_BASE_MHZ: u32 = 2_500;

/// What a container keeps when its specification is replaced: its address, and the owner of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeps {
    pub id_base: u32,
    pub address: Ipv4Addr,
}

/// The specification of one container; its id is new.
pub fn spec(env: &EnvRecord, name: ContainerName, layer: &Layer, keeps: Keeps) -> ContainerSpec {
    let network = NetworkIdentity {
        vni: env.vni(),
        address: keeps.address,
        prefix_len: SUBNET_PREFIX_LEN,
        gateway: env.gateway(),
        mac: MacAddress::for_container(env.vni(), keeps.address),
    };
    ContainerSpec {
        id: ContainerId::random(),
        name,
        image: layer.image.clone(),
        entrypoint: layer.entrypoint.clone(),
        command: layer.command.clone(),
        environment: layer.environment.clone(),
        working_dir: layer.working_dir.clone(),
        user: layer.user.clone(),
        read_only_root: layer.read_only_root,
        id_base: keeps.id_base,
        resources: resources(&layer.resources),
        network,
        volumes: layer.volumes.clone(),
        tmpfs: layer.tmpfs.clone(),
        host_paths: layer.host_paths.clone(),
        restart: layer.restart,
        stop_signal: layer.stop_signal.clone(),
        stop_grace_ms: layer.stop_grace_ms,
        open_files: layer.open_files,
        health: layer.health.clone(),
        labels: layer.labels.clone(),
    }
}

fn resources(from: &LayerResources) -> Resources {
    match from.cloudlets {
        Some(range) => Resources {
            memory: Some(range.limit.memory()),
            cpu: Some(range.limit.cpu(CLOUDLET_BASE_MHZ)),
            pids: from.pids,
            reserved_memory: range.reserved.memory(),
            reserved_cpu: range.reserved.cpu(CLOUDLET_BASE_MHZ),
        },
        None => Resources {
            memory: from.memory,
            cpu: from.cpu,
            pids: from.pids,
            reserved_memory: from.reserved_memory.unwrap_or_default(),
            reserved_cpu: from.reserved_cpu.unwrap_or_default(),
        },
    }
}

/// How two specifications of the same container differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    Same,
    /// Only in resources, which change in place; a sentence.
    Resources(String),
    /// In something that makes it another container; what differs.
    Replace(String),
}

pub fn difference(old: &ContainerSpec, new: &ContainerSpec) -> Difference {
    let mut changed: Vec<String> = Vec::new();
    if old.image != new.image {
        changed.push(format!("image {} → {}", old.image, new.image));
    }
    let fields = [
        ("entrypoint", old.entrypoint != new.entrypoint),
        ("command", old.command != new.command),
        ("environment", old.environment != new.environment),
        ("working directory", old.working_dir != new.working_dir),
        ("user", old.user != new.user),
        ("read-only root", old.read_only_root != new.read_only_root),
        ("volumes", old.volumes != new.volumes),
        ("tmpfs", old.tmpfs != new.tmpfs),
        ("host paths", old.host_paths != new.host_paths),
        ("restart policy", old.restart != new.restart),
        ("stop signal", old.stop_signal != new.stop_signal),
        ("stop grace period", old.stop_grace_ms != new.stop_grace_ms),
        ("open files", old.open_files != new.open_files),
        ("health check", old.health != new.health),
        ("labels", old.labels != new.labels),
        ("network", old.network != new.network || old.id_base != new.id_base),
    ];
    changed.extend(fields.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name.to_owned()));
    if !changed.is_empty() {
        return Difference::Replace(changed.join(", "));
    }
    if old.resources == new.resources {
        return Difference::Same;
    }
    Difference::Resources(resources_sentence(&old.resources, &new.resources))
}

fn resources_sentence(old: &Resources, new: &Resources) -> String {
    let memory = |m: Option<Bytes>| m.map_or("no limit".to_owned(), |m| m.to_string());
    let cpu = |c: Option<MilliCpu>| c.map_or("no limit".to_owned(), |c| c.to_string());
    let pids = |p: Option<u32>| p.map_or("no limit".to_owned(), |p| p.to_string());
    let rows = [
        ("memory", memory(old.memory), memory(new.memory)),
        ("CPUs", cpu(old.cpu), cpu(new.cpu)),
        ("processes", pids(old.pids), pids(new.pids)),
        ("reserved memory", old.reserved_memory.to_string(), new.reserved_memory.to_string()),
        ("reserved CPUs", old.reserved_cpu.to_string(), new.reserved_cpu.to_string()),
    ];
    let changed = rows.into_iter().filter(|(_, old, new)| old != new);
    changed.map(|(what, old, new)| format!("{what} {old} → {new}")).collect::<Vec<_>>().join(", ")
}
