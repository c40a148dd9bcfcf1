//! What every part of the controller holds.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use godwit_api::tls::Authority;
use godwit_model::ContainerName;

use crate::http::Sessions;
use crate::leases::Leases;
use crate::links::Links;
use crate::loads::Loads;
use crate::moves::Moves;
use crate::reconcile::balance::Balancing;
use crate::reconcile::evacuate::Evacuations;
use crate::reconcile::room::Rooms;
use crate::state::State;

pub struct Core {
    pub state: State,
    pub links: Links,
    pub moves: Moves,
    pub waiting: Waiting,
    pub evacuations: Evacuations,
    pub leases: Leases,
    /// Why containers of lost hosts are not started elsewhere.
    pub stranded: Waiting,
    pub rooms: Rooms,
    pub loads: Loads,
    pub balancing: Balancing,
    /// Held by whoever decides that room on a host is taken, until the snapshot shows it: decisions about different
    /// containers touch different keys, so the store alone would let two take the same room.
    pub placing: tokio::sync::Mutex<()>,
    pub sessions: Sessions,
    pub authority: Authority,
    /// What an agent has to know to join: 64 hexadecimal digits.
    pub join_token: String,
}

/// Why containers have no host yet. Found again by every pass of placement, so it is not stored.
#[derive(Debug, Default)]
pub struct Waiting {
    reasons: Mutex<BTreeMap<ContainerName, String>>,
}

impl Waiting {
    /// A sentence for a person; `None` for a container that has a host.
    pub fn reason(&self, name: &ContainerName) -> Option<String> {
        locked(&self.reasons).get(name).cloned()
    }

    /// All of them.
    pub fn reasons(&self) -> BTreeMap<ContainerName, String> {
        locked(&self.reasons).clone()
    }

    /// Replaces all reasons; gives back those that were not there before, or differed.
    pub fn replace(&self, reasons: BTreeMap<ContainerName, String>) -> Vec<(ContainerName, String)> {
        let mut old = locked(&self.reasons);
        let new = reasons.iter().filter(|(name, reason)| old.get(*name) != Some(*reason));
        let new = new.map(|(name, reason)| (name.clone(), reason.clone())).collect();
        *old = reasons;
        new
    }
}

/// Locks that no panic can leave half-changed.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
