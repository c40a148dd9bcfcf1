//! Hosts that are lost: called so when they run nothing any more, and what they had is started elsewhere.
//!
//! A silent host is suspect; it is lost when its lease has ended for certain (`godwit_lease`). Between that and the end of the
//! transaction that gives its containers away it gets no grant, and then none before it has heard of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::types::ErrorBody;
use godwit_lease::Held;
use godwit_model::event::EventKind;
use godwit_model::host::HostState;
use godwit_model::migration::{Move, Outcome, Phase};
use godwit_model::{ContainerName, HostName};
use godwit_plan::{RecoveryPlan, Start};
use tokio_util::sync::CancellationToken;

use super::held::Spared;
use super::{Wake, view};
use crate::core::Core;
use crate::state::records::{ContainerRecord, Growth, HostRecord};
use crate::state::{About, StateError, Tx, World, now_ms};

/// The longest time between two passes, in milliseconds: leases are looked at in each.
const PASS_EVERY_MS: u64 = 1_000;
/// The most containers given away in one transaction: with each of them goes an event, and the store bounds both.
const MAX_AT_ONCE: usize = 40;

/// Runs until `stop`.
pub async fn run(core: &Arc<Core>, stop: &CancellationToken) {
    let mut wake = Wake::new(core, PASS_EVERY_MS);
    // A transaction of which it is not known whether it was committed leaves its host seized; it is repeated.
    let mut seized: BTreeSet<HostName> = BTreeSet::new();
    while wake.next(stop).await {
        core.leases.look();
        let world = core.state.world();
        let mut stranded = BTreeMap::new();
        for (name, host) in &world.hosts {
            let looked = match core.links.connected(name) && !seized.contains(name) {
                true if host.state == HostState::Failed => come_back(core, name).await,
                true => continue,
                false => look_at(core, &world, host, &mut seized, &mut stranded).await,
            };
            if let Err(error) = looked {
                let error = ErrorBody::from_chain(&error).one_line();
                tracing::error!(host = %name, error, "what becomes of a lost host is not decided yet; tried again");
            }
        }
        tell_stranded(core, stranded).await;
    }
}

async fn look_at(
    core: &Core,
    world: &World,
    host: &HostRecord,
    seized: &mut BTreeSet<HostName>,
    stranded: &mut BTreeMap<ContainerName, String>,
) -> Result<(), StateError> {
    let name = &host.facts.name;
    let failed = host.state == HostState::Failed;
    // Nothing is left to do for most lost hosts.
    if failed && !seized.contains(name) && !world.containers.values().any(|c| c.owner() == Some(name)) {
        return Ok(());
    }
    match core.leases.seize(host) {
        Ok(()) => {
            seized.insert(name.clone());
        }
        Err(Held::Seized) if seized.contains(name) => {}
        Err(_) => return Ok(()),
    }
    let revision = if failed {
        let _alone = core.placing.lock().await;
        let (plan, revision) = core.state.transact(|world| give_away(core, world, name)).await?;
        stranded.extend(plan.into_iter().flat_map(|plan| plan.stays).map(|s| (s.container, s.reasons.join("; "))));
        revision
    } else {
        core.state.transact(|world| call_lost(world, name)).await?.1
    };
    core.leases.decided(name, revision.0);
    seized.remove(name);
    Ok(())
}

/// A lost host is there again. What it no longer owns it learns from the first word to it; what was not started elsewhere
/// goes on there.
async fn come_back(core: &Core, name: &HostName) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        if let Some(old) = world.hosts.get(name).filter(|host| host.state == HostState::Failed) {
            let state = old.before_failure.unwrap_or_default();
            let record = HostRecord { state, before_failure: None, declared_dead: false, ..old.value.clone() };
            tx.put_host(Some(old), &record);
            let message = format!("{name} is back, and {}", state.as_str());
            tx.event(EventKind::HostActivated, About::host(name), message);
        }
        Ok((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

fn call_lost(world: &World, name: &HostName) -> Result<(Tx, ()), StateError> {
    let mut tx = Tx::new();
    if let Some(old) = world.hosts.get(name).filter(|host| host.state != HostState::Failed) {
        let owned = world.containers.values().filter(|c| c.owner() == Some(name)).count();
        let message = format!("{name} is lost: its lease has ended, its {owned} containers are started elsewhere");
        record_loss(&mut tx, old, false, message);
    }
    Ok((tx, ()))
}

/// `by_word`: a person says so.
pub fn record_loss(tx: &mut Tx, old: &crate::state::Versioned<HostRecord>, by_word: bool, message: String) {
    let record = HostRecord {
        state: HostState::Failed,
        before_failure: Some(old.before_failure.unwrap_or(old.state)),
        declared_dead: by_word,
        ..old.value.clone()
    };
    tx.put_host(Some(old), &record);
    tx.event(EventKind::HostFailed, About::host(&old.facts.name), message);
}

/// What of a lost host's containers starts where, as far as one transaction goes.
fn give_away(core: &Core, world: &World, name: &HostName) -> Result<(Tx, Option<RecoveryPlan>), StateError> {
    let mut tx = Tx::new();
    // It may have come back meanwhile, or be gone.
    if world.hosts.get(name).is_none_or(|host| host.state != HostState::Failed) {
        return Ok((tx, None));
    }
    let plan = match godwit_plan::recover(&view::fleet_but(core, world, Spared::of_evacuation(name)), name) {
        Ok(plan) => plan,
        Err(error) => {
            tracing::error!(host = %name, %error, "no plan for what a lost host had");
            return Ok((tx, None));
        }
    };
    for start in plan.starts.iter().take(MAX_AT_ONCE) {
        start_elsewhere(&mut tx, world, name, start);
    }
    Ok((tx, Some(plan)))
}

fn start_elsewhere(tx: &mut Tx, world: &World, lost: &HostName, start: &Start) {
    let Some(old) = world.containers.get(&start.container).filter(|c| c.owner() == Some(lost)) else { return };
    for open in world.open_moves().filter(|m| m.container == old.spec.id) {
        match open.outcome {
            // Its saga takes it back first.
            Outcome::Moving => return,
            _ => {
                let reason = format!("{lost} was lost after the hand-over; it starts anew on {}", start.to);
                let outcome = Outcome::Failed { phase: Phase::Activate, reason };
                tx.put_move(Some(open), &Move { outcome, finished_at_ms: Some(now_ms()), ..open.value.clone() });
            }
        }
    }
    let record = ContainerRecord {
        host: Some(start.to.clone()),
        generation: old.generation.next(),
        moving: None,
        // What it is to have is asked for where it is now.
        growth: old.growth.clone().map(|growth| Growth { host: None, ..growth }),
        volumes_on: (!old.spec.volumes.is_empty()).then(|| start.to.clone()),
        leaving: old.leaving.iter().filter(|l| l.host != *lost).cloned().collect(),
        ..old.value.clone()
    };
    tx.put_container(Some(old), &record);
    let empty = if start.recreates_volumes { ", with empty volumes" } else { "" };
    let message = format!(
        "{} starts again on {}{empty}, because {lost} is lost: {}",
        start.container,
        start.to,
        start.reasons.join("; ")
    );
    tx.event(EventKind::ContainerRecovered, About::container(&start.container, Some(&start.to)), message);
}

/// What cannot start elsewhere waits; each reason is told once.
async fn tell_stranded(core: &Core, reasons: BTreeMap<ContainerName, String>) {
    let new = core.stranded.replace(reasons);
    if new.is_empty() {
        return;
    }
    let tell = |_: &World| {
        let mut tx = Tx::new();
        for (name, reason) in new.iter().take(MAX_AT_ONCE) {
            let message = format!("{name} is not started elsewhere: {reason}");
            tx.event(EventKind::ContainerNotPlaced, About::container(name, None), message);
        }
        Ok::<_, StateError>((tx, ()))
    };
    if let Err(error) = core.state.transact(tell).await {
        tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "events are lost");
    }
}
