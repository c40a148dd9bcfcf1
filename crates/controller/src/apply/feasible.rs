//! Whether the hosts that are known can keep the rules of a manifest, and where its new containers would go.
//!
//! Only what no host could change by having more room is refused: a rule that is accepted is kept, so one that cannot be
//! is told at once. Room comes and goes; what does not fit waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::types::Foreseen;
use godwit_model::manifest::{Layer, Manifest};
use godwit_model::{HostName, LayerName};

use super::check::ApplyError;
use crate::core::Core;
use crate::reconcile::view;
use crate::state::records::{ContainerRecord, EnvRecord, HostRecord};
use crate::state::{Versioned, World};

/// Refuses what all hosts that ever joined could not keep; warns of what those that take containers now cannot. Where
/// no host is connected nothing is judged: they are about to come. A layer that was accepted as it is, and asks for no
/// more, is only warned of: hosts have changed since, and what is applied may be what helps.
pub fn judge(
    world: &World,
    manifest: &Manifest,
    connected: impl Fn(&HostName) -> bool,
) -> Result<Vec<String>, ApplyError> {
    let known: Vec<&HostRecord> = world.hosts.values().map(|host| &host.value).collect();
    if !known.iter().any(|host| connected(&host.facts.name)) {
        return Ok(Vec::new());
    }
    let takes = |host: &&&HostRecord| connected(&host.facts.name) && host.state.takes_containers();
    let open: Vec<&HostRecord> = known.iter().filter(takes).copied().collect();
    let before = world.envs.get(&manifest.name).filter(|env| !env.deleted).map(|env| &env.manifest);
    let mut warnings = BTreeSet::new();
    for (name, layer) in manifest.layers.iter().filter(|(_, layer)| layer.replicas > 0) {
        let accepted = before.and_then(|old| old.layers.get(name)).is_some_and(|old| asks_no_more(old, layer));
        match short(world, manifest, name, layer, &known, "known") {
            Some(because) if !accepted => return Err(ApplyError::TooFewHosts { layer: name.clone(), because }),
            Some(because) => drop(warnings.insert(format!("{name}: {because}; some will wait"))),
            None => {
                let now = short(world, manifest, name, layer, &open, "taking containers now");
                warnings.extend(now.map(|because| format!("{name}: {because}; some will wait")));
            }
        }
    }
    Ok(warnings.into_iter().collect())
}

fn asks_no_more(old: &Layer, new: &Layer) -> bool {
    old.spread == new.spread && old.rules == new.rules && old.replicas >= new.replicas
}

/// What these hosts cannot give the layer, as a sentence.
fn short(
    world: &World,
    manifest: &Manifest,
    name: &LayerName,
    layer: &Layer,
    hosts: &[&HostRecord],
    which: &str,
) -> Option<String> {
    // Its host is also the host of everything it is near.
    let labels: BTreeMap<&String, &String> =
        manifest.companions(name).filter_map(|near| manifest.layers.get(near)).flat_map(|l| &l.rules.require).collect();
    let has = |host: &&&HostRecord| labels.iter().all(|(key, value)| host.facts.labels.get(*key) == Some(*value));
    let fitting = hosts.iter().filter(has).count() as u64;
    let wanted: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let with = if wanted.is_empty() { String::new() } else { format!(" with {}", wanted.join(" and ")) };
    if fitting == 0 {
        return Some(format!("it needs a host{with}, and none is {which}"));
    }
    let replicas = u64::from(layer.replicas);
    if let Some(most) = layer.most_per_host()
        && replicas > fitting.saturating_mul(u64::from(most))
    {
        let needed = replicas.div_ceil(u64::from(most).max(1));
        let text =
            format!("{replicas} containers, at most {most} on a host, need {needed} hosts{with}, and {fitting} ");
        return Some(format!("{text}{} {which}", if fitting == 1 { "is" } else { "are" }));
    }
    layer.rules.apart.iter().find_map(|group| {
        let members = members_of(world, manifest, group);
        let hosts = hosts.len() as u64;
        let be = if hosts == 1 { "is" } else { "are" };
        (members > hosts).then(|| {
            format!("the group {group} has {members} members, of which a host holds one, and {hosts} {be} {which}")
        })
    })
}

/// Members of a group in all environments, with this one as it would be.
fn members_of(world: &World, manifest: &Manifest, group: &str) -> u64 {
    let others = world.envs.values().filter(|env| !env.deleted && env.manifest.name != manifest.name);
    let layers = others.flat_map(|env| env.manifest.layers.values()).chain(manifest.layers.values());
    layers.filter(|layer| layer.rules.apart.contains(group)).map(|layer| u64::from(layer.replicas)).sum()
}

/// Where these containers would go, one after the other, if they were placed now and waited for nothing.
pub fn foresee(core: &Core, world: &World, env: &EnvRecord, unplaced: &[ContainerRecord]) -> Vec<Foreseen> {
    if unplaced.is_empty() {
        return Vec::new();
    }
    let mut world = world.clone();
    let revision = world.revision;
    world.envs.insert(env.manifest.name.clone(), Arc::new(Versioned { value: env.clone(), revision }));
    for record in unplaced {
        world.containers.insert(record.name().clone(), Arc::new(Versioned { value: record.clone(), revision }));
    }
    let mut fleet = view::fleet(core, &world);
    let mut places = Vec::with_capacity(unplaced.len());
    let mut unplaced: Vec<&ContainerRecord> = unplaced.iter().collect();
    unplaced.sort_by_cached_key(|c| view::turn(&world, c.name()));
    for record in unplaced {
        let container = record.name().clone();
        let (host, reasons) = match fleet.place(&view::member(core, &world, record, None)) {
            Ok(placement) => (Some(placement.host), placement.reasons),
            Err(refusal) => (None, vec![refusal.to_string()]),
        };
        // Both are of this world.
        let put = host.as_ref().map(|host| fleet.put(&container, host));
        debug_assert!(put.is_none_or(|put| put.is_ok()), "the fleet was made of this world");
        places.push(Foreseen { container, host, reasons });
    }
    places
}
