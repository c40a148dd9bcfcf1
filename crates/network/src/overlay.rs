//! One environment's links on this host: bridge, VXLAN, addresses, neighbours, forwarding entries.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::error::NetworkError;
use crate::forwarding::{Entry, Kind};
use crate::host::{HostNetwork, ports};
use crate::link_name::{self, PortRecord};
use crate::netlink::{Link, PortMode};
use crate::state::{State, Steps};
use crate::sysctl;
use crate::types::{EnvironmentNetwork, Location, Mac, host_mac};

/// How often forwarding entries are gone through because of steps made meanwhile; a move has fewer.
const MAX_PASSES: usize = 8;

impl HostNetwork {
    pub(crate) async fn apply_overlay(&self, environment: &EnvironmentNetwork) -> Result<(), NetworkError> {
        let netlink = &self.inner.netlink;
        let bridge = self.apply_bridge(environment).await?;
        let vxlan = self.apply_vxlan(environment).await?;
        let mode = self.vxlan_mode(environment.vni);
        netlink.join(&vxlan, bridge.index, mode).await?;
        netlink.set_up(&vxlan).await?;
        // The host's own address comes first: it is the source of what the host itself sends into the environment.
        // The gateway's would be answered to the gateway of whatever host the container is on.
        let addresses = [(environment.host_address, environment.subnet.prefix_len()), (environment.gateway, 32)];
        netlink.set_addresses(&bridge, &addresses).await?;
        let neighbours: Vec<_> = environment.endpoints.iter().map(|e| (e.address, e.mac)).collect();
        netlink.set_neighbours(&bridge, &neighbours).await?;
        self.apply_forwarding(environment, &bridge, &vxlan).await
    }

    async fn apply_bridge(&self, environment: &EnvironmentNetwork) -> Result<Link, NetworkError> {
        let netlink = &self.inner.netlink;
        let name = link_name::bridge(environment.vni);
        let mac = host_mac(self.inner.config.tunnel_address);
        if netlink.link(&name).await?.is_none() {
            netlink.add_bridge(&name, mac, environment.mtu).await?;
        }
        let bridge = netlink.existing(&name).await?;
        if bridge.mac != Some(mac) {
            netlink.set_mac(&bridge, mac).await?;
        }
        if bridge.mtu != environment.mtu {
            netlink.set_mtu(&bridge, environment.mtu).await?;
        }
        // Loose: a container's frame may come in by another link than the one its address is routed to.
        sysctl::set(&format!("ipv4/conf/{name}/rp_filter"), "2")?;
        // Answer ARP only for addresses of this very bridge.
        sysctl::set(&format!("ipv4/conf/{name}/arp_ignore"), "1")?;
        // A local client of a published port comes from 127.0.0.1. Containers cannot use this: see the input rules.
        sysctl::set(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
        sysctl::set_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
        if !bridge.up {
            netlink.set_up(&bridge).await?;
        }
        Ok(bridge)
    }

    async fn apply_vxlan(&self, environment: &EnvironmentNetwork) -> Result<Link, NetworkError> {
        let netlink = &self.inner.netlink;
        let (name, local) = (link_name::vxlan(environment.vni), self.inner.config.tunnel_address);
        let mut present = netlink.link(&name).await?;
        // The tunnel address of an existing VXLAN link cannot be changed.
        if let Some(stale) = present.take_if(|link| link.vxlan_local != Some(local)) {
            netlink.delete(&stale).await?;
        }
        if present.is_none() {
            netlink.add_vxlan(&name, environment.vni, local, environment.mtu).await?;
        }
        let vxlan = netlink.existing(&name).await?;
        if vxlan.mtu != environment.mtu {
            netlink.set_mtu(&vxlan, environment.mtu).await?;
        }
        sysctl::set_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
        Ok(vxlan)
    }

    /// Frames may leave by the overlay port they came in by only while a container of this network is leaving, and
    /// then only its frames (see the firewall): without that rule a broadcast would circle between hosts for ever.
    ///
    /// Questions about containers elsewhere are answered here and stay here: every answer is known to us, nobody
    /// elsewhere can give a false one, and during a move nobody else would answer, while a sender that asks in vain
    /// asks again only after a second. Questions about what is not described (another host's own address, a container
    /// we have not been told of yet) and frames to unknown MACs still go to all hosts.
    fn vxlan_mode(&self, vni: u32) -> PortMode {
        let hairpin = self.inner.moving.lock().passes_on(vni);
        PortMode { flood: true, group_flood: true, hairpin, answer: true }
    }

    pub(crate) async fn set_vxlan_mode(&self, vni: u32) -> Result<(), NetworkError> {
        let netlink = &self.inner.netlink;
        let vxlan = netlink.existing(&link_name::vxlan(vni)).await?;
        let bridge = netlink.existing(&link_name::bridge(vni)).await?;
        netlink.join(&vxlan, bridge.index, self.vxlan_mode(vni)).await
    }

    /// Brings the forwarding entries in line; again if a step of a move was made meanwhile, because an entry written
    /// from what was known before it may have undone it.
    pub(crate) async fn apply_forwarding(
        &self,
        environment: &EnvironmentNetwork,
        bridge: &Link,
        vxlan: &Link,
    ) -> Result<(), NetworkError> {
        for _ in 0..MAX_PASSES {
            let steps = self.write_forwarding(environment, bridge, vxlan).await?;
            if steps == self.inner.moving.snapshot() {
                break;
            }
        }
        Ok(())
    }

    /// Writes the forwarding entries that are missing and then removes those that should not be: in this order no MAC
    /// is ever without an entry. Returns the steps it went by.
    async fn write_forwarding(
        &self,
        environment: &EnvironmentNetwork,
        bridge: &Link,
        vxlan: &Link,
    ) -> Result<Steps, NetworkError> {
        let netlink = &self.inner.netlink;
        let _ways = self.inner.ways.lock().await;
        let present = netlink.forwarding().await?;
        let links = netlink.links().await?;
        // After the dump: a step of a move between the two is then seen at least once, and never undone.
        let steps = self.inner.moving.snapshot();
        let plugged: Vec<(PortRecord, &Link)> =
            ports(&links).filter(|(_, link)| link.controller == Some(bridge.index)).collect();
        let wanted = desired(environment, vxlan, &plugged, &steps);
        let link_of = |index: u32| links.iter().find(|link| link.index == index);
        for entry in wanted.iter().filter(|entry| !present.contains(entry)) {
            let Some(link) = link_of(entry.link) else { continue };
            match entry.kind {
                Kind::Port => netlink.forward_to_port(link, entry.mac).await?,
                Kind::Tunnel(to) if entry.is_flood() => netlink.flood_to_host(link, to).await?,
                Kind::Tunnel(to) => netlink.forward_to_tunnel(link, entry.mac, to).await?,
            }
        }
        let ours = |index: u32| index == vxlan.index || plugged.iter().any(|(_, link)| link.index == index);
        let stale = present.iter().filter(|entry| ours(entry.link) && !wanted.contains(entry));
        for entry in stale.filter(|entry| !steps.is_parked(environment.vni, entry.mac)) {
            if let Some(link) = link_of(entry.link) {
                netlink.forget(link, entry.mac, entry.kind).await?;
            }
        }
        Ok(steps)
    }

    /// [`HostNetwork::apply_forwarding`] for a network by its number, if it is one of those applied.
    pub(crate) async fn forward_again(&self, state: &State, vni: u32) -> Result<(), NetworkError> {
        let Some(environment) = state.environments.iter().find(|environment| environment.vni == vni) else {
            return Ok(());
        };
        let bridge = self.inner.netlink.link(&link_name::bridge(vni)).await?;
        let vxlan = self.inner.netlink.link(&link_name::vxlan(vni)).await?;
        match bridge.zip(vxlan) {
            Some((bridge, vxlan)) => self.apply_forwarding(environment, &bridge, &vxlan).await,
            // Somebody destroyed it; the apply that makes it again writes its entries.
            None => Ok(()),
        }
    }
}

/// The forwarding entries of one environment. Where several could hold, the first of these does: parked (left as it
/// is), diverted, plugged in here, elsewhere. A port that is plugged in here beats an endpoint that is said to be
/// elsewhere, because what is said may be older.
fn desired(
    environment: &EnvironmentNetwork,
    vxlan: &Link,
    plugged: &[(PortRecord, &Link)],
    steps: &Steps,
) -> Vec<Entry> {
    let to_host = |mac, to: Ipv4Addr| {
        [Entry { link: vxlan.index, mac, kind: Kind::Tunnel(to) }, Entry { link: vxlan.index, mac, kind: Kind::Port }]
    };
    let mut entries = Vec::new();
    for remote in &environment.remotes {
        entries.push(Entry::flood(vxlan.index, *remote));
        entries.extend(to_host(host_mac(*remote), *remote));
    }
    let mut ways: BTreeMap<Mac, Way> = BTreeMap::new();
    for endpoint in &environment.endpoints {
        if let Location::Remote(to) = endpoint.at {
            ways.insert(endpoint.mac, Way::Host(to));
        }
    }
    ways.extend(plugged.iter().map(|(port, link)| (port.mac, Way::Port(link.index))));
    // Also of a container whose port is out of the bridge and that is still said to be here: mid-move.
    let diverted = steps.diverted.iter().filter(|((vni, _), _)| *vni == environment.vni);
    ways.extend(diverted.filter_map(|((_, mac), divert)| Some((*mac, Way::Host(divert.to?)))));
    for (mac, way) in ways.into_iter().filter(|(mac, _)| !steps.is_parked(environment.vni, *mac)) {
        match way {
            Way::Host(to) => entries.extend(to_host(mac, to)),
            Way::Port(link) => entries.push(Entry { link, mac, kind: Kind::Port }),
        }
    }
    entries
}

/// Where frames for one MAC go.
enum Way {
    Port(u32),
    Host(Ipv4Addr),
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::parking::Peers;
    use crate::state::{Divert, Parked, Stage};
    use crate::types::{Endpoint, Subnet};

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

    fn entries_for(at: Location, is_plugged: bool, steps: &Steps) -> Vec<Kind> {
        let environment = EnvironmentNetwork {
            vni: 7,
            subnet: Subnet::new(Ipv4Addr::new(10, 7, 0, 0), 20).unwrap(),
            gateway: Ipv4Addr::new(10, 7, 0, 1),
            host_address: Ipv4Addr::new(10, 7, 0, 2),
            mtu: 1450,
            domain: String::new(),
            remotes: vec![],
            endpoints: vec![Endpoint { mac: MAC, address: Ipv4Addr::new(10, 7, 0, 9), at, names: vec![] }],
            ports: vec![],
        };
        let link = Link { index: 5, ..Link::default() };
        let record = PortRecord { id: "0".repeat(12), vni: 7, mac: MAC, address: Ipv4Addr::new(10, 7, 0, 9) };
        let plugged = if is_plugged { vec![(record, &link)] } else { vec![] };
        let entries = desired(&environment, &Link { index: 9, ..Link::default() }, &plugged, steps);
        entries.into_iter().filter(|entry| entry.mac == MAC).map(|entry| entry.kind).collect()
    }

    #[test]
    fn precedence_of_forwarding_entries() {
        let still = Steps::default();
        assert_eq!(entries_for(Location::Remote(THERE), false, &still), [Kind::Tunnel(THERE), Kind::Port]);
        assert_eq!(entries_for(Location::Remote(THERE), true, &still), [Kind::Port]);
        assert_eq!(entries_for(Location::Local, false, &still), []);
        let mut leaving = Steps::default();
        leaving.diverted.insert((7, MAC), Divert { to: Some(OTHER), passes_on: true, ..Divert::default() });
        for (at, is_plugged) in [(Location::Local, true), (Location::Local, false), (Location::Remote(THERE), false)] {
            assert_eq!(entries_for(at, is_plugged, &leaving), [Kind::Tunnel(OTHER), Kind::Port]);
        }
        let record = PortRecord { id: "1".repeat(12), vni: 7, mac: MAC, address: Ipv4Addr::new(10, 7, 0, 9) };
        for (stage, entries) in [
            (Stage::Open, vec![]),
            (Stage::Arrived, vec![]),
            (Stage::Delivering, vec![]),
            (Stage::Delivered, vec![Kind::Port]),
        ] {
            let mut parked = Steps::default();
            let (peers, ended) = (Peers::default(), tokio::sync::watch::channel(()).1);
            parked.parked.insert(record.id.clone(), Parked { record: record.clone(), stage, peers, ended });
            assert_eq!(entries_for(Location::Remote(THERE), true, &parked), entries, "{stage:?}");
        }
    }
}
