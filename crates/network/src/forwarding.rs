//! Forwarding entries of bridges and VXLAN links.
//!
//! A remote MAC needs two entries: on the bridge (flag "controller", state `noarp`: static) that the MAC is behind the
//! VXLAN port, and on the VXLAN link itself (flag "own", state `permanent`) that it is behind a tunnel address. Without
//! the flag "own" the kernel takes the second for the first and drops the tunnel address without a word. A permanent
//! entry on a *bridge* would mean the host itself.

use std::net::Ipv4Addr;

use futures_util::StreamExt;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};

use crate::error::NetworkError;
use crate::netlink::{Link, Netlink, absent, mac_of};
use crate::types::Mac;

/// Frames to no single known MAC: broadcast, multicast and unknown ones go to every tunnel address under this entry.
const EVERYONE: Mac = Mac([0; 6]);

/// One entry as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Index of the bridge port or VXLAN link.
    pub link: u32,
    pub mac: Mac,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// On the bridge: behind this port, never learned away.
    Port,
    /// On the VXLAN link: behind this tunnel address.
    Tunnel(Ipv4Addr),
}

impl Netlink {
    /// Every static entry on bridges and VXLAN links of this namespace; what the kernel keeps for itself is left out.
    pub(crate) async fn forwarding(&self) -> Result<Vec<Entry>, NetworkError> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
        let messages = self.list("forwarding entries", move || request.execute()).await?;
        Ok(messages.into_iter().filter_map(Entry::read).collect())
    }

    /// The bridge sends frames for `mac` to port `link` from now on.
    pub(crate) async fn forward_to_port(&self, link: &Link, mac: Mac) -> Result<(), NetworkError> {
        self.write(message(link.index, mac, Kind::Port), NLM_F_CREATE | NLM_F_REPLACE, link, mac).await
    }

    /// The VXLAN link sends frames for `mac` to tunnel address `to`; the bridge sends them to the VXLAN link.
    pub(crate) async fn forward_to_host(&self, vxlan: &Link, mac: Mac, to: Ipv4Addr) -> Result<(), NetworkError> {
        // The tunnel first: a frame must not reach the VXLAN link before it knows where to.
        self.forward_to_tunnel(vxlan, mac, to).await?;
        self.forward_to_port(vxlan, mac).await
    }

    /// Only the VXLAN link's half of [`Netlink::forward_to_host`].
    pub(crate) async fn forward_to_tunnel(&self, vxlan: &Link, mac: Mac, to: Ipv4Addr) -> Result<(), NetworkError> {
        self.write(message(vxlan.index, mac, Kind::Tunnel(to)), NLM_F_CREATE | NLM_F_REPLACE, vxlan, mac).await
    }

    /// Adds `to` to the tunnel addresses that get broadcasts.
    pub(crate) async fn flood_to_host(&self, vxlan: &Link, to: Ipv4Addr) -> Result<(), NetworkError> {
        self.write(message(vxlan.index, EVERYONE, Kind::Tunnel(to)), NLM_F_CREATE | NLM_F_APPEND, vxlan, EVERYONE).await
    }

    pub(crate) async fn forget(&self, link: &Link, mac: Mac, kind: Kind) -> Result<(), NetworkError> {
        match self.handle.neighbours().del(message(link.index, mac, kind)).execute().await {
            Err(error) if absent(&error) => Ok(()),
            result => result.map_err(failed("removed", mac, link)),
        }
    }

    async fn write(&self, body: NeighbourMessage, flags: u16, link: &Link, mac: Mac) -> Result<(), NetworkError> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(body));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let mut response = handle.request(request).map_err(failed("written", mac, link))?;
        while let Some(reply) = response.next().await {
            if let NetlinkPayload::Error(error) = reply.payload
                && error.code.is_some()
            {
                return Err(failed("written", mac, link)(rtnetlink::Error::NetlinkError(error)));
            }
        }
        Ok(())
    }
}

impl Entry {
    fn read(message: NeighbourMessage) -> Option<Self> {
        let header = &message.header;
        let mut mac = None;
        let mut tunnel = None;
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_of(bytes),
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => tunnel = Some(*address),
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                    tunnel = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from);
                }
                _ => {}
            }
        }
        let kind = match tunnel {
            Some(address) if header.flags.contains(NeighbourFlags::Own) => Kind::Tunnel(address),
            None if header.state == NeighbourState::Noarp => Kind::Port,
            _ => return None,
        };
        Some(Self { link: header.ifindex, mac: mac?, kind })
    }

    pub(crate) fn is_flood(&self) -> bool {
        self.mac == EVERYONE
    }

    /// The flooding entry for one tunnel address.
    pub(crate) fn flood(link: u32, to: Ipv4Addr) -> Self {
        Self { link, mac: EVERYONE, kind: Kind::Tunnel(to) }
    }
}

fn message(link: u32, mac: Mac, kind: Kind) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = link;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    match kind {
        Kind::Port => {
            message.header.flags = NeighbourFlags::Controller;
            message.header.state = NeighbourState::Noarp;
        }
        Kind::Tunnel(to) => {
            message.header.flags = NeighbourFlags::Own;
            message.header.state = NeighbourState::Permanent;
            message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(to)));
        }
    }
    message
}

fn failed(action: &'static str, mac: Mac, link: &Link) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let link = link.name.clone();
    move |source| NetworkError::Forwarding { action, mac, link, source }
}
