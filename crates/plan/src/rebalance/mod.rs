//! Advice on moves that make the fleet better, and that cannot flap.
//!
//! Two things are compared, in this order: how evenly layers, environments and zones are spread, and how full the
//! fullest hosts are. Every move of the advice makes the first better, or leaves it and lowers the fuller of the two
//! hosts by at least the least gain. Neither can go on for ever, so moves that undo each other cannot be advised, even
//! without the rest per container; threshold, hold and rest keep single peaks from moving anything.

mod fullness;
mod moves;

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::fleet::{Fleet, HostId, MemberId};
use crate::step::{How, Leg, Step, steps};
use fullness::Fullness;

/// The emptiest hosts that are looked at for one container.
const EMPTIEST: usize = 8;
/// The fullest hosts that are looked at for one move.
const FULLEST: usize = 64;

/// When moving is worth it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Measured CPU from which a host is overloaded, in thousandths.
    pub cpu_threshold_permille: u16,
    /// Measured memory from which a host is overloaded, in thousandths.
    pub memory_threshold_permille: u16,
    /// How long it must have been overloaded, in milliseconds.
    pub hold_ms: u64,
    /// How much fuller than the emptiest host one must be before containers are moved to that one, in thousandths:
    /// a new or returned host is filled by this. 1000 and more: never.
    pub level_permille: u16,
    /// What the fuller of both hosts must be less full after a move, in thousandths.
    pub least_gain_permille: u16,
    /// How long a container is left alone after a move, in milliseconds.
    pub rest_ms: u64,
    /// The most moves of one advice.
    pub max_moves: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            cpu_threshold_permille: 850,
            memory_threshold_permille: 900,
            hold_ms: 300_000,
            level_permille: 400,
            least_gain_permille: 50,
            rest_ms: 1_800_000,
            max_moves: 20,
        }
    }
}

/// What a move is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Containers of one layer, environment or zone are spread unevenly.
    Spread,
    /// Its host has been overloaded for the hold time.
    Overload,
    /// Another host has much less to do.
    Level,
}

/// One move with what it brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advised {
    pub step: Step,
    pub purpose: Purpose,
    /// Of spread: how many fewer of its layer, else of its environment, else of its layer in the zone it has beside
    /// it. Otherwise: thousandths by which the fuller of both hosts gets less full.
    pub gain: u64,
    /// Milliseconds of downtime times importance, and one for each mebibyte sent.
    pub cost: u64,
}

/// Moves in an order that keeps every rule, after any of them and in any interleaving that their `after` permits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Advice {
    pub moves: Vec<Advised>,
    /// There is more to do than [`Policy::max_moves`].
    pub more: bool,
}

struct Work<'f, 'p> {
    draft: Draft<'f>,
    policy: &'p Policy,
    now_ms: u64,
    fullness: Fullness,
    /// Moved already by this advice.
    moved: BTreeSet<MemberId>,
    legs: Vec<Leg>,
    told: Vec<(Purpose, u64)>,
}

/// Advises moves. `now_ms` is of the clock by which [`crate::Host::overloaded_since_ms`] and
/// [`crate::Container::last_moved_ms`] are told.
pub fn rebalance(fleet: &Fleet, policy: &Policy, now_ms: u64) -> Advice {
    let draft = Draft::new(fleet);
    let fullness = Fullness::new(&draft);
    let mut work = Work { draft, policy, now_ms, fullness, moved: BTreeSet::new(), legs: Vec::new(), told: Vec::new() };
    // Each round adds a move at least, so there are at most as many as moves.
    let mut more = false;
    while !more {
        let before = work.legs.len();
        more = work.repair_spread() || work.relieve() || work.level();
        if work.legs.len() == before {
            break;
        }
    }
    let steps = steps(fleet, &work.legs);
    let cost = |leg: &Leg| fleet.member(leg.member).container.move_cost();
    let moves = steps.into_iter().zip(&work.legs).zip(&work.told);
    let moves = moves
        .map(|((step, leg), (purpose, gain))| Advised { step, purpose: *purpose, gain: *gain, cost: cost(leg) })
        .collect();
    Advice { moves, more }
}

impl Work<'_, '_> {
    fn is_full(&self) -> bool {
        self.legs.len() >= self.policy.max_moves
    }

    fn may_move(&self, id: MemberId) -> bool {
        let member = self.draft.member(id);
        let c = &member.container;
        let rests = c.last_moved_ms.is_some_and(|at| at.saturating_add(self.policy.rest_ms) > self.now_ms);
        c.unmovable.is_empty()
            && member.also.is_empty()
            && !rests
            && !self.moved.contains(&id)
            && self.draft.dependents(id).is_empty()
    }

    fn go(&mut self, member: MemberId, to: HostId, purpose: Purpose, gain: u64, reasons: Vec<String>) {
        let Some(from) = self.draft.home(member) else { return };
        self.fullness.relocate(&mut self.draft, member, from, to);
        self.moved.insert(member);
        self.legs.push(Leg { member, from, to, how: How::Live, unit: None, reasons });
        self.told.push((purpose, gain));
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.moves.is_empty() {
            return writeln!(f, "nothing to move");
        }
        for (at, advised) in self.moves.iter().enumerate() {
            let purpose = match advised.purpose {
                Purpose::Spread => "spread",
                Purpose::Overload => "overload",
                Purpose::Level => "level",
            };
            writeln!(f, "{}. {purpose}, gain {}, cost {}: {}", at + 1, advised.gain, advised.cost, advised.step)?;
        }
        if self.more {
            writeln!(f, "there is more to do after these")?;
        }
        Ok(())
    }
}
