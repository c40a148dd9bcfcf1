//! Whom a container that is on its way will talk to, so that it need not ask for their MACs when it arrives: the answer
//! would wait with the other frames, and what it says meanwhile would be overtaken by what it says after.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::types::{EnvironmentNetwork, Location, Mac, Subnet, host_mac};

/// Neighbour entries a container gets at most when it arrives. Writing one takes some tens of microseconds of the
/// downtime.
const MAX_PEERS: usize = 128;
const IPV4: [u8; 2] = [0x08, 0x00];

/// Addresses and MACs; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peers(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    subnet: Option<Subnet>,
    gateway: Option<Ipv4Addr>,
    macs: BTreeMap<Ipv4Addr, Mac>,
}

impl Peers {
    /// Everybody this host knows of in `environment`, but not the container itself. Those of this host first: nobody
    /// else answers for them.
    pub(crate) fn of(environment: &EnvironmentNetwork, tunnel_address: Ipv4Addr, own: Mac) -> Self {
        let here = |at: Location| at == Location::Local;
        let endpoints = environment.endpoints.iter().filter(|endpoint| endpoint.mac != own);
        let (local, remote): (Vec<_>, Vec<_>) = endpoints.partition(|endpoint| here(endpoint.at));
        let containers = local.into_iter().chain(remote).map(|endpoint| (endpoint.address, endpoint.mac));
        let host = (environment.host_address, host_mac(tunnel_address));
        let macs = std::iter::once(host).chain(containers).take(MAX_PEERS).collect();
        let known = Known { subnet: Some(environment.subnet), gateway: Some(environment.gateway), macs };
        Self(Arc::new(Mutex::new(known)))
    }

    /// Learns the sender of an IPv4 frame. Bridges let only true senders through, and the entries made from this are
    /// of the kind the container's kernel checks again.
    pub(crate) fn notice(&self, frame: &[u8]) {
        let Some((header, packet)) = frame.split_first_chunk::<14>() else { return };
        let Some(sender) = packet.get(12..16).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()) else { return };
        if header[12..14] != IPV4 {
            return;
        }
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = *header;
        let address = Ipv4Addr::from(sender);
        let mut known = self.lock();
        let inside = known.subnet.is_some_and(|subnet| subnet.contains(address)) && known.gateway != Some(address);
        if inside && (known.macs.len() < MAX_PEERS || known.macs.contains_key(&address)) {
            known.macs.insert(address, Mac([a, b, c, d, e, f]));
        }
    }

    pub(crate) fn list(&self) -> Vec<(Ipv4Addr, Mac)> {
        self.lock().macs.iter().map(|(address, mac)| (*address, *mac)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Each change is one insertion: a panic cannot leave it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Frames come from whoever is in the environment, and may be cut anywhere.
        #[test]
        fn no_frame_is_too_strange(frame in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80), ipv4: bool) {
            let mut frame = frame;
            if ipv4 && frame.len() > 14 {
                frame[12..14].copy_from_slice(&IPV4);
            }
            let peers = Peers::default();
            peers.notice(&frame);
            assert_eq!(peers.list(), [], "without a subnet nobody is inside it");
        }
    }

    #[test]
    fn senders_inside_the_subnet_are_learned_within_bounds() {
        let peers = Peers(Arc::new(Mutex::new(Known {
            subnet: Some(Subnet::new(Ipv4Addr::new(10, 7, 0, 0), 16).unwrap()),
            gateway: Some(Ipv4Addr::new(10, 7, 0, 1)),
            macs: BTreeMap::new(),
        })));
        let frame = |source: [u8; 4], kind: [u8; 2]| {
            [&[0; 6][..], &[2, 0, 0, 0, 0, 9], &kind, &[0x45; 12], &source, &[0; 20]].concat()
        };
        for (source, kind) in [([10, 7, 0, 1], IPV4), ([10, 8, 0, 9], IPV4), ([10, 7, 0, 9], [0x86, 0xdd])] {
            peers.notice(&frame(source, kind));
        }
        peers.notice(&[0; 20]);
        assert_eq!(peers.list(), []);
        peers.notice(&frame([10, 7, 0, 9], IPV4));
        assert_eq!(peers.list(), [(Ipv4Addr::new(10, 7, 0, 9), Mac([2, 0, 0, 0, 0, 9]))]);
        for last in 10..=255 {
            peers.notice(&frame([10, 7, 1, last], IPV4));
        }
        assert_eq!(peers.list().len(), MAX_PEERS);
    }
}
