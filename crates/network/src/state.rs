//! What this process remembers. All else is read from the kernel each time, so a restart forgets nothing that matters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::dns::Responder;
use crate::link_name::PortRecord;
use crate::types::{EnvironmentNetwork, Location, Mac};

/// How long after this host learned that a container is elsewhere it still sends its frames on, in seconds: time for
/// the other hosts to learn it too.
const DIVERT_LINGER_S: u64 = 60;

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
    /// Containers that are leaving or left a while ago, by network and MAC.
    pub diverted: BTreeMap<(u32, Mac), Divert>,
}

/// Frames of a container that is leaving.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Divert {
    /// The tunnel address they are sent on to; `None`: prepared only.
    pub to: Option<Ipv4Addr>,
    /// When this ends by itself: set once the container is known to be elsewhere.
    pub ends: Option<Instant>,
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

impl Steps {
    /// Brings diverts in line with what was applied: follows a container that is elsewhere, for a while, and forgets
    /// one that nobody knows any more. One whose port is still in the bridge here is being moved: left as it is.
    pub(crate) fn settle_diverts(
        &mut self,
        environments: &[EnvironmentNetwork],
        plugged: &BTreeSet<(u32, Mac)>,
        now: Instant,
    ) {
        self.diverted.retain(|(vni, mac), divert| {
            if plugged.contains(&(*vni, *mac)) {
                return true;
            }
            let environment = environments.iter().find(|environment| environment.vni == *vni);
            let endpoint = environment.and_then(|e| e.endpoints.iter().find(|endpoint| endpoint.mac == *mac));
            match endpoint.map(|endpoint| endpoint.at) {
                Some(Location::Remote(to)) => {
                    divert.to = Some(to);
                    *divert.ends.get_or_insert(now + Duration::from_secs(DIVERT_LINGER_S)) > now
                }
                Some(Location::Local) => true,
                None => false,
            }
        });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Endpoint, Subnet};

    #[test]
    fn a_divert_follows_its_container_for_a_while() {
        let (mac, there, further) = (Mac([2, 0, 0, 0, 0, 1]), Ipv4Addr::new(192, 0, 2, 2), Ipv4Addr::new(192, 0, 2, 3));
        let told = |at: Option<Location>| {
            let address = Ipv4Addr::new(10, 0, 0, 9);
            let endpoint = at.map(|at| Endpoint { mac, address, at, names: vec![] });
            vec![EnvironmentNetwork {
                vni: 1,
                subnet: Subnet::new(address, 24).unwrap(),
                gateway: Ipv4Addr::new(10, 0, 0, 1),
                host_address: Ipv4Addr::new(10, 0, 0, 2),
                mtu: 1450,
                domain: String::new(),
                remotes: vec![],
                endpoints: endpoint.into_iter().collect(),
                ports: vec![],
            }]
        };
        let start = Instant::now();
        let mut steps = Steps::default();
        steps.diverted.insert((1, mac), Divert { to: Some(there), ends: None });
        let to = |steps: &Steps| steps.diverted.get(&(1, mac)).map(|divert| divert.to);
        let here = BTreeSet::from([(1, mac)]);
        let none = BTreeSet::new();
        // While the port is here, or the container is said to be here, the move is under way.
        steps.settle_diverts(&told(Some(Location::Remote(further))), &here, start);
        steps.settle_diverts(&told(Some(Location::Local)), &none, start);
        assert_eq!(to(&steps), Some(Some(there)));
        steps.settle_diverts(&told(Some(Location::Remote(further))), &none, start);
        assert_eq!(to(&steps), Some(Some(further)));
        let mut late = steps.clone();
        late.settle_diverts(&told(Some(Location::Remote(there))), &none, start + Duration::from_secs(DIVERT_LINGER_S));
        assert_eq!(to(&late), None);
        steps.settle_diverts(&told(None), &none, start);
        assert_eq!(to(&steps), None);
    }
}
