//! Empties hosts, and fills those that come back.
//!
//! There is no stored plan: each pass plans anew from what is there and begins what may begin now. So a controller that
//! was restarted goes on, and a plan never gets old. Runs beside the other reconcilers, because asking a host to look
//! at a container takes time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_api::types::ErrorBody;
use godwit_model::event::EventKind;
use godwit_model::host::HostState;
use godwit_model::migration::{Cause, MoveOptions, Outcome};
use godwit_model::{ContainerName, HostName};
use godwit_plan::{EvacuationPlan, How, Step};
use tokio_util::sync::CancellationToken;

use super::held::Spared;
use super::{Wake, view};
use crate::core::{Core, locked};
use crate::moves::{self, MoveError, Part};
use crate::state::records::{ContainerRecord, Evacuation, HostRecord};
use crate::state::{About, StateError, Tx, World, now_ms};

/// The longest time between two passes, in milliseconds.
const PASS_EVERY_MS: u64 = 1_000;
/// Attempts for one container; then the others go on without it.
const MAX_TRIES: u32 = 3;
/// The wait before the second attempt, in milliseconds; doubled for the third.
const AGAIN_MS: u64 = 2_000;
/// The time that agents get to come to a controller that has just started, in milliseconds.
const AGENTS_COME_MS: u64 = 30_000;
/// Moves to a host that comes back, at the same time.
const BACK_AT_ONCE: usize = 2;
const NOT_BEGUN: &str = "its move was not begun";

/// Attempts that ended before there was a move: the store does not have them. A restart of the controller forgets
/// them, which costs attempts and nothing else.
#[derive(Debug)]
pub struct Evacuations {
    refused: Mutex<BTreeMap<(HostName, ContainerName), Refused>>,
    started: Instant,
}

impl Default for Evacuations {
    fn default() -> Self {
        Self { refused: Mutex::default(), started: Instant::now() }
    }
}

#[derive(Debug, Clone, Default)]
struct Refused {
    tries: u32,
    at_ms: u64,
    because: Vec<String>,
}

impl Evacuations {
    /// Attempts for this host's containers count from none again.
    pub fn forget(&self, host: &HostName) {
        locked(&self.refused).retain(|(of, _), _| of != host);
    }

    fn note(&self, host: &HostName, container: &ContainerName, because: Vec<String>) {
        let mut refused = locked(&self.refused);
        let entry = refused.entry((host.clone(), container.clone())).or_default();
        *entry = Refused { tries: entry.tries + 1, at_ms: now_ms(), because };
    }

    fn of(&self, host: &HostName, container: &ContainerName) -> Refused {
        locked(&self.refused).get(&(host.clone(), container.clone())).cloned().unwrap_or_default()
    }
}

/// Runs until `stop`.
pub async fn run(core: &Arc<Core>, stop: &CancellationToken) {
    let mut wake = Wake::new(core, PASS_EVERY_MS);
    while wake.next(stop).await {
        let world = core.state.world();
        for (name, host) in &world.hosts {
            let result = match &host.evacuation {
                Some(evacuation) if host.state == HostState::Evacuating => empty(core, name, evacuation).await,
                _ if host.state == HostState::Active && !host.bring_back.is_empty() => bring_back(core, name).await,
                _ => continue,
            };
            if let Err(error) = result {
                let error = ErrorBody::from_chain(&error).one_line();
                tracing::error!(host = %name, error, "emptying or filling a host failed; tried again");
            }
        }
    }
}

/// One pass for one host: ends the evacuation, or begins the moves that may begin now.
async fn empty(core: &Arc<Core>, host: &HostName, evacuation: &Evacuation) -> Result<(), StateError> {
    let world = core.state.world();
    let holds = |c: &ContainerRecord| c.owner() == Some(host) || c.leaving.iter().any(|l| l.host == *host);
    let owned = world.containers.values().filter(|c| c.owner() == Some(host)).count();
    if owned == 0 {
        // What leaves is still there for a moment.
        let left = world.containers.values().any(|c| holds(c) || (c.removed && c.host.as_ref() == Some(host)));
        let moving = world.open_moves().any(|m| m.from == *host || m.to == *host);
        return if left || moving { Ok(()) } else { end(core, host, HostState::Evacuated, BTreeMap::new()).await };
    }
    // What a host that is away has, nobody knows; it goes on when it is back.
    if !core.links.report(host).is_some_and(|report| report.current) {
        return Ok(());
    }
    let parallel = evacuation.options.parallel.max(1) as usize;
    let mut under_way = world.open_moves().filter(|m| m.from == *host).count();
    let fleet = view::fleet_but(core, &world, Spared::of_evacuation(host));
    let Ok(plan) = godwit_plan::evacuate(&fleet, host, &evacuation.options) else { return Ok(()) };
    let mut stays = told_stays(&world, &plan);
    // Something goes on, or will be tried again by itself.
    let mut lives = under_way > 0;
    let mut given_up = vec![false; plan.steps.len()];
    for (at, step) in plan.steps.iter().enumerate() {
        if let Some(first) = step.after.iter().find(|first| given_up[**first]) {
            given_up[at] = true;
            stays.insert(step.container.clone(), vec![format!("it waits for {}", plan.steps[*first].container)]);
            continue;
        }
        match standing(core, &world, host, evacuation, step) {
            Standing::GivenUp(because) => {
                given_up[at] = true;
                stays.insert(step.container.clone(), because);
            }
            Standing::Waits => lives = true,
            Standing::MayBegin if !step.after.is_empty() || under_way >= parallel => lives = true,
            Standing::MayBegin if companion_moves(&world, &step.container) => lives = true,
            Standing::MayBegin => {
                lives = true;
                under_way += usize::from(begin(core, host, step, &together(&plan, step)).await?);
            }
        }
    }
    if lives || !all_have_come(core, &world) {
        Ok(())
    } else {
        end(core, host, HostState::EvacuationFailed, stays).await
    }
}

/// Whether a place that is missing is not only missing because its host's agent has not come to this controller yet.
pub fn all_have_come(core: &Core, world: &World) -> bool {
    let mut open = world.hosts.iter().filter(|(_, host)| host.state == HostState::Active);
    core.evacuations.started.elapsed() > Duration::from_millis(AGENTS_COME_MS)
        || open.all(|(name, _)| core.links.report(name).is_some_and(|report| report.current))
}

/// What the plan leaves there, without what is being moved already.
fn told_stays(world: &World, plan: &EvacuationPlan) -> BTreeMap<ContainerName, Vec<String>> {
    let rests = |name: &ContainerName| world.containers.get(name).is_some_and(|c| c.moving.is_none());
    let stays = plan.stays.iter().filter(|stay| rests(&stay.container));
    stays.map(|stay| (stay.container.clone(), stay.reasons.clone())).collect()
}

enum Standing {
    MayBegin,
    /// Until some time after the last attempt.
    Waits,
    GivenUp(Vec<String>),
}

/// How often a step was tried in this evacuation, by the store and by [`Evacuations`].
fn standing(core: &Core, world: &World, host: &HostName, evacuation: &Evacuation, step: &Step) -> Standing {
    let since = evacuation.requested_at_ms;
    let tried = world.moves.values().filter(|m| m.name == step.container && m.requested_at_ms >= since);
    let mut failed: Vec<(u64, String)> = tried
        .filter_map(|m| match &m.outcome {
            Outcome::Failed { phase, reason } => Some((m.finished_at_ms?, format!("{phase}: {reason}"))),
            _ => None,
        })
        .collect();
    failed.sort();
    let refused = core.evacuations.of(host, &step.container);
    let tries = failed.len() as u32 + refused.tries;
    if tries == 0 {
        return Standing::MayBegin;
    }
    let last = failed.last().map_or(0, |(at, _)| *at);
    if tries >= MAX_TRIES {
        let because =
            if refused.at_ms >= last { refused.because } else { failed.into_iter().map(|(_, b)| b).collect() };
        return Standing::GivenUp(because);
    }
    let next = last.max(refused.at_ms) + (AGAIN_MS << (tries - 1));
    if now_ms() < next { Standing::Waits } else { Standing::MayBegin }
}

/// Whether what it must be near is on its way: then it follows when that has arrived, and stays if that stays.
fn companion_moves(world: &World, name: &ContainerName) -> bool {
    let layer = world.envs.get(&name.env).and_then(|env| env.manifest.layers.get(&name.layer));
    let near = |other: &ContainerName| {
        other.env == name.env && layer.is_some_and(|layer| layer.rules.near.contains(&other.layer))
    };
    world.open_moves().any(|m| m.outcome == Outcome::Moving && near(&m.name))
}

/// What goes to the same host with this step, because one must be near the other.
fn together(plan: &EvacuationPlan, step: &Step) -> Vec<ContainerName> {
    let in_unit = |other: &&Step| step.unit.is_some() && other.unit == step.unit;
    plan.steps.iter().filter(in_unit).map(|other| other.container.clone()).collect()
}

/// Begins a step; whether something is under way now.
async fn begin(core: &Arc<Core>, host: &HostName, step: &Step, together: &[ContainerName]) -> Result<bool, StateError> {
    if step.how == How::Restart {
        return restart_elsewhere(core, host, &step.container).await;
    }
    let part = Part { cause: Some(Cause::Evacuation { host: host.clone() }), together };
    match moves::request_for(core, &step.container, Some(step.to.clone()), MoveOptions::default(), part).await {
        Ok(_) => Ok(true),
        Err(MoveError::State(error)) => Err(error),
        // Somebody else moves it; what becomes of that is seen by a later pass.
        Err(MoveError::Busy { .. }) => Ok(false),
        Err(MoveError::Refused { because, .. }) => {
            core.evacuations.note(host, &step.container, because);
            Ok(false)
        }
        Err(error) => {
            let because = vec![NOT_BEGUN.to_owned(), ErrorBody::from_chain(&error).one_line()];
            core.evacuations.note(host, &step.container, because);
            Ok(false)
        }
    }
}

/// Takes a container off the host: it is stopped there, and placed anew when it is gone. Only as was allowed.
async fn restart_elsewhere(core: &Core, host: &HostName, name: &ContainerName) -> Result<bool, StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let Some(old) = world.containers.get(name).filter(|c| c.owner() == Some(host) && c.moving.is_none()) else {
            return Ok::<_, StateError>((tx, false));
        };
        let mut record = old.value.clone();
        record.leave_host();
        record.generation = record.generation.next();
        tx.put_container(Some(old), &record);
        let message =
            format!("{name} is stopped on {host} and starts again elsewhere: it cannot move, and that was allowed");
        tx.event(EventKind::ContainerStopped, About::container(name, Some(host)), message);
        Ok((tx, true))
    };
    core.state.transact(decide).await.map(|(done, _)| done)
}

/// The evacuation is over.
async fn end(
    core: &Core,
    host: &HostName,
    state: HostState,
    stays: BTreeMap<ContainerName, Vec<String>>,
) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let Some(old) = world.hosts.get(host).filter(|h| h.state == HostState::Evacuating) else {
            return Ok::<_, StateError>((tx, ()));
        };
        let Some(evacuation) = &old.evacuation else { return Ok((tx, ())) };
        if state == HostState::Evacuated && world.containers.values().any(|c| c.host.as_ref() == Some(host)) {
            return Ok((tx, ()));
        }
        let evacuation = Evacuation { stays: stays.clone(), ..evacuation.clone() };
        tx.put_host(Some(old), &HostRecord { state, evacuation: Some(evacuation), ..old.value.clone() });
        let (kind, message) = match state {
            HostState::Evacuated => {
                (EventKind::HostEvacuated, format!("{host} has no container any more and may be switched off"))
            }
            _ => {
                let named: Vec<String> = stays.iter().map(|(name, b)| format!("{name}: {}", b.join(", "))).collect();
                (EventKind::HostEvacuationFailed, format!("{host} is not empty: {}", named.join("; ")))
            }
        };
        tx.event(kind, About::host(host), message);
        Ok((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// Moves what was moved away here again, a few at a time, each once.
async fn bring_back(core: &Arc<Core>, host: &HostName) -> Result<(), StateError> {
    let world = core.state.world();
    let under_way = world.open_moves().filter(|m| m.to == *host).count();
    let Some(record) = world.hosts.get(host) else { return Ok(()) };
    let next: Vec<ContainerName> =
        record.bring_back.iter().take(BACK_AT_ONCE.saturating_sub(under_way)).cloned().collect();
    for name in &next {
        let away = world.containers.get(name).is_some_and(|c| c.owner().is_some_and(|owner| owner != host));
        // What was there together comes back together.
        let part = Part { cause: Some(Cause::Return { host: host.clone() }), together: &record.bring_back };
        let to = Some(host.clone());
        if away && let Err(error) = moves::request_for(core, name, to, MoveOptions::default(), part).await {
            let error = ErrorBody::from_chain(&error).one_line();
            tracing::info!(container = %name, %host, error, "not brought back");
        }
    }
    let decide = |world: &World| {
        let mut tx = Tx::new();
        if let Some(old) = world.hosts.get(host) {
            let bring_back = old.bring_back.iter().filter(|name| !next.contains(name)).cloned().collect();
            let record = HostRecord { bring_back, ..old.value.clone() };
            if record != old.value {
                tx.put_host(Some(old), &record);
            }
        }
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}
