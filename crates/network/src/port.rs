//! A container's port: made with its namespace, plugged into its environment's bridge, unplugged, removed.

use std::net::Ipv4Addr;

use crate::drain;
use crate::error::NetworkError;
use crate::forwarding::Kind;
use crate::host::HostNetwork;
use crate::link_name::{self, PortRecord};
use crate::namespace;
use crate::netlink::{Link, Netlink, PortMode};
use crate::state::Moving;
use crate::sysctl;
use crate::types::{GATEWAY_MAC, Mac, Port};

/// Nothing unknown is flooded to a container, so it cannot watch its neighbours' frames. Frames may leave by the port
/// they came in by: with bridge netfilter on, that is the way of a container to its own published port (the rules keep
/// its broadcasts from coming back).
const CONTAINER_PORT: PortMode = PortMode { flood: false, group_flood: true, hairpin: true, answer: false };

impl HostNetwork {
    /// Gives the network namespace of process `pid` its interface `eth0`: MAC, address, default route, neighbour
    /// entries, loopback, settings; up on both sides and ready to send, but not yet in the bridge. A port of the same
    /// id that was there is replaced.
    pub async fn attach(&self, port: &Port, pid: u32) -> Result<(), NetworkError> {
        port.validate()?;
        let _guard = Attaching::begin(&self.inner.moving, &port.id);
        let result = self.make_port(port, pid).await;
        if result.is_err() {
            // The first error is the one to tell; what cannot be removed now goes with the namespace or the next apply.
            let _ = self.inner.netlink.delete_named(&link_name::port(&port.id)).await;
        }
        result
    }

    async fn make_port(&self, port: &Port, pid: u32) -> Result<(), NetworkError> {
        let netlink = &self.inner.netlink;
        let name = link_name::port(&port.id);
        let target = namespace::of_process(pid)?;
        netlink.delete_named(&name).await?;
        netlink.add_veth(port, std::os::fd::AsFd::as_fd(&target)).await?;
        sysctl::set_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
        let link = netlink.existing(&name).await?;
        let record = PortRecord::of(port);
        netlink.set_alias(&link, &record.alias()).await?;
        let (inside, peers) = (port.clone(), self.peers(&port.id));
        namespace::inside(target, pid, async move || configure(&inside, &peers).await).await?;
        // The other side is up only now; asking for the link makes the kernel notice.
        netlink.existing(&name).await?;
        self.hold_own_frames(&record).await
    }

    /// Puts the port into its environment's bridge: from now on the container can send, and unless it is parked its
    /// frames reach it. Undoes a divert of its MAC.
    pub async fn plug(&self, id: &str) -> Result<(), NetworkError> {
        let netlink = &self.inner.netlink;
        let (link, record) = self.port(id).await?;
        let bridge = netlink.existing(&link_name::bridge(record.vni)).await?;
        // Between restore and activation: the rules were made when the port was parked, so nft need not run now.
        if self.inner.moving.lock().holds(id) {
            return netlink.join(&link, bridge.index, CONTAINER_PORT).await;
        }
        let key = (record.vni, record.mac);
        // A move that failed: the rules still know the port, and its clients have waited long enough.
        let diverted = self.inner.moving.lock().diverted.contains_key(&key);
        if !diverted {
            self.sync_firewall(&mut *self.inner.state.lock().await).await?;
        }
        let divert = {
            let _ways = self.inner.ways.lock().await;
            netlink.join(&link, bridge.index, CONTAINER_PORT).await?;
            netlink.forward_to_port(&link, record.mac).await?;
            let divert = self.inner.moving.lock().diverted.remove(&key);
            if let Some(to) = divert.and_then(|divert| divert.to) {
                let vxlan = netlink.existing(&link_name::vxlan(record.vni)).await?;
                netlink.forget(&vxlan, record.mac, Kind::Tunnel(to)).await?;
            }
            divert
        };
        if divert.is_some() {
            let mut state = self.inner.state.lock().await;
            self.set_vxlan_mode(record.vni).await?;
            self.sync_firewall(&mut state).await?;
        }
        Ok(())
    }

    /// Lets nothing in or out of the port any more, once what it has sent before has gone on its way. Undone by
    /// [`HostNetwork::plug`]; nothing to do if it is unplugged already.
    ///
    /// For whoever copies the container's sockets: a frozen container's TCP goes on by itself, on timers and
    /// acknowledgements, and whatever it sends after its sockets were copied is data that its peer has and the copy
    /// knows nothing of. The copy then takes every acknowledgement for a mistake, and the connection stands for ever.
    pub async fn mute(&self, id: &str) -> Result<(), NetworkError> {
        let (link, _) = self.port(id).await?;
        if link.controller.is_none() {
            return Ok(());
        }
        drain::receive_queues().await;
        self.inner.netlink.mute(&link).await
    }

    /// Takes the port out of its bridge; the links stay up. Nothing to do if it is out already. What it has just sent
    /// may be lost, unless [`HostNetwork::mute`] came before.
    pub async fn unplug(&self, id: &str) -> Result<(), NetworkError> {
        let (link, _) = self.port(id).await?;
        if link.controller.is_none() {
            return Ok(());
        }
        self.inner.netlink.leave(&link).await
    }

    /// Removes the port, the container's side with it. Nothing to do if there is none.
    pub async fn detach(&self, id: &str) -> Result<(), NetworkError> {
        let name = link_name::port(id);
        let Some(link) = self.inner.netlink.link(&name).await? else { return Ok(()) };
        self.inner.netlink.delete(&link).await?;
        let mut state = self.inner.state.lock().await;
        // Without it, where its frames go is a matter of the description again.
        let record = PortRecord::read(&link.name, &link.alias);
        let forwarded = match record {
            Some(record) => self.forward_again(&state, record.vni).await,
            None => Ok(()),
        };
        self.sync_firewall(&mut state).await.and(forwarded)
    }

    pub(crate) async fn port(&self, id: &str) -> Result<(Link, PortRecord), NetworkError> {
        let link = self.inner.netlink.link(&link_name::port(id)).await?;
        let found = link.and_then(|link| PortRecord::read(&link.name, &link.alias).map(|record| (link, record)));
        found.ok_or_else(|| NetworkError::NoPort { id: id.to_owned() })
    }
}

/// Runs in the container's namespace.
async fn configure(port: &Port, peers: &[(Ipv4Addr, Mac)]) -> Result<(), NetworkError> {
    for scope in ["all", "default", "eth0"] {
        sysctl::set_if_there(&format!("ipv6/conf/{scope}/disable_ipv6"), "1");
    }
    // Multipath TCP sockets cannot be checkpointed; programs fall back to TCP.
    sysctl::set_if_there("mptcp/enabled", "0");
    // Ping and low ports without privilege, as containers expect.
    sysctl::set_if_there("ipv4/ping_group_range", "0 2147483647");
    sysctl::set_if_there("ipv4/ip_unprivileged_port_start", "0");
    let netlink = Netlink::open()?;
    netlink.set_up(&netlink.existing("lo").await?).await?;
    let link = netlink.existing("eth0").await?;
    netlink.set_up(&link).await?;
    netlink.add_address(&link, port.address, port.prefix_len).await?;
    let gateway = (port.gateway, GATEWAY_MAC);
    let known = port.neighbours.iter().any(|(address, _)| *address == port.gateway);
    for (address, mac) in port.neighbours.iter().copied().chain((!known).then_some(gateway)) {
        netlink.set_neighbour(&link, address, mac).await?;
    }
    for (address, mac) in peers.iter().filter(|(address, _)| *address != port.address) {
        if !port.neighbours.iter().any(|(known, _)| known == address) {
            netlink.suggest_neighbour(&link, *address, *mac).await?;
        }
    }
    netlink.add_default_route(&link, port.gateway).await?;
    // Asking makes the kernel finish bringing the link up: the first frame can leave now.
    netlink.existing("eth0").await.map(drop)
}

/// Marks a port as being made, so that an apply that runs meanwhile leaves it alone.
struct Attaching<'a> {
    moving: &'a Moving,
    id: &'a str,
}

impl<'a> Attaching<'a> {
    fn begin(moving: &'a Moving, id: &'a str) -> Self {
        moving.lock().attaching.insert(id.to_owned());
        Self { moving, id }
    }
}

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        self.moving.lock().attaching.remove(self.id);
    }
}
