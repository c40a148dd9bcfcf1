//! Keeps the store small: old events and moves that are over go.

use crate::core::Core;
use crate::state::{StateError, Tx, World};

/// Events kept.
const MAX_EVENTS: usize = 2_000;
/// Moves that are over kept.
const MAX_MOVES: usize = 500;
/// More than so many too many, before any goes: one transaction for many.
const SLACK: usize = 50;

pub async fn pass(core: &Core) -> Result<(), StateError> {
    core.state.transact(|world| Ok::<_, StateError>((decide(world), ()))).await.map(|_| ())
}

fn decide(world: &World) -> Tx {
    let mut tx = Tx::new();
    let events = world.events.len().saturating_sub(MAX_EVENTS);
    if events > SLACK {
        for (key, _) in world.events.iter().take(SLACK) {
            tx.delete_event(key);
        }
    }
    let mut over: Vec<_> = world.moves.values().filter(|m| m.outcome.over()).collect();
    let moves = over.len().saturating_sub(MAX_MOVES);
    if moves > SLACK {
        over.sort_by_key(|m| (m.finished_at_ms, m.requested_at_ms));
        for old in over.into_iter().take(SLACK) {
            tx.delete_move(old);
        }
    }
    tx
}
