//! Whether a manifest can be accepted at all, against itself and against the other environments.

use std::collections::{BTreeMap, BTreeSet};

use godwit_model::manifest::{Contradiction, Manifest, contradictions};
use godwit_model::{EnvName, LayerName};
use thiserror::Error;

use crate::state::{StateError, World};

/// The most containers of one environment: what one transaction of the store can change.
pub const MAX_CONTAINERS: u32 = 110;

/// Why an environment was not applied. Nothing has changed.
#[derive(Debug, Error)]
pub enum ApplyError {
    #[error("the environment {name} has no layers; name at least one service")]
    Empty { name: EnvName },
    #[error("the address names the environment {path} and the manifest {manifest}; they must be the same")]
    OtherName { path: EnvName, manifest: EnvName },
    #[error("the environment has {containers} containers; {MAX_CONTAINERS} is the most")]
    TooMany { containers: u64 },
    #[error(
        "this would change {changes} containers at once; {MAX_CONTAINERS} is the most: remove or add layers in several steps"
    )]
    TooManyChanges { changes: usize },
    #[error("the layer {layer} depends on {on}, which the environment does not have")]
    UnknownDependency { layer: LayerName, on: LayerName },
    #[error("the layers {} depend on each other in a circle; none could start first", names(layers))]
    Circle { layers: Vec<LayerName> },
    #[error("the layer {layer} has a rule that cannot be kept: {key}: {message}")]
    Contradiction { layer: LayerName, key: &'static str, message: String },
    #[error("the layer {layer} cannot keep its rules on the hosts there are: {because}")]
    TooFewHosts { layer: LayerName, because: String },
    #[error("the layer {layer} gives cloudlets and also memory or CPUs; give one of them")]
    MixedResources { layer: LayerName },
    #[error("the layer {layer} reserves more {what} than its limit allows")]
    ReservedAboveLimit { layer: LayerName, what: &'static str },
    #[error("the host port {port}/{protocol} is published by {first} and by {second}; a port leads to one layer")]
    PortTwice { port: u16, protocol: &'static str, first: LayerName, second: LayerName },
    #[error("the host port {port}/{protocol} of the layer {layer} is taken by the environment {other}")]
    PortTaken { port: u16, protocol: &'static str, layer: LayerName, other: EnvName },
    #[error("all {what} are in use")]
    Exhausted { what: &'static str },
    #[error("there is no environment {name}")]
    NoSuchEnvironment { name: EnvName },
    #[error(transparent)]
    State(#[from] StateError),
}

fn names(layers: &[LayerName]) -> String {
    layers.iter().map(LayerName::as_str).collect::<Vec<_>>().join(", ")
}

pub fn check(world: &World, manifest: &Manifest) -> Result<(), ApplyError> {
    if manifest.layers.is_empty() {
        return Err(ApplyError::Empty { name: manifest.name.clone() });
    }
    let containers: u64 = manifest.layers.values().map(|l| u64::from(l.replicas)).sum();
    if containers > u64::from(MAX_CONTAINERS) {
        return Err(ApplyError::TooMany { containers });
    }
    check_resources(manifest)?;
    check_dependencies(manifest)?;
    if let Some(Contradiction { layer, key, message, .. }) = contradictions(&manifest.layers).into_iter().next() {
        return Err(ApplyError::Contradiction { layer, key, message });
    }
    check_ports(world, manifest)
}

fn check_resources(manifest: &Manifest) -> Result<(), ApplyError> {
    for (name, layer) in &manifest.layers {
        let r = &layer.resources;
        let plain = r.memory.is_some() || r.cpu.is_some() || r.reserved_memory.is_some() || r.reserved_cpu.is_some();
        if r.cloudlets.is_some() && plain {
            return Err(ApplyError::MixedResources { layer: name.clone() });
        }
        let above = |what| Err(ApplyError::ReservedAboveLimit { layer: name.clone(), what });
        if r.cloudlets.is_some_and(|c| c.reserved > c.limit) {
            return above("cloudlets");
        }
        if r.memory.is_some_and(|limit| r.reserved_memory.is_some_and(|reserved| reserved > limit)) {
            return above("memory");
        }
        if r.cpu.is_some_and(|limit| r.reserved_cpu.is_some_and(|reserved| reserved > limit)) {
            return above("CPUs");
        }
    }
    Ok(())
}

fn check_dependencies(manifest: &Manifest) -> Result<(), ApplyError> {
    for (layer, spec) in &manifest.layers {
        if let Some(on) = spec.depends_on.keys().find(|on| !manifest.layers.contains_key(*on)) {
            return Err(ApplyError::UnknownDependency { layer: layer.clone(), on: on.clone() });
        }
    }
    // Layers whose dependencies are all startable become startable, until nothing changes.
    let mut startable = BTreeSet::new();
    for _ in 0..manifest.layers.len() {
        for (layer, spec) in &manifest.layers {
            if spec.depends_on.keys().all(|on| startable.contains(on)) {
                startable.insert(layer);
            }
        }
    }
    let layers: Vec<LayerName> = manifest.layers.keys().filter(|l| !startable.contains(l)).cloned().collect();
    if layers.is_empty() { Ok(()) } else { Err(ApplyError::Circle { layers }) }
}

fn check_ports(world: &World, manifest: &Manifest) -> Result<(), ApplyError> {
    let protocol = |udp: bool| if udp { "udp" } else { "tcp" };
    let mut own: BTreeMap<(u16, bool), &LayerName> = BTreeMap::new();
    for (layer, spec) in &manifest.layers {
        for port in &spec.ports {
            let key = (port.host_port, port.udp);
            if let Some(first) = own.insert(key, layer) {
                let (first, second) = (first.clone(), layer.clone());
                return Err(ApplyError::PortTwice { port: key.0, protocol: protocol(key.1), first, second });
            }
        }
    }
    for (other, env) in world.envs.iter().filter(|(name, env)| **name != manifest.name && !env.deleted) {
        for port in env.manifest.layers.values().flat_map(|l| &l.ports) {
            if let Some(layer) = own.get(&(port.host_port, port.udp)) {
                return Err(ApplyError::PortTaken {
                    port: port.host_port,
                    protocol: protocol(port.udp),
                    layer: (*layer).clone(),
                    other: other.clone(),
                });
            }
        }
    }
    Ok(())
}
