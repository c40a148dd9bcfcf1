//! What this process remembers. All else is read from the kernel each time, so a restart forgets nothing that matters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::dns::Responder;
use crate::link_name::PortRecord;
use crate::types::{EnvironmentNetwork, Mac};

#[derive(Default)]
pub(crate) struct State {
    /// As accepted by the last apply.
    pub environments: Vec<EnvironmentNetwork>,
    /// The rules nft last accepted.
    pub firewall: Option<String>,
    /// Who answers names, by network.
    pub responders: BTreeMap<u32, Responder>,
}

/// What is under way. Behind a lock of its own that is never held across a wait, because the steps between freeze and
/// activation of a move must not queue behind an apply.
#[derive(Clone, Default)]
pub(crate) struct Moving(Arc<Mutex<Steps>>);

#[derive(Debug, Clone, Default)]
pub(crate) struct Steps {
    /// Ports that are being made and have no label yet, by id.
    pub attaching: BTreeSet<String>,
    /// Ports whose frames from the overlay wait on a tap, by id.
    pub parked: BTreeMap<String, PortRecord>,
    /// Network and MAC of containers that are leaving: prepared (`None`) or sent on to a tunnel address.
    pub diverted: BTreeMap<(u32, Mac), Option<Ipv4Addr>>,
}

impl Steps {
    pub(crate) fn is_parked(&self, vni: u32, mac: Mac) -> bool {
        self.parked.values().any(|record| record.vni == vni && record.mac == mac)
    }

    /// Whether any container of this network is leaving this host.
    pub(crate) fn any_diverted(&self, vni: u32) -> bool {
        self.diverted.keys().any(|(other, _)| *other == vni)
    }
}

impl Moving {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Steps> {
        // Every critical section is one operation on one map: a panic cannot leave it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn snapshot(&self) -> Steps {
        self.lock().clone()
    }
}
