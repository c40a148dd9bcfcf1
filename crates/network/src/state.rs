//! What this process remembers. All else is read from the kernel each time, so a restart forgets nothing that matters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::dns::Responder;
use crate::link_name::PortRecord;
use crate::parking::Peers;
use crate::types::{EnvironmentNetwork, Location, Mac};

/// How long after this host learned that a container is elsewhere it still sends its frames on, in seconds: time for
/// the other hosts to learn it too.
const DIVERT_LINGER_S: u64 = 60;

#[derive(Default)]
pub(crate) struct State {
    /// As accepted by the last apply.
    pub environments: Vec<EnvironmentNetwork>,
    /// Addresses of the installation itself, beside the environments' remotes.
    pub protected: BTreeSet<Ipv4Addr>,
    /// The rules nft last accepted.
    pub firewall: Option<String>,
    /// Who answers names, by network.
    pub responders: BTreeMap<u32, Responder>,
}

/// What is under way. Behind a lock of its own that is never held across a wait, because the steps between freeze and
/// activation of a move must not queue behind an apply.
#[derive(Clone, Default)]
pub(crate) struct Moving(Arc<Mutex<Steps>>);

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Steps {
    /// Ports that are being made and have no label yet, by id.
    pub attaching: BTreeSet<String>,
    /// Ports whose frames wait on a tap, by id.
    pub parked: BTreeMap<String, Parked>,
    /// Containers whose frames go elsewhere than the description says, or that left a while ago, by network and MAC.
    pub diverted: BTreeMap<(u32, Mac), Divert>,
    /// Where the last apply said containers are.
    pub described: BTreeMap<(u32, Mac), Location>,
}

/// A port whose frames wait.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub record: PortRecord,
    pub stage: Stage,
    pub peers: Peers,
    /// Changes no more when the parking has been cleared away.
    pub ended: watch::Receiver<()>,
}

/// Equal where frames go the same way.
impl PartialEq for Parked {
    fn eq(&self, other: &Self) -> bool {
        (&self.record, self.stage) == (&other.record, other.stage)
    }
}

/// How far a parking is. Only the first three hold frames back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Frames from the overlay wait; this host's own go to where the container still is.
    Open,
    /// The port is attached, so the container has left where it was: this host's own frames wait too.
    Arrived,
    /// What waits is being handed on; what comes still goes the same way, or it would overtake.
    Delivering,
    /// The direct way is open; the tap stays for what is on its way to it.
    Delivered,
    /// The container does not come. The tap stays until nothing leads to it.
    Cancelled,
}

impl Stage {
    pub(crate) fn holds(self) -> bool {
        matches!(self, Self::Open | Self::Arrived | Self::Delivering)
    }
}

/// Frames of a container that go elsewhere than the description says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Divert {
    /// The tunnel address they are sent to; `None`: prepared only.
    pub to: Option<Ipv4Addr>,
    /// The container is or was here, so frames of hosts that do not know better arrive here and are sent on.
    pub passes_on: bool,
    /// What the description said when this began: one that still says so is older than this.
    pub said: Option<Location>,
    /// When this ends by itself: set once the container is known to be elsewhere.
    pub ends: Option<Instant>,
}

impl Steps {
    /// Whether frames for this container are held back, so that its entries must stay as they are.
    pub(crate) fn is_parked(&self, vni: u32, mac: Mac) -> bool {
        self.holding().any(|record| record.vni == vni && record.mac == mac)
    }

    /// Ports whose frames are held back.
    pub(crate) fn holding(&self) -> impl Iterator<Item = &PortRecord> {
        self.parked.values().filter(|parked| parked.stage.holds()).map(|parked| &parked.record)
    }

    pub(crate) fn holds(&self, id: &str) -> bool {
        self.parked.get(id).is_some_and(|parked| parked.stage.holds())
    }

    pub(crate) fn set_stage(&mut self, id: &str, stage: Stage) {
        if let Some(parked) = self.parked.get_mut(id) {
            parked.stage = stage;
        }
    }

    /// Whether this host sends frames of this network on for a container that is leaving or left.
    pub(crate) fn passes_on(&self, vni: u32) -> bool {
        self.diverted.iter().any(|((other, _), divert)| *other == vni && divert.passes_on)
    }

    /// A divert to where the description says the container is is none, except where frames must be passed on.
    pub(crate) fn begin_divert(&mut self, key: (u32, Mac), to: Ipv4Addr) {
        let said = self.described.get(&key).copied();
        let divert = self.diverted.entry(key).or_insert(Divert { said, ..Divert::default() });
        // Told by the description that it is elsewhere already: that is what the next one has to differ from.
        if !divert.passes_on || matches!(said, Some(Location::Remote(_))) {
            divert.said = said;
        }
        (divert.to, divert.ends) = (Some(to), None);
        if !divert.passes_on && said == Some(Location::Remote(to)) {
            self.diverted.remove(&key);
        }
    }

    /// Networks a move needs although the description may not name them (yet, or any more).
    pub(crate) fn needed(&self, attached: &BTreeSet<(u32, Mac)>) -> BTreeSet<u32> {
        let leaving = self.diverted.keys().filter(|key| attached.contains(key)).map(|(vni, _)| *vni);
        self.holding().map(|record| record.vni).chain(leaving).collect()
    }

    /// Takes note of what was applied, and brings diverts in line with it. One whose port is still here is being moved:
    /// left as it is. A description that says what was said when the divert began is older, and changes nothing. After
    /// that a host the container left follows it for a while, the others go by the description.
    pub(crate) fn settle(
        &mut self,
        environments: &[EnvironmentNetwork],
        attached: &BTreeSet<(u32, Mac)>,
        now: Instant,
    ) {
        let described = environments.iter().flat_map(|e| e.endpoints.iter().map(|p| ((e.vni, p.mac), p.at)));
        self.described = described.collect();
        let described = &self.described;
        self.diverted.retain(|key, divert| {
            if attached.contains(key) {
                return true;
            }
            let mut lingers = || *divert.ends.get_or_insert(now + Duration::from_secs(DIVERT_LINGER_S)) > now;
            match described.get(key) {
                Some(Location::Remote(to)) if divert.to == Some(*to) => divert.passes_on && lingers(),
                Some(at) if divert.said == Some(*at) => true,
                Some(Location::Remote(to)) if divert.passes_on => {
                    let lingers = lingers();
                    divert.to = Some(*to);
                    lingers
                }
                Some(Location::Local) => divert.passes_on,
                Some(Location::Remote(_)) | None => false,
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Endpoint, Subnet};

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    const FURTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

    fn told(at: Option<Location>) -> Vec<EnvironmentNetwork> {
        let address = Ipv4Addr::new(10, 0, 0, 9);
        let endpoint = at.map(|at| Endpoint { mac: MAC, address, at, names: vec![] });
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
    }

    fn goes_to(steps: &Steps) -> Option<Ipv4Addr> {
        steps.diverted.get(&(1, MAC)).and_then(|divert| divert.to)
    }

    fn diverting(passes_on: bool, said: Location) -> Steps {
        let mut steps = Steps::default();
        steps.diverted.insert((1, MAC), Divert { to: Some(THERE), passes_on, said: Some(said), ends: None });
        steps
    }

    #[test]
    fn the_host_a_container_left_follows_it_for_a_while() {
        let start = Instant::now();
        let mut steps = diverting(true, Location::Local);
        let (here, none) = (BTreeSet::from([(1, MAC)]), BTreeSet::new());
        // While the port is here, or the container is said to be here, the move is under way.
        steps.settle(&told(Some(Location::Remote(FURTHER))), &here, start);
        steps.settle(&told(Some(Location::Local)), &none, start);
        assert_eq!(goes_to(&steps), Some(THERE));
        steps.settle(&told(Some(Location::Remote(FURTHER))), &none, start);
        assert_eq!(goes_to(&steps), Some(FURTHER));
        let mut late = steps.clone();
        late.settle(&told(Some(Location::Remote(THERE))), &none, start + Duration::from_secs(DIVERT_LINGER_S));
        assert_eq!(goes_to(&late), None);
        steps.settle(&told(None), &none, start);
        assert_eq!(goes_to(&steps), None);
    }

    #[test]
    fn another_host_believes_the_divert_until_the_description_changes() {
        let (start, none) = (Instant::now(), BTreeSet::new());
        for (says, expected) in [
            (Some(Location::Remote(OLD)), Some(THERE)),
            (Some(Location::Remote(THERE)), None),
            (Some(Location::Remote(FURTHER)), None),
            (Some(Location::Local), None),
            (None, None),
        ] {
            let mut steps = diverting(false, Location::Remote(OLD));
            steps.settle(&told(says), &none, start);
            assert_eq!(goes_to(&steps), expected, "{says:?}");
        }
    }
}
