//! Moves: who asks for one, which are under way, how they go on.
//!
//! The store has a move's outcome; phase and progress change many times a second, live only here, and are found again
//! by the next message of an agent.

mod check;
mod estimate;
mod request;
mod saga;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use godwit_api::link::FromAgent;
use godwit_model::migration::{Move, Phase, Progress, Summary};
use godwit_model::{HostName, MoveId};
use tokio::sync::{mpsc, watch};

pub use check::of_container as why_unmovable;
pub use request::{MoveError, Part, cancel, request, request_for, would};

use crate::core::{Core, locked};
use crate::state::World;

/// Messages waiting for one move's saga; progress beyond it is dropped, the rest never comes near it.
const QUEUE_HEARD: usize = 64;

/// A message about a move, and who sent it.
struct Heard {
    from: HostName,
    message: FromAgent,
}

struct Live {
    phase: Phase,
    progress: Progress,
    inbox: mpsc::Sender<Heard>,
}

#[derive(Default)]
pub struct Moves {
    live: Mutex<BTreeMap<MoveId, Live>>,
    /// Requested of this controller, not started yet.
    begun: Mutex<BTreeSet<MoveId>>,
    changed: watch::Sender<u64>,
}

impl Moves {
    pub fn new() -> Self {
        Self::default()
    }

    /// A move as the store has it, with phase and progress of this moment.
    pub fn view(&self, world: &World, id: &MoveId) -> Option<Move> {
        let mut view = world.moves.get(id)?.value.clone();
        if !view.outcome.over()
            && let Some(live) = locked(&self.live).get(id)
        {
            view.phase = view.phase.max(live.phase);
            view.progress = live.progress;
        }
        Some(view)
    }

    /// Changes with every progress.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A message of an agent about one of its moves.
    pub fn hear(&self, from: &HostName, message: FromAgent) {
        let id = match &message {
            FromAgent::MoveProgress { id, phase, progress } => {
                self.advance(id, *phase, Some(*progress));
                return;
            }
            FromAgent::MoveFrozen { id } | FromAgent::MoveReady { id, .. } | FromAgent::MoveFailed { id, .. } => {
                id.clone()
            }
            _ => return,
        };
        let inbox = locked(&self.live).get(&id).map(|live| live.inbox.clone());
        let Some(inbox) = inbox else {
            tracing::debug!(%from, %id, "a message about a move that is over");
            return;
        };
        if inbox.try_send(Heard { from: from.clone(), message }).is_err() {
            tracing::warn!(%from, %id, "a message about a move is dropped: its saga has ended");
        }
    }

    /// Phases and numbers only grow.
    fn advance(&self, id: &MoveId, phase: Phase, progress: Option<Progress>) {
        if let Some(live) = locked(&self.live).get_mut(id) {
            live.phase = live.phase.max(phase);
            if let Some(new) = progress {
                let old = live.progress;
                live.progress = Progress {
                    bytes_sent: old.bytes_sent.max(new.bytes_sent),
                    bytes_total: old.bytes_total.max(new.bytes_total),
                    rounds: old.rounds.max(new.rounds),
                };
            }
        }
        self.nudge();
    }

    /// A move that this controller is about to store.
    fn begin(&self, id: &MoveId) {
        locked(&self.begun).insert(id.clone());
    }

    /// Whether this controller began the move; told once.
    fn take_begun(&self, id: &MoveId) -> bool {
        locked(&self.begun).remove(id)
    }

    fn phase(&self, id: &MoveId) -> Phase {
        locked(&self.live).get(id).map_or(Phase::Check, |live| live.phase)
    }

    fn nudge(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

/// Starts the saga of every open move that has none: new ones, and those an earlier controller left.
pub fn start_missing(core: &Arc<Core>) {
    let world = core.state.world();
    for open in world.open_moves() {
        let mut live = locked(&core.moves.live);
        if live.contains_key(&open.id) {
            continue;
        }
        let (inbox, heard) = mpsc::channel(QUEUE_HEARD);
        live.insert(open.id.clone(), Live { phase: open.phase, progress: open.progress, inbox });
        drop(live);
        let (core, id) = (Arc::clone(core), open.id.clone());
        tokio::spawn(async move {
            saga::run(&core, &id, heard).await;
            locked(&core.moves.live).remove(&id);
            core.moves.nudge();
        });
    }
}

/// What a destination that is ready says of the move so far; nothing, if it says something else.
fn cost_of(ready: FromAgent) -> Summary {
    let FromAgent::MoveReady {
        id: _,
        parts,
        since_freeze_ms,
        bytes_received,
        memory_bytes,
        file_bytes,
        rounds,
        slowed_to_percent,
        late_bytes,
        stood_still,
        paused_ms,
    } = ready
    else {
        return Summary::default();
    };
    Summary {
        downtime_ms: since_freeze_ms,
        downtime_parts: parts.into_iter().collect(),
        bytes_sent: bytes_received,
        memory_bytes,
        file_bytes,
        rounds,
        slowed_to_percent,
        late_bytes,
        stood_still,
        paused_ms,
        ..Summary::default()
    }
}
