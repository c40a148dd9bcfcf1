//! Moves containers so that the fleet gets better: a few at a time, planned anew before each, and nothing while anything
//! more important goes on.
//!
//! It cannot flap. Advice only ever makes the spread better, or leaves that and makes the fuller host less full; it is
//! made for the fleet as it will be when what is under way has ended; and who has moved rests, by what the store says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_api::types::{BalanceMode, ErrorBody};
use godwit_model::ContainerName;
use godwit_model::event::EventKind;
use godwit_model::migration::{Cause, MoveOptions, Outcome};
use godwit_plan::{Advice, Advised, Purpose};
use tokio_util::sync::CancellationToken;

use super::view;
use crate::balance::{self, advice, record};
use crate::core::{Core, locked};
use crate::moves::{self, MoveError};
use crate::state::records::BalanceRecord;
use crate::state::{About, StateError, Tx, World, now_ms};

/// The longest time between two passes, in milliseconds.
const PASS_EVERY_MS: u64 = 2_000;
/// The shortest time between two passes, in milliseconds: many changes at once make one.
const PASS_PAUSE_MS: u64 = 200;
/// In large fleets a pass takes a while: pauses are so many times as long as the last pass.
const PAUSE_SHARE: u32 = 4;
/// How long a container is left alone whose move was not even begun, in milliseconds.
const REFUSED_REST_MS: u64 = 60_000;
/// How long a container is left alone whose move failed, in milliseconds, whatever the policy says; doubled with each
/// failure that has not been forgotten, up to [`MAX_DOUBLED`] times.
const FAILED_REST_MS: u64 = 60_000;
const MAX_DOUBLED: u32 = 6;
/// How often it is told at most that moves are advised, in milliseconds: anew, and still.
const TELL_EVERY_MS: u64 = 60_000;
const TELL_AGAIN_MS: u64 = 3_600_000;

/// What a restart of the controller may forget.
#[derive(Debug, Default)]
pub struct Balancing {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Whose move was not begun, and when.
    refused: BTreeMap<ContainerName, Instant>,
    /// When it was last told that moves are advised.
    told: Option<Instant>,
    /// Since then none was.
    was_none: bool,
    /// Moves begun since there was nothing to do.
    begun: usize,
}

impl Balancing {
    fn with<T>(&self, change: impl FnOnce(&mut Kept) -> T) -> T {
        change(&mut locked(&self.kept))
    }
}

/// Runs until `stop`.
pub async fn run(core: &Arc<Core>, stop: &CancellationToken) {
    let mut worlds = core.state.follow();
    let mut pause = Duration::from_millis(PASS_PAUSE_MS);
    loop {
        let longest = Duration::from_millis(PASS_EVERY_MS).saturating_sub(pause);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = worlds.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(longest) => {}
        }
        worlds.mark_unchanged();
        let begun = Instant::now();
        if let Err(error) = pass(core).await {
            let error = ErrorBody::from_chain(&error).one_line();
            tracing::error!(error, "balancing failed; tried again");
        }
        pause = (begun.elapsed() * PAUSE_SHARE).max(Duration::from_millis(PASS_PAUSE_MS));
    }
}

async fn pass(core: &Arc<Core>) -> Result<(), StateError> {
    let world = core.state.world();
    let record = record(&world);
    core.loads.look(core, &world, &record.policy);
    let carries_out = record.mode == BalanceMode::Automatic || record.once.is_some();
    if record.mode == BalanceMode::Off && !carries_out {
        return Ok(());
    }
    // Something else comes first; what has begun goes on.
    let Ok(advice) = advice(core, &world, &record.policy) else { return Ok(()) };
    if !carries_out {
        return tell(core, &advice).await;
    }
    let under_way = balance::under_way(&world).count();
    let rest = Duration::from_millis(REFUSED_REST_MS);
    core.balancing.with(|kept| kept.refused.retain(|_, at| at.elapsed() < rest));
    let meant = |name: &ContainerName| {
        let asked = record.once.as_ref().is_some_and(|once| once.contains(name));
        let rests = core.balancing.with(|kept| kept.refused.contains_key(name));
        !rests && !has_failed(&world, name) && (record.mode == BalanceMode::Automatic || asked)
    };
    let meant: Vec<&Advised> = advice.moves.iter().filter(|advised| meant(&advised.step.container)).collect();
    let ready: Vec<&Advised> = meant.into_iter().filter(|advised| advised.step.after.is_empty()).collect();
    if ready.is_empty() {
        // What waits for a move that is not meant, or was not begun, waits for good.
        return if under_way == 0 { end(core, &record, &advice).await } else { Ok(()) };
    }
    for advised in ready.into_iter().take((record.at_once as usize).saturating_sub(under_way)) {
        begin(core, advised).await?;
    }
    Ok(())
}

/// Whether its last moves for balance failed, and that is not long ago.
fn has_failed(world: &World, name: &ContainerName) -> bool {
    let of_it = world.moves.values().filter(|m| m.name == *name && matches!(m.cause, Some(Cause::Balance { .. })));
    let mut ends: Vec<(u64, bool)> =
        of_it.filter_map(|m| Some((m.finished_at_ms?, matches!(m.outcome, Outcome::Failed { .. })))).collect();
    ends.sort();
    let failures = ends.iter().rev().take_while(|(_, failed)| *failed).count() as u32;
    let rest = FAILED_REST_MS << failures.saturating_sub(1).min(MAX_DOUBLED);
    failures > 0 && ends.last().is_some_and(|(at, _)| at.saturating_add(rest) > now_ms())
}

/// Says that there is something to do, where nobody does it.
async fn tell(core: &Core, advice: &Advice) -> Result<(), StateError> {
    let count = advice.moves.len();
    let tell = core.balancing.with(|kept| {
        kept.was_none |= count == 0;
        let pause = Duration::from_millis(if kept.was_none { TELL_EVERY_MS } else { TELL_AGAIN_MS });
        let tell = count > 0 && kept.told.is_none_or(|at| at.elapsed() >= pause);
        if tell {
            (kept.told, kept.was_none) = (Some(Instant::now()), false);
        }
        tell
    });
    if !tell {
        return Ok(());
    }
    let moves = if count == 1 { "move" } else { "moves" };
    let message = format!("{count} {moves} would make the fleet better: `godwit balance show` says which and why");
    event(core, EventKind::BalanceAdvised, &message).await
}

async fn event(core: &Core, kind: EventKind, message: &str) -> Result<(), StateError> {
    let decide = |_: &World| {
        let mut tx = Tx::new();
        tx.event(kind, About::default(), message);
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// Begins one move, if every rule still allows it now.
async fn begin(core: &Arc<Core>, advised: &Advised) -> Result<(), StateError> {
    let step = &advised.step;
    let world = core.state.world();
    let because = match view::fleet(core, &world).check_move(&step.container, &step.to) {
        Err(because) => because.join(", "),
        Ok(()) => {
            let cause = Cause::Balance { reason: format!("{}: {}", purpose(advised), step.reasons.join("; ")) };
            let (to, options) = (Some(step.to.clone()), MoveOptions::default());
            match moves::request_for(core, &step.container, to, options, moves::Part::of(cause)).await {
                Ok(_) => {
                    core.balancing.with(|kept| kept.begun += 1);
                    return begun(core, &step.container).await;
                }
                Err(MoveError::State(error)) => return Err(error),
                Err(MoveError::Refused { because, .. }) => because.join(", "),
                Err(error) => ErrorBody::from_chain(&error).one_line(),
            }
        }
    };
    tracing::info!(container = %step.container, to = %step.to, because, "not moved for balance; left alone for a while");
    core.balancing.with(|kept| kept.refused.insert(step.container.clone(), Instant::now()));
    Ok(())
}

fn purpose(advised: &Advised) -> &'static str {
    match advised.purpose {
        Purpose::Spread => "spread",
        Purpose::Overload => "overload",
        Purpose::Level => "level",
    }
}

/// It is tried once by what a person asked for.
async fn begun(core: &Core, name: &ContainerName) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        if let Some(old) = &world.balance {
            let mut new = old.value.clone();
            if new.once.as_mut().is_some_and(|once| once.remove(name)) {
                tx.put_balance(Some(old), &new);
            }
        }
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

fn moves_were(count: usize) -> String {
    if count == 1 { "1 move was".to_owned() } else { format!("{count} moves were") }
}

/// Nothing is under way and nothing is left to do.
async fn end(core: &Core, record: &BalanceRecord, advice: &Advice) -> Result<(), StateError> {
    let begun = core.balancing.with(|kept| std::mem::take(&mut kept.begun));
    if begun == 0 && record.once.is_none() {
        return Ok(());
    }
    let left = match advice.moves.len() {
        0 => "nothing more would make the fleet better".to_owned(),
        n => format!("{n} more would make the fleet better"),
    };
    let message = format!("{} made for balance; {left}", moves_were(begun));
    let decide = |world: &World| {
        let mut tx = Tx::new();
        if let Some(old) = world.balance.as_ref().filter(|old| old.once.is_some()) {
            tx.put_balance(Some(old), &BalanceRecord { once: None, ..old.value.clone() });
        }
        tx.event(EventKind::BalanceDone, About::default(), message.clone());
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}
