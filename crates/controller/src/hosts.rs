//! What people do to a host: empty it, close it, open it again.

use godwit_model::event::EventKind;
use godwit_model::host::HostState;
use godwit_model::migration::Outcome;
use godwit_model::{ContainerName, HostName};
use godwit_plan::{EvacuateOptions, EvacuationPlan, FleetError};
use thiserror::Error;

use crate::core::Core;
use crate::reconcile::failure::record_loss;
use crate::reconcile::held::Spared;
use crate::reconcile::view;
use crate::state::records::{Evacuation, HostRecord};
use crate::state::{About, StateError, Tx, Versioned, World, now_ms};

/// The most containers that are brought back to a host; more are left to balancing.
const MAX_BROUGHT_BACK: usize = 1_000;

/// Why a host's state was not changed.
#[derive(Debug, Error)]
pub enum HostError {
    #[error("there is no host {name}; the hosts are: {known}")]
    NoSuchHost { name: HostName, known: String },
    #[error("{name} cannot go to itself")]
    ToItself { name: HostName },
    #[error("{name} is lost; what it had is started elsewhere")]
    Lost { name: HostName },
    #[error("{name} is connected, so it is not dead")]
    Connected { name: HostName },
    #[error("the plan could not be made")]
    Plan(#[from] FleetError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// Begins to empty a host, or only says how that would go: the plan, and the store's revision from which events tell
/// how it goes on. From here on the host takes no container.
pub async fn evacuate(
    core: &Core,
    name: &HostName,
    options: &EvacuateOptions,
    dry_run: bool,
) -> Result<(EvacuationPlan, u64), HostError> {
    let decide = |world: &World| {
        let old = live(world, name)?;
        for to in &options.to {
            host(world, to)?;
            if to == name {
                return Err(HostError::ToItself { name: name.clone() });
            }
        }
        let fleet = view::fleet_but(core, world, Spared::of_evacuation(name));
        let plan = godwit_plan::evacuate(&fleet, name, options)?;
        let mut tx = Tx::new();
        if !dry_run {
            let total = world.containers.values().filter(|c| c.owner() == Some(name)).count() as u32;
            let evacuation =
                Evacuation { options: options.clone(), requested_at_ms: now_ms(), total, stays: Default::default() };
            let record = HostRecord {
                state: HostState::Evacuating,
                evacuation: Some(evacuation),
                bring_back: Vec::new(),
                ..old.value.clone()
            };
            tx.put_host(Some(old), &record);
            let message = format!("{name} is being emptied: {total} containers");
            tx.event(EventKind::HostEvacuating, About::host(name), message);
        }
        Ok::<_, HostError>((tx, plan))
    };
    let (plan, revision) = core.state.transact(decide).await?;
    if !dry_run {
        core.evacuations.forget(name);
    }
    // Events of this very change are older news to who asked.
    Ok((plan, revision.0))
}

/// Closes a host: it keeps what it has and takes nothing new. An evacuation under way begins no further move.
pub async fn cordon(core: &Core, name: &HostName) -> Result<(), HostError> {
    change(core, name, EventKind::HostCordoned, "takes no new containers", |_, record| HostRecord {
        state: HostState::Cordoned,
        evacuation: None,
        bring_back: Vec::new(),
        ..record.clone()
    })
    .await
}

/// Opens a host again. An evacuation under way ends: moves that have begun go on, no other begins. `bring_back`: what
/// the last evacuation moved away is moved here again, as far as rules and room allow.
pub async fn activate(core: &Core, name: &HostName, bring_back: bool) -> Result<(), HostError> {
    core.evacuations.forget(name);
    change(core, name, EventKind::HostActivated, "takes containers again", |world, record| HostRecord {
        state: HostState::Active,
        bring_back: if bring_back { moved_away(world, record) } else { Vec::new() },
        evacuation: None,
        ..record.clone()
    })
    .await
}

async fn change(
    core: &Core,
    name: &HostName,
    kind: EventKind,
    what: &str,
    make: impl Fn(&World, &HostRecord) -> HostRecord,
) -> Result<(), HostError> {
    let decide = |world: &World| {
        let old = live(world, name)?;
        let record = make(world, old);
        let mut tx = Tx::new();
        if record != old.value {
            tx.put_host(Some(old), &record);
            tx.event(kind, About::host(name), format!("{name} {what}"));
        }
        Ok::<_, HostError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// Says that a silent host is dead for certain: nobody waits for its lease. Whoever is wrong has two copies of what it had.
pub async fn declare_dead(core: &Core, name: &HostName) -> Result<(), HostError> {
    host(&core.state.world(), name)?;
    if core.links.connected(name) {
        return Err(HostError::Connected { name: name.clone() });
    }
    // Whoever decides about it at this moment calls it lost itself.
    if core.leases.seize_by_word(name).is_err() {
        return Ok(());
    }
    let decide = |world: &World| {
        let old = host(world, name)?;
        let mut tx = Tx::new();
        if !old.declared_dead {
            let message = format!("{name} was declared dead; what it had is started elsewhere");
            record_loss(&mut tx, old, true, message);
        }
        Ok::<_, HostError>((tx, ()))
    };
    let decided = core.state.transact(decide).await;
    let revision = decided.as_ref().map_or_else(|_| core.state.world().revision.0, |(_, revision)| revision.0);
    core.leases.decided(name, revision);
    decided.map(|_| ())
}

/// A host that is not lost.
fn live<'w>(world: &'w World, name: &HostName) -> Result<&'w Versioned<HostRecord>, HostError> {
    let host = host(world, name)?;
    if host.state == HostState::Failed { Err(HostError::Lost { name: name.clone() }) } else { Ok(host) }
}

/// The host, or the names of those there are.
pub fn host<'w>(world: &'w World, name: &HostName) -> Result<&'w Versioned<HostRecord>, HostError> {
    world.hosts.get(name).map(|host| &**host).ok_or_else(|| HostError::NoSuchHost {
        name: name.clone(),
        known: world.hosts.keys().map(HostName::as_str).collect::<Vec<_>>().join(", "),
    })
}

/// What the evacuation that is recorded moved away and is still elsewhere.
fn moved_away(world: &World, record: &HostRecord) -> Vec<ContainerName> {
    let Some(evacuation) = &record.evacuation else { return Vec::new() };
    let away = |name: &ContainerName| {
        world.containers.get(name).is_some_and(|c| c.owner().is_some_and(|owner| *owner != record.facts.name))
    };
    let moves = world.moves.values().filter(|m| {
        m.from == record.facts.name && m.outcome == Outcome::Done && m.requested_at_ms >= evacuation.requested_at_ms
    });
    let mut names: Vec<ContainerName> = moves.map(|m| m.name.clone()).filter(away).collect();
    names.sort();
    names.dedup();
    names.truncate(MAX_BROUGHT_BACK);
    names
}
