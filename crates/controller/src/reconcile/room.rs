//! Makes room for containers that are to have more than their hosts have.
//!
//! As with evacuations there is no stored plan: what is stored is what a container shall have, and on which host by the
//! plan that is being carried out, so that nothing else takes that room. Each pass plans anew, begins the moves that
//! wait for no other, and lets them end before it plans again. When no move is left the container grows.

mod tries;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_api::types::ErrorBody;
use godwit_model::container::Resources;
use godwit_model::event::EventKind;
use godwit_model::migration::{Cause, Move, MoveOptions};
use godwit_model::{ContainerName, HostName};
use godwit_plan::{Fleet, RoomError, RoomPlan, Step, make_room};
use tokio_util::sync::CancellationToken;

use super::held::Spared;
use super::{Wake, evacuate, view};
use crate::core::{Core, locked};
use crate::moves::{self, MoveError};
use crate::state::records::{ContainerRecord, Growth};
use crate::state::{About, StateError, Tx, World};
use tries::Tries;

/// The longest time between two passes, in milliseconds.
const PASS_EVERY_MS: u64 = 1_000;
/// Moves for one grower at the same time.
const AT_ONCE: usize = 2;
/// How long a growth that was refused rests, whatever changes, in milliseconds.
const REST_MS: u64 = 2_000;
/// After this time it is planned again although nothing has changed, in milliseconds: what containers use has.
const AGAIN_MS: u64 = 60_000;
/// Containers that could not make way are told by name, so many of them.
const MAX_TOLD: usize = 5;

/// What is known of growers beside what the store has. A restart of the controller forgets it, which costs attempts
/// and nothing else.
#[derive(Debug, Default)]
pub struct Rooms {
    growers: Mutex<BTreeMap<ContainerName, Grower>>,
}

#[derive(Debug, Default)]
struct Grower {
    /// Moves of the plan that have not begun.
    steps: Vec<(ContainerName, HostName)>,
    refused: Option<Refused>,
    tries: Tries,
}

#[derive(Debug, Clone)]
struct Refused {
    because: String,
    at: Instant,
    seen: Seen,
}

/// What a refusal may depend on and that changes rarely.
type Seen = (u64, Vec<HostName>);

impl Rooms {
    /// Places that the plan of this grower will need, and who will go there.
    pub fn steps(&self, grower: &ContainerName) -> Vec<(ContainerName, HostName)> {
        locked(&self.growers).get(grower).map(|g| g.steps.clone()).unwrap_or_default()
    }

    /// Why there is no way to grow.
    pub fn refusal(&self, grower: &ContainerName) -> Option<String> {
        locked(&self.growers).get(grower)?.refused.as_ref().map(|refused| refused.because.clone())
    }

    fn keep_only(&self, world: &World) {
        locked(&self.growers).retain(|name, _| world.containers.get(name).is_some_and(|c| c.growth.is_some()));
    }

    fn with<T>(&self, grower: &ContainerName, change: impl FnOnce(&mut Grower) -> T) -> T {
        change(locked(&self.growers).entry(grower.clone()).or_default())
    }
}

impl Refused {
    fn rests(&self, seen: &Seen) -> bool {
        let since = self.at.elapsed();
        since < Duration::from_millis(REST_MS) || (self.seen == *seen && since < Duration::from_millis(AGAIN_MS))
    }
}

/// Runs until `stop`.
pub async fn run(core: &Arc<Core>, stop: &CancellationToken) {
    let mut wake = Wake::new(core, PASS_EVERY_MS);
    while wake.next(stop).await {
        let world = core.state.world();
        core.rooms.keep_only(&world);
        let mut growing: Vec<(u64, ContainerName)> = world
            .containers
            .iter()
            .filter_map(|(n, c)| Some((c.growth.as_ref()?.requested_at_ms, n.clone())))
            .collect();
        growing.sort();
        for (_, name) in growing {
            if let Err(error) = grow(core, &name).await {
                let error = ErrorBody::from_chain(&error).one_line();
                tracing::error!(container = %name, error, "making room failed; tried again");
            }
        }
    }
}

/// One pass for one container: it grows, or the moves begin that may begin now, or it is refused for the time being.
async fn grow(core: &Arc<Core>, name: &ContainerName) -> Result<(), StateError> {
    let world = core.state.world();
    let Some((record, growth)) = growing(&world, name) else { return Ok(()) };
    let Some(home) = record.owner() else { return Ok(()) };
    // What has begun ends first: a plan does not count on what is in the air.
    if record.moving.is_some() || world.open_moves().any(|m| m.name == *name || is_for(m, name)) {
        return Ok(());
    }
    if !world.hosts.get(home).is_some_and(|host| host.state.takes_containers()) {
        // It will be moved from there with what it has, and is looked at again when it is somewhere.
        core.rooms.with(name, |grower| grower.steps.clear());
        return hold_on(core, name, None, None).await;
    }
    let seen = seen(core, &world);
    let rests = core.rooms.with(name, |grower| grower.refused.as_ref().is_some_and(|refused| refused.rests(&seen)));
    if rests || !core.links.connected(home) {
        return Ok(());
    }
    let mut fleet = fleet_for(core, &world, name);
    let waiting = core.rooms.with(name, |grower| grower.tries.apply(&world, name, growth, &mut fleet));
    match plan(&fleet, name, growth) {
        Ok(plan) if plan.steps.is_empty() => enlarge(core, name).await,
        Ok(plan) => carry_out(core, name, &plan, &waiting).await,
        Err(RoomError::NoWay { because, .. }) if evacuate::all_have_come(core, &world) => {
            refuse(core, name, reasons(&fleet, home, because), seen).await
        }
        // Tried again by the next pass.
        Err(_) => Ok(()),
    }
}

/// With those who could have made way and cannot.
fn reasons(fleet: &Fleet, home: &HostName, mut because: Vec<String>) -> String {
    let stuck = fleet.containers_on(home).into_iter().filter(|c| !c.unmovable.is_empty());
    let stuck = stuck.take(MAX_TOLD).map(|c| format!("{} cannot move: {}", c.name, c.unmovable.join(", ")));
    because.extend(stuck);
    because.dedup();
    because.join("; ")
}

fn growing<'w>(world: &'w World, name: &ContainerName) -> Option<(&'w ContainerRecord, &'w Growth)> {
    let record = world.containers.get(name)?;
    Some((&record.value, record.growth.as_ref()?))
}

/// Whether a move is one of those that make room for `grower`.
fn is_for(one: &Move, grower: &ContainerName) -> bool {
    matches!(&one.cause, Some(Cause::Room { grower: of }) if of == grower)
}

fn seen(core: &Core, world: &World) -> Seen {
    (world.revision.0, world.hosts.keys().filter(|host| core.links.connected(host)).cloned().collect())
}

fn fleet_for(core: &Core, world: &World, grower: &ContainerName) -> Fleet {
    view::fleet_but(core, world, Spared::of_plan(grower))
}

fn plan(fleet: &Fleet, name: &ContainerName, growth: &Growth) -> Result<RoomPlan, RoomError> {
    make_room(fleet, name, growth.resources.reserved_memory, growth.resources.reserved_cpu)
}

/// Its host has the room: it gets what it shall have.
async fn enlarge(core: &Core, name: &ContainerName) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let Some(old) = world.containers.get(name).filter(|c| c.moving.is_none()) else {
            return Ok::<_, StateError>((tx, ()));
        };
        let (Some(growth), Some(home)) = (&old.growth, old.owner()) else { return Ok((tx, ())) };
        let fits = plan(&fleet_for(core, world, name), name, growth).is_ok_and(|plan| plan.steps.is_empty());
        if fits {
            let mut record = old.value.clone();
            record.spec.resources = growth.resources;
            record.growth = None;
            tx.put_container(Some(old), &record);
            let message = format!("{name} has {} on {home} now", told(&growth.resources));
            tx.event(EventKind::ContainerGrown, About::container(name, Some(home)), message);
        }
        Ok((tx, ()))
    };
    let _alone = core.placing.lock().await;
    core.state.transact(decide).await.map(|_| ())
}

fn told(resources: &Resources) -> String {
    format!("{} and {} CPUs reserved", resources.reserved_memory, resources.reserved_cpu)
}

/// Holds the room, and begins the moves that wait for no other.
async fn carry_out(
    core: &Arc<Core>,
    name: &ContainerName,
    plan: &RoomPlan,
    waiting: &[ContainerName],
) -> Result<(), StateError> {
    let others = plan.steps.iter().filter(|step| step.container != *name);
    let steps = others.map(|step| (step.container.clone(), step.to.clone())).collect();
    core.rooms.with(name, |grower| {
        grower.steps = steps;
        grower.refused = None;
    });
    let message = format!("{name} grows on {}: {}", plan.host, ways(plan));
    hold_on(core, name, Some(&plan.host), Some((EventKind::ContainerGrowing, message))).await?;
    let ready = plan.steps.iter().filter(|step| step.after.is_empty() && !waiting.contains(&step.container));
    for step in ready.take(AT_ONCE) {
        begin(core, name, step).await?;
    }
    Ok(())
}

/// What the plan does, and what else was weighed.
fn ways(plan: &RoomPlan) -> String {
    let steps = plan.steps.iter().map(|step| format!("{} → {}", step.container, step.to));
    let cost = |way: &godwit_plan::Way| way.cost.map_or("not possible".to_owned(), |cost| format!("cost {cost}"));
    let weighed: Vec<String> = plan.ways.iter().map(|way| format!("{}: {}", way.what, cost(way))).collect();
    format!("{} ({})", steps.collect::<Vec<_>>().join(", "), weighed.join("; "))
}

/// Stores where it will have the room, or that there is no plan; tells that if it is new.
async fn hold_on(
    core: &Core,
    name: &ContainerName,
    host: Option<&HostName>,
    tell: Option<(EventKind, String)>,
) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let Some(old) = world.containers.get(name) else { return Ok::<_, StateError>((tx, ())) };
        let Some(growth) = old.growth.as_ref().filter(|growth| growth.host.as_ref() != host) else {
            return Ok((tx, ()));
        };
        let growth = Some(Growth { host: host.cloned(), ..growth.clone() });
        tx.put_container(Some(old), &ContainerRecord { growth, ..old.value.clone() });
        if let Some((kind, message)) = &tell {
            tx.event(*kind, About::container(name, old.owner()), message.clone());
        }
        Ok((tx, ()))
    };
    let _alone = core.placing.lock().await;
    core.state.transact(decide).await.map(|_| ())
}

async fn begin(core: &Arc<Core>, grower: &ContainerName, step: &Step) -> Result<(), StateError> {
    let cause = Cause::Room { grower: grower.clone() };
    let world = core.state.world();
    let fleet = view::fleet_but(core, &world, Spared::of_move(&step.container, Some(&cause)));
    let because = match fleet.check_move(&step.container, &step.to) {
        Err(because) => because,
        Ok(()) => {
            let (to, options) = (Some(step.to.clone()), MoveOptions::default());
            match moves::request_for(core, &step.container, to, options, moves::Part::of(cause)).await {
                // Somebody else moves it; what becomes of that is seen by a later pass.
                Ok(_) | Err(MoveError::Busy { .. }) => return Ok(()),
                Err(MoveError::State(error)) => return Err(error),
                Err(MoveError::Refused { because, .. }) => because,
                Err(error) => vec![ErrorBody::from_chain(&error).one_line()],
            }
        }
    };
    core.rooms.with(grower, |known| known.tries.note(&step.container, because));
    Ok(())
}

/// There is no way: the room that was held is given back, and it is told once.
async fn refuse(core: &Core, name: &ContainerName, because: String, seen: Seen) -> Result<(), StateError> {
    let new = core.rooms.with(name, |grower| {
        grower.steps.clear();
        let new = grower.refused.as_ref().is_none_or(|refused| refused.because != because);
        grower.refused = Some(Refused { because: because.clone(), at: Instant::now(), seen });
        new
    });
    hold_on(core, name, None, None).await?;
    let tell = |world: &World| {
        let mut tx = Tx::new();
        if let Some((record, growth)) = growing(world, name).filter(|_| new) {
            let message = format!("{name} cannot have {} yet: {because}", told(&growth.resources));
            tx.event(EventKind::ContainerNotGrown, About::container(name, record.owner()), message);
        }
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(tell).await.map(|_| ())
}
