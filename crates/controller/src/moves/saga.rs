//! One move from its request to its end.
//!
//! ```text
//! Moving ── PrepareMove → destination ── StartMove → source ── MoveReady ── hand over (one transaction) ── HandedOver
//!    │                                                                                                       │
//!    └── any failure, cancel, a host that stays away: Failed, both sides are told          ActivateMove → destination
//!                                                                                          ReleaseMove  → source ── Done
//! ```
//! Before the hand-over everything can be taken back, after it nothing: then it is only retried. A saga that starts on a
//! move it did not begin (the controller was restarted) takes it back, or finishes it if it was handed over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::link::{FromAgent, REQUEST_TIMEOUT_MS, Reply, Request};
use godwit_api::types::ErrorBody;
use godwit_model::event::EventKind;
use godwit_model::host::HostState;
use godwit_model::migration::{DowntimePart, Move, Outcome, Phase, Summary};
use godwit_model::{HostName, MoveId};
use tokio::sync::mpsc;

use super::{Heard, estimate};
use crate::core::Core;
use crate::desired::members;
use crate::links::AskError;
use crate::state::records::ContainerRecord;
use crate::state::{About, StateError, Tx, World, now_ms};

/// How long a host of a move may be away before the hand-over, in milliseconds: an agent that is restarted is back by
/// then.
const AWAY_MS: u64 = 3_000;
/// Getting a destination ready may take this long, in milliseconds: it may have to pull the image.
const PREPARE_TIMEOUT_MS: u64 = 600_000;
/// Pause before a host that owns the container is asked again to let it run, in milliseconds.
const AGAIN_MS: u64 = 500;

/// A move without a deadline of its own is given up after this time, in milliseconds: a week.
const NO_DEADLINE_MS: u64 = 7 * 24 * 3_600_000;

/// Everything has arrived.
struct Ready {
    at: Instant,
    summary: Summary,
}

/// Why it was not handed over.
enum Stopped {
    /// It failed; the sentence and the phase.
    Failed(Phase, String),
    /// Somebody else ended it: cancelled, or its container was removed.
    Ended,
}

/// Runs until the move is over.
pub async fn run(core: &Arc<Core>, id: &MoveId, mut heard: mpsc::Receiver<Heard>) {
    let ours = core.moves.take_begun(id);
    let world = core.state.world();
    let Some(open) = world.moves.get(id).map(|m| m.value.clone()) else { return };
    let mut activated = None;
    if open.outcome == Outcome::Moving {
        let ready = if ours {
            tokio::select! {
                ready = send(core, &open, &mut heard) => ready,
                stopped = obstacle(core, &open) => Err(stopped),
            }
        } else {
            Err(Stopped::Failed(open.phase, "the controller was restarted in the middle of it".to_owned()))
        };
        let mut reason = "it was ended before the hand-over".to_owned();
        let stored = match ready {
            Ok(ready) => {
                godwit_hold::reach("hand-over").await;
                activated = Some(ready);
                hand_over(core, &open).await
            }
            Err(Stopped::Failed(phase, why)) => {
                let stored = fail(core, id, phase, &why).await.map(|_| ());
                reason = why;
                stored
            }
            Err(Stopped::Ended) => Ok(()),
        };
        if let Err(error) = stored {
            // What the store says is unknown now. Both sides wait for its word; the next saga of this move reads it.
            tracing::error!(%id, error = ErrorBody::from_chain(&error).one_line(), "a move is undecided");
            return;
        }
        // Only the store's word counts: whatever went wrong here, a move that it calls handed over is finished.
        match core.state.world().moves.get(id).map(|m| m.outcome.clone()) {
            Some(Outcome::HandedOver) => {}
            Some(Outcome::Moving | Outcome::Done) => return,
            Some(Outcome::Failed { .. }) | None => return take_back(core, &open, &reason).await,
        }
    }
    finish(core, &open, activated).await;
}

/// Up to the word of the destination that everything is there.
async fn send(core: &Arc<Core>, open: &Move, heard: &mut mpsc::Receiver<Heard>) -> Result<Ready, Stopped> {
    let world = core.state.world();
    let (id, phase) = (&open.id, Phase::Prepare);
    core.moves.advance(id, phase, None);
    let record = world.containers.get(&open.name).filter(|c| c.spec.id == open.container).ok_or(Stopped::Ended)?;
    let spec = Box::new(record.spec.clone());
    let vni_mac = (record.spec.network.vni, record.spec.network.mac);
    let failed = |error: AskError| Stopped::Failed(phase, ErrorBody::from_chain(&error).one_line());
    let report = core.links.report(&open.from);
    let memory = report.and_then(|r| r.containers.get(&open.container)?.memory).unwrap_or_default();
    let (generation, from) = (open.generation.next(), open.from.clone());
    // Both sides have been told of the move by any `Desired` from this revision on.
    let revision = world.moves.get(id).ok_or(Stopped::Ended)?.revision.0;
    let prepare = Request::PrepareMove { id: id.clone(), spec, generation, from, memory, revision };
    let prepared = core.links.ask_within(&open.to, prepare, PREPARE_TIMEOUT_MS).await.map_err(failed)?;
    let Reply::Prepared { address } = prepared else {
        return Err(Stopped::Failed(
            phase,
            format!("the host {} answered something else than that it is ready", open.to),
        ));
    };
    let to_tunnel = world.hosts.get(&open.to).ok_or(Stopped::Ended)?.facts.tunnel_address;
    let start = Request::StartMove {
        id: id.clone(),
        container: open.container.clone(),
        to: open.to.clone(),
        address,
        to_tunnel,
        options: open.options,
        fixed_ms: estimate::fixed_ms(&world, open),
        revision,
    };
    core.links.ask(&open.from, start).await.map_err(failed)?;
    while let Some(Heard { from, message }) = heard.recv().await {
        match message {
            FromAgent::MoveFrozen { .. } if from == open.from => {
                core.moves.advance(id, Phase::Freeze, None);
                redirect(core, open, vni_mac, to_tunnel);
            }
            ready @ FromAgent::MoveReady { .. } if from == open.to => {
                return Ok(Ready { at: Instant::now(), summary: super::cost_of(ready) });
            }
            FromAgent::MoveFailed { phase, error, .. } => {
                return Err(Stopped::Failed(phase, format!("{from}: {}", error.one_line())));
            }
            _ => {}
        }
    }
    Err(Stopped::Ended)
}

/// Resolves when something outside of the move's own messages ends it: somebody took it back, or a host stays away.
async fn obstacle(core: &Arc<Core>, open: &Move) -> Stopped {
    let mut worlds = core.state.follow();
    let mut reports = core.links.follow();
    let first_link = |host: &HostName| core.links.report(host).map(|r| r.link);
    let to_link = first_link(&open.to);
    let mut away: Option<(HostName, Instant)> = None;
    let deadline = Instant::now() + Duration::from_millis(open.options.deadline_ms.unwrap_or(NO_DEADLINE_MS));
    loop {
        let moving = worlds.borrow_and_update().moves.get(&open.id).is_some_and(|m| m.outcome == Outcome::Moving);
        if !moving {
            return Stopped::Ended;
        }
        reports.mark_unchanged();
        let phase = core.moves.phase(&open.id);
        // What a destination said over an older link may be lost, and an agent that was restarted has lost what arrived.
        if core.links.connected(&open.to) && first_link(&open.to) != to_link {
            return Stopped::Failed(phase, format!("the agent of {} was restarted or lost its link", open.to));
        }
        let missing = [&open.to, &open.from].into_iter().find(|host| !core.links.connected(host));
        away = match (missing, away) {
            (Some(host), Some((same, since))) if *host == same => Some((same, since)),
            (Some(host), _) => Some((host.clone(), Instant::now())),
            (None, _) => None,
        };
        let late = deadline.saturating_duration_since(Instant::now());
        if late.is_zero() && phase < Phase::Freeze {
            let ms = open.options.deadline_ms.unwrap_or_default();
            let seconds = ms as f64 / 1e3;
            return Stopped::Failed(phase, format!("it did not stand still within its deadline of {seconds} s"));
        }
        let limit = Duration::from_millis(AWAY_MS);
        let left = away.as_ref().map(|(_, since)| limit.saturating_sub(since.elapsed()));
        if let (Some((host, _)), Some(Duration::ZERO)) = (&away, left) {
            return Stopped::Failed(phase, format!("the host {host} cannot be reached"));
        }
        tokio::select! {
            changed = worlds.changed() => if changed.is_err() { return Stopped::Ended },
            _ = reports.changed() => {}
            () = tokio::time::sleep(left.unwrap_or(Duration::MAX / 4)), if left.is_some() => {}
            () = tokio::time::sleep(late), if !late.is_zero() => {}
        }
    }
}

/// Frames for the container go to `tunnel` on every host that takes part and is no side of the move.
fn redirect(
    core: &Arc<Core>,
    open: &Move,
    (vni, mac): (u32, godwit_model::network::MacAddress),
    to_tunnel: std::net::Ipv4Addr,
) {
    let world = core.state.world();
    let Some(env) = world.envs.get(&open.name.env) else { return };
    for host in members(&world, env) {
        if *host == open.from || *host == open.to || !core.links.connected(host) {
            continue;
        }
        let (core, host) = (Arc::clone(core), host.clone());
        tokio::spawn(async move {
            if let Err(error) = core.links.ask(&host, Request::Redirect { vni, mac, to_tunnel }).await {
                // Its frames take the way over the source until the next `Desired`.
                tracing::debug!(%host, error = ErrorBody::from_chain(&error).one_line(), "not redirected");
            }
        });
    }
}

/// The destination becomes the owner, if the move is still on.
async fn hand_over(core: &Core, open: &Move) -> Result<(), StateError> {
    core.moves.advance(&open.id, Phase::HandOver, None);
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let (Some(now), Some(old)) = (world.moves.get(&open.id), world.containers.get(&open.name)) else {
            return Ok::<_, StateError>((tx, ()));
        };
        if now.outcome != Outcome::Moving || old.spec.id != open.container || old.owner() != Some(&open.from) {
            return Ok((tx, ()));
        }
        let volumes_on = (!old.spec.volumes.is_empty()).then(|| open.to.clone());
        let record = ContainerRecord {
            host: Some(open.to.clone()),
            generation: open.generation.next(),
            moving: None,
            volumes_on,
            ..old.value.clone()
        };
        tx.put_container(Some(old), &record);
        tx.put_move(Some(now), &Move { phase: Phase::HandOver, outcome: Outcome::HandedOver, ..now.value.clone() });
        Ok((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// Stores that the move has failed. `false`: it was over already, or the destination owns the container.
pub async fn fail(core: &Core, id: &MoveId, phase: Phase, reason: &str) -> Result<bool, StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let Some(now) = world.moves.get(id).filter(|m| m.outcome == Outcome::Moving) else {
            return Ok::<_, StateError>((tx, false));
        };
        let outcome = Outcome::Failed { phase, reason: reason.to_owned() };
        let progress = core.moves.view(world, id).map_or(now.progress, |m| m.progress);
        tx.put_move(Some(now), &Move { phase, outcome, progress, finished_at_ms: Some(now_ms()), ..now.value.clone() });
        if let Some(old) = world.containers.get(&now.name).filter(|c| c.moving.as_ref() == Some(id)) {
            tx.put_container(Some(old), &ContainerRecord { moving: None, ..old.value.clone() });
        }
        let message =
            format!("{} was not moved to {}: {phase}: {reason}; it runs on, on {}", now.name, now.to, now.from);
        tx.event(EventKind::MoveFailed, About::container(&now.name, Some(&now.from)), message);
        Ok((tx, true))
    };
    core.state.transact(decide).await.map(|(done, _)| done)
}

/// Tells both sides that the move is off, and the others where the container is. Whoever is away learns it from its
/// next `Desired`.
async fn take_back(core: &Arc<Core>, open: &Move, reason: &str) {
    let world = core.state.world();
    if let (Some(record), Some(from)) = (world.containers.get(&open.name), world.hosts.get(&open.from))
        && record.spec.id == open.container
    {
        let network = &record.spec.network;
        redirect(core, open, (network.vni, network.mac), from.facts.tunnel_address);
    }
    let abort = |host: &HostName| {
        let (host, reason) = (host.clone(), reason.to_owned());
        async move {
            let request = Request::AbortMove { id: open.id.clone(), reason };
            if let Err(error) = core.links.ask(&host, request).await {
                tracing::info!(%host, error = ErrorBody::from_chain(&error).one_line(), "not told that a move is off");
            }
        }
    };
    // The source first in importance, both at once in time.
    tokio::join!(abort(&open.from), abort(&open.to));
}

/// After the hand-over: the destination lets it run, the source frees what it has.
async fn finish(core: &Arc<Core>, open: &Move, ready: Option<Ready>) {
    let activated = activate(core, open).await;
    let summary = ready.map(|Ready { at, mut summary }| {
        // Where the answer was lost, the time until the container was seen to run is the best that is known.
        let (hand_over_ms, activate_ms, frames_parked) =
            activated.unwrap_or_else(|| (at.elapsed().as_secs_f64() * 1e3, 0.0, 0));
        summary.downtime_parts.insert(DowntimePart::HandOver, hand_over_ms);
        summary.downtime_parts.insert(DowntimePart::Activate, activate_ms);
        summary.downtime_ms += hand_over_ms + activate_ms;
        summary.frames_parked = frames_parked;
        summary
    });
    core.moves.advance(&open.id, Phase::Release, None);
    release(core, open).await;
    if let Err(error) = done(core, &open.id, summary).await {
        tracing::error!(id = %open.id, error = ErrorBody::from_chain(&error).one_line(), "the end of a move is not stored");
    }
}

/// Until the destination says that the container runs: hand-over and activation in milliseconds, and parked frames;
/// `None` where the answer was lost but the container is there.
async fn activate(core: &Arc<Core>, open: &Move) -> Option<(f64, f64, u64)> {
    core.moves.advance(&open.id, Phase::Activate, None);
    let mut reports = core.links.follow();
    // Of the hand-over: the move's record is not touched between that and its end.
    let revision = core.state.world().moves.get(&open.id).map_or(0, |m| m.revision.0);
    loop {
        let request = Request::ActivateMove { id: open.id.clone(), generation: open.generation.next(), revision };
        match core.links.ask(&open.to, request).await {
            Ok(Reply::Activated { hand_over_ms, activate_ms, frames_parked }) => {
                return Some((hand_over_ms, activate_ms, frames_parked));
            }
            Ok(_) => return None,
            Err(error) => {
                tracing::warn!(host = %open.to, error = ErrorBody::from_chain(&error).one_line(), "not activated yet");
            }
        }
        // Owned by the destination, whatever became of what arrived: its own task takes care of it from there.
        let there = core.links.report(&open.to).is_some_and(|r| {
            r.current && r.containers.get(&open.container).is_some_and(|c| c.generation == open.generation.next())
        });
        if there || gone(core, open) {
            return None;
        }
        tokio::select! {
            _ = reports.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(REQUEST_TIMEOUT_MS)) => {}
        }
        // Reports come every two seconds; this keeps a host that refuses at once from being asked without a pause.
        tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
    }
}

/// Its container has been removed or replaced since, or was started anew because the destination was lost.
fn gone(core: &Core, open: &Move) -> bool {
    let world = core.state.world();
    let record = world.containers.get(&open.name);
    record.is_none_or(|c| c.spec.id != open.container || c.removed || c.generation != open.generation.next())
}

/// Until the source has nothing of it any more.
async fn release(core: &Arc<Core>, open: &Move) {
    let mut reports = core.links.follow();
    let handed_over = core.state.world().moves.get(&open.id).map_or(0, |m| m.revision.0);
    if let Err(error) = core.links.ask(&open.from, Request::ReleaseMove { id: open.id.clone() }).await {
        tracing::info!(host = %open.from, error = ErrorBody::from_chain(&error).one_line(), "released by the next word to it");
    }
    loop {
        reports.mark_unchanged();
        let free = core.links.report(&open.from).is_some_and(|r| {
            r.current && r.applied_revision >= handed_over && !r.containers.contains_key(&open.container)
        });
        let lost = core.state.world().hosts.get(&open.from).is_none_or(|host| host.state == HostState::Failed);
        if free || lost || reports.changed().await.is_err() {
            return;
        }
    }
}

async fn done(core: &Core, id: &MoveId, summary: Option<Summary>) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        if let Some(now) = world.moves.get(id).filter(|m| m.outcome == Outcome::HandedOver) {
            let finished = now_ms();
            let summary = summary.clone().map(|mut s| {
                s.total_ms = finished.saturating_sub(now.requested_at_ms) as f64;
                s
            });
            let moved = format!("{} moved from {} to {}", now.name, now.from, now.to);
            let (why, still) = (now.why(), "of it standing still");
            let message = match &summary {
                Some(s) => format!("{moved} in {:.1} s, {:.0} ms {still}{why}", s.total_ms / 1e3, s.downtime_ms),
                None => moved + &why,
            };
            tx.event(EventKind::MoveDone, About::container(&now.name, Some(&now.to)), message);
            let progress = core.moves.view(world, id).map_or(now.progress, |m| m.progress);
            let over = Move {
                phase: Phase::Release,
                outcome: Outcome::Done,
                finished_at_ms: Some(finished),
                summary,
                progress,
                ..now.value.clone()
            };
            tx.put_move(Some(now), &over);
        }
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}
