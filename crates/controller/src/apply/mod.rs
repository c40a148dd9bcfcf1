//! Applying a manifest: the difference between what is wanted and what the store holds, as one transaction.

mod allocate;
mod check;
mod feasible;
mod spec;

use std::collections::BTreeSet;

use godwit_api::types::ApplyAnswer;
use godwit_model::container::ContainerSpec;
use godwit_model::event::EventKind;
use godwit_model::manifest::{Layer, Manifest};
use godwit_model::migration::{Move, Outcome};
use godwit_model::{ContainerName, EnvName, Generation};

pub use allocate::host_index;
pub use check::{ApplyError, MAX_CONTAINERS};
pub use spec::CLOUDLET_BASE_MHZ;

use crate::core::Core;
use crate::state::records::{ContainerRecord, EnvRecord, Leaving};
use crate::state::{About, State, Tx, Versioned, World, now_ms};
use allocate::{Allocator, env_slot};
use spec::{Difference, Keeps, difference};

/// Makes the environment what its manifest says. The same manifest again changes nothing and makes no revision.
pub async fn apply(core: &Core, manifest: &Manifest, dry_run: bool) -> Result<ApplyAnswer, ApplyError> {
    let decide = |world: &World| {
        let Changes { tx, sentences, env, unplaced } = changes(world, manifest)?;
        let warnings = feasible::judge(world, manifest, |host| core.links.connected(host))?;
        let places = if dry_run { feasible::foresee(core, world, &env, &unplaced) } else { Vec::new() };
        let tx = if dry_run { Tx::new() } else { tx };
        Ok::<_, ApplyError>((tx, (sentences, warnings, places)))
    };
    let ((changes, warnings, places), revision) = core.state.transact(decide).await?;
    Ok(ApplyAnswer { changes, revision: revision.0, warnings, places })
}

/// Removes an environment; its record goes when the hosts have let go of its containers.
pub async fn delete(state: &State, name: &EnvName) -> Result<ApplyAnswer, ApplyError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let mut changes = Vec::new();
        let env = world.envs.get(name).filter(|env| !env.deleted);
        let env = env.ok_or_else(|| ApplyError::NoSuchEnvironment { name: name.clone() })?;
        let mut left = false;
        for old in world.containers_of(name) {
            if !old.removed {
                changes.push(format!("remove {}", old.name()));
            }
            left |= remove(&mut tx, world, old, "its environment was deleted");
        }
        if left {
            tx.put_env(Some(env), &EnvRecord { deleted: true, ..env.value.clone() });
        } else {
            tx.delete_env(env);
        }
        changes.push(format!("remove the environment {name}"));
        tx.event(EventKind::EnvDeleted, About::env(name), format!("the environment {name} was deleted"));
        Ok::<_, ApplyError>((tx, changes))
    };
    let (changes, revision) = state.transact(decide).await?;
    Ok(ApplyAnswer { changes, revision: revision.0, warnings: Vec::new(), places: Vec::new() })
}

/// What an apply does.
struct Changes {
    tx: Tx,
    sentences: Vec<String>,
    env: EnvRecord,
    /// Containers that need a place: new ones, and those made anew.
    unplaced: Vec<ContainerRecord>,
}

fn changes(world: &World, manifest: &Manifest) -> Result<Changes, ApplyError> {
    check::check(world, manifest)?;
    let mut tx = Tx::new();
    let mut changes = Vec::new();
    let old = world.envs.get(&manifest.name);
    let slot = old.map_or_else(|| env_slot(world), |env| Ok(env.slot))?;
    let env = EnvRecord { manifest: manifest.clone(), slot, deleted: false };
    let mut allocator = Allocator::new(world, &env);
    let mut touched = 0;
    let mut unplaced = Vec::new();

    let mut wanted = BTreeSet::new();
    for (layer_name, layer) in &manifest.layers {
        for number in 1..=layer.replicas {
            let name = ContainerName { env: manifest.name.clone(), layer: layer_name.clone(), number };
            if let Some((change, record)) = want(&mut tx, world, &env, &name, layer, &mut allocator)? {
                changes.push(change);
                touched += 1;
                unplaced.extend(Some(record).filter(|record| record.host.is_none()));
            }
            wanted.insert(name);
        }
    }
    for old in world.containers_of(&manifest.name).filter(|c| !c.removed && !wanted.contains(c.name())) {
        changes.push(format!("remove {}", old.name()));
        touched += 1;
        remove(&mut tx, world, old, "its layer needs it no more");
    }
    if touched > MAX_CONTAINERS as usize {
        return Err(ApplyError::TooManyChanges { changes: touched });
    }
    match old.filter(|env| !env.deleted) {
        None => changes.insert(0, format!("create the environment {}", manifest.name)),
        Some(old) => changes.extend(layer_changes(&old.manifest, manifest)),
    }
    if old.map(|env| &env.value) != Some(&env) {
        if changes.is_empty() {
            changes.push(format!("update the environment {}", manifest.name));
        }
        tx.put_env(old.map(|v| &**v), &env);
    }
    if !changes.is_empty() {
        if allocator.used || old.is_none() {
            tx.allocate(world);
        }
        let message = format!("the environment {} was applied: {}", manifest.name, changes.join("; "));
        tx.event(EventKind::EnvApplied, About::env(&manifest.name), shortened(message));
    }
    Ok(Changes { tx, sentences: changes, env, unplaced })
}

/// One wanted container: made, changed in place, replaced, or left as it is (`None`).
fn want(
    tx: &mut Tx,
    world: &World,
    env: &EnvRecord,
    name: &ContainerName,
    layer: &Layer,
    allocator: &mut Allocator,
) -> Result<Option<(String, ContainerRecord)>, ApplyError> {
    let Some(old) = world.containers.get(name) else {
        let keeps = Keeps { id_base: allocator.id_base()?, address: allocator.address(env)? };
        let record = ContainerRecord {
            spec: spec::spec(env, name.clone(), layer, keeps),
            host: None,
            generation: Generation(1),
            run: true,
            start_count: 0,
            moving: None,
            volumes_on: None,
            leaving: Vec::new(),
            removed: false,
            growth: None,
        };
        tx.put_container(None, &record);
        return Ok(Some((format!("create {name}"), record)));
    };
    let keeps = Keeps { id_base: old.spec.id_base, address: old.spec.network.address };
    let spec = spec::spec(env, name.clone(), layer, keeps);
    let asked = ContainerSpec { resources: *old.wanted(), ..old.spec.clone() };
    let sentence = match difference(&asked, &spec) {
        _ if old.removed => format!("create {name}"),
        Difference::Same => return Ok(None),
        Difference::Resources(what) => {
            let record = old.resized(spec.resources, now_ms());
            tx.put_container(Some(old), &record);
            return Ok(Some((format!("resize {name}: {what}"), record)));
        }
        Difference::Replace(what) => format!("replace {name}: {what}"),
    };
    let mut record = left(tx, world, old, "it is replaced");
    record.volumes_on = record.volumes_on.filter(|_| !old.removed && !spec.volumes.is_empty());
    record.spec = spec;
    record.run = true;
    record.start_count = 0;
    record.removed = false;
    tx.put_container(Some(old), &record);
    Ok(Some((sentence, record)))
}

/// Removes one container. `true`: a host may still hold it, and its record stays until that host says otherwise.
pub fn remove(tx: &mut Tx, world: &World, old: &Versioned<ContainerRecord>, why: &str) -> bool {
    let mut record = left(tx, world, old, why);
    record.removed = true;
    record.run = false;
    if record.leaving.is_empty() {
        tx.delete_container(old);
        return false;
    }
    if record != old.value {
        tx.put_container(Some(old), &record);
    }
    true
}

/// The record without a host, with everything that hosts may still hold in `leaving`. A move that has not handed over
/// ends here.
fn left(tx: &mut Tx, world: &World, old: &Versioned<ContainerRecord>, why: &str) -> ContainerRecord {
    let mut record = old.value.clone();
    for open in world.open_moves().filter(|m| m.container == old.spec.id) {
        match open.outcome {
            Outcome::Moving => {
                let outcome = Outcome::Failed { phase: open.phase, reason: format!("{}: {why}", open.name) };
                let finished_at_ms = Some(now_ms());
                tx.put_move(Some(open), &Move { outcome, finished_at_ms, ..open.value.clone() });
                record.leaving.push(Leaving { id: old.spec.id.clone(), host: open.to.clone() });
            }
            // The source may not have freed its copy yet.
            Outcome::HandedOver => {
                record.leaving.push(Leaving { id: old.spec.id.clone(), host: open.from.clone() });
            }
            Outcome::Done | Outcome::Failed { .. } => {}
        }
    }
    record.leave_host();
    record
}

/// Changes of layers that change none of their containers.
fn layer_changes(old: &Manifest, new: &Manifest) -> Vec<String> {
    let mut changes = Vec::new();
    for (name, layer) in &new.layers {
        let Some(before) = old.layers.get(name) else { continue };
        let fields = [
            ("published ports", before.ports != layer.ports),
            ("names", before.aliases != layer.aliases),
            ("spread", before.spread != layer.spread),
            ("rules of placement", before.rules != layer.rules),
            ("dependencies", before.depends_on != layer.depends_on),
        ];
        let changed: Vec<&str> = fields.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| what).collect();
        if !changed.is_empty() {
            changes.push(format!("update the layer {}/{name}: {}", new.name, changed.join(", ")));
        }
    }
    changes
}

/// Events are kept in numbers; one of them shall not be a page.
fn shortened(message: String) -> String {
    const MAX_CHARS: usize = 500;
    if message.chars().count() <= MAX_CHARS {
        return message;
    }
    message.chars().take(MAX_CHARS).chain(" …".chars()).collect()
}
