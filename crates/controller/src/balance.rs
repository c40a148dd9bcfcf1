//! Balancing as people see and change it: what is advised now and why, modes, and carrying it out once.

use std::collections::BTreeMap;

use godwit_api::types::{BalanceChange, BalanceView, LoadView};
use godwit_model::event::EventKind;
use godwit_model::host::HostState;
use godwit_model::migration::{Cause, Move, Outcome};
use godwit_model::{ContainerId, ContainerName, HostName};
use godwit_plan::{Advice, Container, Fleet, Policy, rebalance};
use thiserror::Error;

use crate::core::Core;
use crate::reconcile::{evacuate, view};
use crate::state::records::BalanceRecord;
use crate::state::{About, StateError, Tx, World, now_ms};

/// The most moves at the same time that can be asked for.
const MAX_AT_ONCE: u32 = 16;

/// Why balancing was not changed, or nothing was carried out.
#[derive(Debug, Error)]
pub enum BalanceError {
    #[error("{what} has to be from {least} to {most}")]
    OutOfRange { what: &'static str, least: u32, most: u32 },
    #[error("nothing is moved for balance now: {because}; try again when that is over")]
    Waits { because: String },
    #[error(transparent)]
    State(#[from] StateError),
}

pub fn record(world: &World) -> BalanceRecord {
    world.balance.as_ref().map(|record| record.value.clone()).unwrap_or_default()
}

/// Moves for balance that are not over.
pub fn under_way(world: &World) -> impl Iterator<Item = &Move> {
    world.open_moves().map(|m| &m.value).filter(|m| matches!(m.cause, Some(Cause::Balance { .. })))
}

/// What would make the fleet better, as it will be when what is under way has ended; an error says what comes first.
pub fn advice(core: &Core, world: &World, policy: &Policy) -> Result<Advice, String> {
    match first(core, world) {
        Some(because) => Err(because),
        None => Ok(rebalance(&fleet(core, world), policy, now_ms())),
    }
}

/// What comes before balance: other plans under way, and hosts of which nobody knows what becomes of them.
fn first(core: &Core, world: &World) -> Option<String> {
    for (name, host) in &world.hosts {
        match host.state {
            HostState::Evacuating => return Some(format!("{name} is being emptied")),
            HostState::Suspect => return Some(format!("{name} has not been heard of for a while")),
            HostState::Active if !core.links.connected(name) => return Some(format!("{name} is not connected")),
            HostState::Active if !host.bring_back.is_empty() => return Some(format!("{name} is being filled again")),
            _ => {}
        }
    }
    if !evacuate::all_have_come(core, world) {
        return Some("not all hosts have reported yet".to_owned());
    }
    let growing = world.containers.values().find(|c| c.growth.as_ref().is_some_and(|g| g.host.is_some()));
    if let Some(container) = growing {
        return Some(format!("room is being made for {}", container.name()));
    }
    let of_another_plan =
        |m: &&Move| matches!(m.cause, Some(Cause::Evacuation { .. } | Cause::Return { .. } | Cause::Room { .. }));
    let other = world.open_moves().map(|m| &m.value).find(of_another_plan)?;
    Some(format!("{} is being moved{}", other.name, other.why()))
}

/// What would be advised if nothing more important went on.
pub fn preview(core: &Core, world: &World) -> Advice {
    rebalance(&fleet(core, world), &record(world).policy, now_ms())
}

/// The fleet with what is measured, and as if every move that is under way had ended well: else a host from which
/// something is on its way would look as full as before, and more would be taken from it than is good.
fn fleet(core: &Core, world: &World) -> Fleet {
    let mut fleet = view::fleet(core, world);
    let moved = last_moved(world);
    let open: BTreeMap<&ContainerId, &Move> = world.open_moves().map(|m| (&m.container, &m.value)).collect();
    let mut on: BTreeMap<HostName, Vec<&ContainerId>> = BTreeMap::new();
    for (name, record) in &world.containers {
        let Some(container) = fleet.container(name).cloned() else { continue };
        let usage = core.loads.usage(&record.spec.id);
        let open = open.get(&record.spec.id);
        let mut unmovable = container.unmovable.clone();
        unmovable.extend(open.map(|_| "it is being moved".to_owned()));
        fleet.set_container(Container {
            used_cpu: usage.cpu,
            used_memory: usage.memory,
            last_moved_ms: moved.get(name).copied(),
            unmovable,
            ..container
        });
        if let Some(open) = open
            && let Err(error) = fleet.put(name, &open.to)
        {
            tracing::error!(%error, "a move is missing in what balance sees");
        }
        if let Some(home) = fleet.home(name) {
            on.entry(home.clone()).or_default().push(&record.spec.id);
        }
    }
    let now = now_ms();
    for (name, host) in &world.hosts {
        let ids = on.get(name).into_iter().flatten().copied();
        let load = core.loads.load(ids, host.facts.memory, host.facts.cpus);
        // The plan's clock is that of the store's moves; how long it has been too much was measured by another.
        let since = core.loads.overloaded_ms(name).map(|ms| now.saturating_sub(ms));
        if let Err(error) = fleet.measure(name, load.cpu_permille, load.memory_permille, since) {
            tracing::error!(%error, "a host is missing in what balance sees");
        }
    }
    fleet
}

/// When each container's last move ended, in milliseconds since the epoch. One that only emptied its host does not
/// count: the container had no choice, and the host may be back.
fn last_moved(world: &World) -> BTreeMap<&ContainerName, u64> {
    let mut last = BTreeMap::new();
    for one in world.moves.values() {
        let forced = matches!((&one.cause, &one.outcome), (Some(Cause::Evacuation { .. }), Outcome::Done));
        if let Some(at) = one.finished_at_ms.filter(|_| !forced) {
            let latest = last.entry(&one.name).or_insert(at);
            *latest = at.max(*latest);
        }
    }
    last
}

pub fn view(core: &Core, world: &World) -> BalanceView {
    let record = record(world);
    let (advice, waits) = match advice(core, world, &record.policy) {
        Ok(advice) => (advice, None),
        Err(because) => (Advice::default(), Some(because)),
    };
    let mut on: BTreeMap<&HostName, Vec<&ContainerId>> = BTreeMap::new();
    for container in world.containers.values() {
        container.owner().into_iter().for_each(|host| on.entry(host).or_default().push(&container.spec.id));
    }
    let hosts = world.hosts.iter().map(|(name, host)| {
        let owned = on.get(name).into_iter().flatten().copied();
        let load = core.loads.load(owned, host.facts.memory, host.facts.cpus);
        LoadView {
            host: name.clone(),
            cpu_permille: load.cpu_permille,
            memory_permille: load.memory_permille,
            overloaded_ms: core.loads.overloaded_ms(name),
        }
    });
    BalanceView {
        mode: record.mode,
        policy: record.policy,
        at_once: record.at_once,
        advice,
        waits,
        under_way: under_way(world).count() as u32,
        once: record.once.map(|names| names.into_iter().collect()),
        hosts: hosts.collect(),
    }
}

/// Changes mode and policy. Moves that have begun go on.
pub async fn change(core: &Core, change: &BalanceChange) -> Result<(), BalanceError> {
    let permille = [
        ("the threshold of CPU, in thousandths,", change.cpu_threshold_permille, 1),
        ("the threshold of memory, in thousandths,", change.memory_threshold_permille, 1),
        ("the difference in level, in thousandths,", change.level_permille, 1),
        ("the least gain, in thousandths,", change.least_gain_permille, 0),
    ];
    for (what, value, least) in permille {
        if value.is_some_and(|value| !(least..=1000).contains(&u32::from(value))) {
            return Err(BalanceError::OutOfRange { what, least, most: 1000 });
        }
    }
    if change.at_once.is_some_and(|n| !(1..=MAX_AT_ONCE).contains(&n)) {
        let what = "the number of moves at the same time";
        return Err(BalanceError::OutOfRange { what, least: 1, most: MAX_AT_ONCE });
    }
    let decide = |world: &World| {
        let mut new = record(world);
        let policy = &mut new.policy;
        policy.cpu_threshold_permille = change.cpu_threshold_permille.unwrap_or(policy.cpu_threshold_permille);
        policy.memory_threshold_permille = change.memory_threshold_permille.unwrap_or(policy.memory_threshold_permille);
        policy.hold_ms = change.hold_ms.unwrap_or(policy.hold_ms);
        policy.level_permille = change.level_permille.unwrap_or(policy.level_permille);
        policy.least_gain_permille = change.least_gain_permille.unwrap_or(policy.least_gain_permille);
        policy.rest_ms = change.rest_ms.unwrap_or(policy.rest_ms);
        new.at_once = change.at_once.unwrap_or(new.at_once);
        new.mode = change.mode.unwrap_or(new.mode);
        let mut tx = Tx::new();
        if new != record(world) {
            tx.put_balance(world.balance.as_deref(), &new);
            let message = format!("balance is {} now", new.mode.as_str());
            tx.event(EventKind::BalanceChanged, About::default(), message);
        }
        Ok::<_, BalanceError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// Lets the advice of this moment be carried out once, whatever the mode: the advice, and the store's revision from
/// which events tell how it goes on.
pub async fn now(core: &Core) -> Result<(Advice, u64), BalanceError> {
    let decide = |world: &World| {
        let mut new = record(world);
        let advice = advice(core, world, &new.policy).map_err(|because| BalanceError::Waits { because })?;
        let mut tx = Tx::new();
        if !advice.moves.is_empty() {
            new.once = Some(advice.moves.iter().map(|advised| advised.step.container.clone()).collect());
            tx.put_balance(world.balance.as_deref(), &new);
        }
        Ok::<_, BalanceError>((tx, advice))
    };
    let (advice, revision) = core.state.transact(decide).await?;
    Ok((advice, revision.0))
}
