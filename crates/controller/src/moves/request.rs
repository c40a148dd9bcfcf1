//! Asking for a move, and taking it back.

use std::sync::Arc;

use godwit_api::link::{Reply, Request};
use godwit_api::types::MovePlan;
use godwit_model::container::Movable;
use godwit_model::event::EventKind;
use godwit_model::migration::{Cause, MIN_BANDWIDTH, Move, MoveOptions, Outcome, Phase, Progress};
use godwit_model::{ContainerId, ContainerName, HostName, MoveId};
use godwit_plan::{FleetError, Placement};
use thiserror::Error;

use super::saga;
use crate::core::Core;
use crate::reconcile::{held, view};
use crate::state::records::ContainerRecord;
use crate::state::{About, StateError, Tx, Versioned, World, now_ms};

/// How long the host may take to look at its container, in milliseconds; after it the last report counts.
const EXAMINE_TIMEOUT_MS: u64 = 3_000;

/// Why a move was not begun, or not taken back.
#[derive(Debug, Error)]
pub enum MoveError {
    #[error("there is no container {name}")]
    NoSuchContainer { name: ContainerName },
    #[error("there is no move {id}")]
    NoSuchMove { id: MoveId },
    #[error("{name} cannot be moved: {}", because.join("; "))]
    Refused { name: ContainerName, because: Vec<String> },
    #[error("{name} is being moved already, or an earlier move has not been released yet")]
    Busy { name: ContainerName },
    #[error("the move {id} cannot be taken back any more: it is over, or the destination owns the container")]
    TooLate { id: MoveId },
    #[error("where it could go cannot be told")]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// Begins to move a container, because a person asked for it; without `to` to the host that placement picks. Nothing
/// has changed on any host when this returns.
pub async fn request(
    core: &Arc<Core>,
    name: &ContainerName,
    to: Option<HostName>,
    options: MoveOptions,
) -> Result<Move, MoveError> {
    request_for(core, name, to, options, Part::default()).await
}

/// What a move is part of, where no person asked for it alone.
#[derive(Debug, Clone, Default)]
pub struct Part<'a> {
    /// What it is good for.
    pub cause: Option<Cause>,
    /// Others that go to the same host, because they must be near each other.
    pub together: &'a [ContainerName],
}

impl Part<'_> {
    pub fn of(cause: Cause) -> Self {
        Self { cause: Some(cause), together: &[] }
    }
}

/// As [`request`], for a part of something.
pub async fn request_for(
    core: &Arc<Core>,
    name: &ContainerName,
    to: Option<HostName>,
    options: MoveOptions,
    part: Part<'_>,
) -> Result<Move, MoveError> {
    check_options(name, &options)?;
    let id = MoveId::random();
    let seen = examine(core, name).await;
    core.moves.begin(&id);
    let decide = |world: &World| {
        let old = resting(world, name)?;
        let MovePlan { from, to: found, reasons, .. } =
            decide_hosts(core, world, old, to.as_ref(), &part, seen.as_ref())?;
        let begun = Move {
            id: id.clone(),
            container: old.spec.id.clone(),
            name: name.clone(),
            from,
            to: found,
            generation: old.generation,
            options,
            requested_at_ms: now_ms(),
            finished_at_ms: None,
            phase: Phase::Check,
            outcome: Outcome::Moving,
            progress: Progress::default(),
            summary: None,
            cause: part.cause.clone(),
        };
        let mut tx = Tx::new();
        tx.put_move(None, &begun);
        tx.put_container(Some(old), &ContainerRecord { moving: Some(begun.id.clone()), ..old.value.clone() });
        let why = if to.is_none() { format!(": {}", reasons.join("; ")) } else { String::new() };
        let message = format!("{name} is being moved from {} to {}{}{why}", begun.from, begun.to, begun.why());
        tx.event(EventKind::MoveStarted, About::container(name, Some(&begun.to)), message);
        Ok::<_, MoveError>((tx, begun))
    };
    let begun = {
        let _alone = core.placing.lock().await;
        core.state.transact(decide).await
    };
    if begun.is_err() {
        core.moves.take_begun(&id);
    }
    let (begun, _) = begun?;
    super::start_missing(core);
    Ok(begun)
}

/// Where the move would go that would be begun now; nothing changes.
pub async fn would(
    core: &Arc<Core>,
    name: &ContainerName,
    to: Option<&HostName>,
    options: &MoveOptions,
) -> Result<MovePlan, MoveError> {
    check_options(name, options)?;
    let seen = examine(core, name).await;
    let world = core.state.world();
    decide_hosts(core, &world, resting(&world, name)?, to, &Part::default(), seen.as_ref())
}

fn check_options(name: &ContainerName, options: &MoveOptions) -> Result<(), MoveError> {
    if let Some(rate) = options.bandwidth.filter(|rate| *rate < MIN_BANDWIDTH) {
        let because = vec![format!("a bandwidth of {rate} is less than {MIN_BANDWIDTH}")];
        return Err(MoveError::Refused { name: name.clone(), because });
    }
    Ok(())
}

/// The container, if no move of it is under way.
fn resting<'w>(world: &'w World, name: &ContainerName) -> Result<&'w Versioned<ContainerRecord>, MoveError> {
    let old = world.containers.get(name).filter(|c| !c.removed);
    let old = old.ok_or_else(|| MoveError::NoSuchContainer { name: name.clone() })?;
    if world.open_moves().any(|m| m.container == old.spec.id) {
        return Err(MoveError::Busy { name: name.clone() });
    }
    Ok(old)
}

/// What its host sees of the container at this moment: reports are up to two seconds old, and a person who has just
/// ended a session must not be told that it is open. `None` where the host does not say.
async fn examine(core: &Core, name: &ContainerName) -> Option<(ContainerId, Movable)> {
    let world = core.state.world();
    let record = world.containers.get(name).filter(|c| !c.removed)?;
    let container = record.spec.id.clone();
    let request = Request::Examine { container: container.clone() };
    match core.links.ask_within(record.owner()?, request, EXAMINE_TIMEOUT_MS).await {
        Ok(Reply::Examined { movable }) => Some((container, movable)),
        _ => None,
    }
}

fn decide_hosts(
    core: &Core,
    world: &World,
    old: &Versioned<ContainerRecord>,
    to: Option<&HostName>,
    part: &Part<'_>,
    seen: Option<&(ContainerId, Movable)>,
) -> Result<MovePlan, MoveError> {
    let name = old.name();
    let refused = |because: Vec<String>| MoveError::Refused { name: name.clone(), because };
    let from = old.owner().ok_or_else(|| refused(vec!["it is on no host yet".to_owned()]))?;
    let report = core.links.report(from);
    if !report.as_ref().is_some_and(|r| r.connected) {
        return Err(refused(vec![format!("its host {from} is not connected")]));
    }
    let seen = seen.filter(|(id, _)| *id == old.spec.id).map(|(_, movable)| movable);
    let mut fleet = view::fleet_but(core, world, held::Spared::of_move(name, part.cause.as_ref()));
    fleet.set_container(view::member(core, world, old, seen));
    let mover = fleet.mover(name, part.together)?;
    let mut because = mover.stays();
    let found = match to {
        Some(to) if !world.hosts.contains_key(to) => {
            let known = world.hosts.keys().map(HostName::as_str).collect::<Vec<_>>().join(", ");
            return Err(refused(vec![format!("there is no host {to}; the hosts are: {known}")]));
        }
        Some(to) => mover.place_at(to)?.map_err(|against| {
            because.extend(against.into_iter().map(|reason| format!("{to}: {reason}")));
        }),
        None => mover.place().map_err(|refusal| because.push(refusal.to_string())),
    };
    match found {
        Ok(Placement { host, score, reasons }) if because.is_empty() => {
            Ok(MovePlan { container: name.clone(), from: from.clone(), to: host, score, reasons })
        }
        _ => Err(refused(because)),
    }
}

/// Takes a move back, if the destination does not own the container yet: it runs on where it was.
pub async fn cancel(core: &Arc<Core>, id: &MoveId) -> Result<Move, MoveError> {
    if !core.state.world().moves.contains_key(id) {
        return Err(MoveError::NoSuchMove { id: id.clone() });
    }
    let phase = core.moves.phase(id);
    match saga::fail(core, id, phase, "it was cancelled").await? {
        true => core.moves.view(&core.state.world(), id).ok_or_else(|| MoveError::NoSuchMove { id: id.clone() }),
        false => Err(MoveError::TooLate { id: id.clone() }),
    }
}
