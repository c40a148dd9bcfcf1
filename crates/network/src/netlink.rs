//! Links, addresses and neighbours through rtnetlink. The only module (with [`crate::forwarding`]) that knows it.
//!
//! A connection belongs to the network namespace of the thread that opened it.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use futures_util::{TryStream, TryStreamExt};
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    BridgePortState, InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage, LinkProtoInfoBridge,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use netlink_packet_route::{AddressFamily, route::RouteScope};
use nix::libc;
use rtnetlink::packet_core::DefaultNla;
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan,
    RouteMessageBuilder,
};
use tokio::sync::Mutex;

use crate::error::{NetworkError, errno};
use crate::link_name;
use crate::types::{Mac, Port};

/// IANA's port for VXLAN (RFC 7348).
pub(crate) const VXLAN_PORT: u16 = 4789;
/// State of a bridge's port (linux/if_link.h); the packet crate knows it in `IFLA_LINKINFO` only.
const IFLA_BRPORT_STATE: u16 = 1;
/// Explicit indices of our veth ends start here, far from those the kernel counts out. See [`Netlink::add_veth`].
const FIRST_PORT_INDEX: u32 = 1 << 24;

#[derive(Clone)]
pub(crate) struct Netlink {
    pub(crate) handle: Handle,
    /// Held while a list is read: the kernel refuses a second one on the same socket (EBUSY).
    lists: Arc<Mutex<()>>,
}

/// What we look at of a link.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    /// Index of the bridge it is a port of.
    pub controller: Option<u32>,
    pub mtu: u32,
    pub alias: String,
    pub up: bool,
    /// Local tunnel address, for VXLAN links.
    pub vxlan_local: Option<Ipv4Addr>,
}

/// How a bridge treats one of its ports.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortMode {
    /// Frames for MACs without an entry go out here too.
    pub flood: bool,
    /// Broadcasts and multicasts go out here too.
    pub group_flood: bool,
    /// A frame may leave by the port it came in.
    pub hairpin: bool,
    /// The bridge itself answers questions (ARP) about containers behind this port, from the host's own entries.
    pub answer: bool,
}

impl Netlink {
    /// Opens a connection in the calling thread's network namespace; must be called inside a tokio runtime.
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Connect)?;
        tokio::spawn(connection);
        Ok(Self { handle, lists: Arc::default() })
    }

    /// Reads one whole list, to its end even if the caller stops waiting: until then the socket is taken.
    pub(crate) async fn list<T, S>(
        &self,
        what: &'static str,
        request: impl FnOnce() -> S + Send + 'static,
    ) -> Result<Vec<T>, NetworkError>
    where
        T: Send + 'static,
        S: TryStream<Ok = T, Error = rtnetlink::Error> + Send,
    {
        let turn = self.lists.clone().lock_owned().await;
        let reading = tokio::spawn(async move {
            let all = request().try_collect::<Vec<T>>().await;
            drop(turn);
            all
        });
        // It ends early only with the runtime.
        let all = reading.await.unwrap_or(Err(rtnetlink::Error::RequestFailed));
        all.map_err(|source| NetworkError::List { what, source })
    }

    pub(crate) async fn links(&self) -> Result<Vec<Link>, NetworkError> {
        let request = self.handle.link().get();
        let messages = self.list("links", move || request.execute()).await?;
        Ok(messages.into_iter().map(Link::read).collect())
    }

    /// The link of that name, or `None`. Asking for one link also makes the kernel finish pending carrier changes
    /// (since Linux 6.8), so that a link that was just brought up really sends.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(message) => Ok(message.map(Link::read)),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(source) => Err(NetworkError::Link { action: "show", link: name.to_owned(), source }),
        }
    }

    pub(crate) async fn existing(&self, name: &str) -> Result<Link, NetworkError> {
        self.link(name).await?.ok_or_else(|| NetworkError::NoLink { link: name.to_owned() })
    }

    pub(crate) async fn add_bridge(&self, name: &str, mac: Mac, mtu: u32) -> Result<(), NetworkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .address(mac.0.to_vec())
            .mtu(mtu)
            .mcast_snooping(false)
            .up()
            .build();
        self.handle.link().add(message).execute().await.map_err(refused("create", name))
    }

    pub(crate) async fn add_vxlan(&self, name: &str, vni: u32, local: Ipv4Addr, mtu: u32) -> Result<(), NetworkError> {
        let message = LinkVxlan::new(name, vni).port(VXLAN_PORT).local(local).learning(false).mtu(mtu).build();
        self.handle.link().add(message).execute().await.map_err(refused("create", name))
    }

    /// Makes a port's veth pair, the host's end up, the container's end as `eth0` directly in `namespace`: moving a
    /// link there later would take it down again. (The peer cannot be up at birth: it has no other end yet.)
    ///
    /// The host's end gets an index of its own choosing: the kernel acts at once on carrier changes of a veth whose
    /// index differs from its peer's, and within a second otherwise.
    pub(crate) async fn add_veth(&self, port: &Port, namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
        let name = link_name::port(&port.id);
        let inside = LinkMessageBuilder::<LinkUnspec>::new()
            .name("eth0")
            .address(port.mac.0.to_vec())
            .mtu(port.mtu)
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        let message = |index: u32| {
            let pair = LinkMessageBuilder::<LinkVeth>::new(&name, "eth0").mtu(port.mtu).index(index).up();
            pair.set_info_data(InfoData::Veth(InfoVeth::Peer(inside.clone()))).build()
        };
        let digits = u32::from_str_radix(&port.id[port.id.len().saturating_sub(7)..], 16).unwrap_or(0);
        let first = self.handle.link().add(message(FIRST_PORT_INDEX + digits)).execute().await;
        let taken = matches!(&first, Err(error) if errno(error) == Some(libc::EBUSY));
        let result = if taken { self.handle.link().add(message(0)).execute().await } else { first };
        result.map_err(refused("create", &name))
    }

    pub(crate) async fn delete(&self, link: &Link) -> Result<(), NetworkError> {
        match self.handle.link().del(link.index).execute().await {
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(()),
            result => result.map_err(refused("delete", &link.name)),
        }
    }

    pub(crate) async fn delete_named(&self, name: &str) -> Result<(), NetworkError> {
        match self.link(name).await? {
            Some(link) => self.delete(&link).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn set_up(&self, link: &Link) -> Result<(), NetworkError> {
        self.change(link, "bring up", LinkUnspec::new_with_index(link.index).up()).await
    }

    pub(crate) async fn set_mtu(&self, link: &Link, mtu: u32) -> Result<(), NetworkError> {
        self.change(link, "set the MTU of", LinkUnspec::new_with_index(link.index).mtu(mtu)).await
    }

    /// Frames that may wait at the link's own queue.
    pub(crate) async fn set_queue(&self, link: &Link, frames: u32) -> Result<(), NetworkError> {
        self.change(link, "set the queue of", LinkUnspec::new_with_index(link.index).txqueuelen(frames)).await
    }

    pub(crate) async fn set_mac(&self, link: &Link, mac: Mac) -> Result<(), NetworkError> {
        self.change(link, "set the MAC of", LinkUnspec::new_with_index(link.index).address(mac.0.to_vec())).await
    }

    pub(crate) async fn set_alias(&self, link: &Link, alias: &str) -> Result<(), NetworkError> {
        let attribute = LinkAttribute::IfAlias(alias.to_owned());
        let message = LinkUnspec::new_with_index(link.index).append_extra_attribute(attribute);
        self.change(link, "label", message).await
    }

    /// Makes `link` a port of bridge `bridge`, without learning and with the given flooding.
    pub(crate) async fn join(&self, link: &Link, bridge: u32, mode: PortMode) -> Result<(), NetworkError> {
        if link.controller != Some(bridge) {
            self.change(link, "plug in", LinkUnspec::new_with_index(link.index).controller(bridge)).await?;
        }
        // One that comes new into a bridge forwards by itself, as soon as the link is up; one that is in it may be muted.
        let inside = link.controller == Some(bridge);
        let port = LinkBridgePort::new(link.index);
        let port = if inside { port.state(BridgePortState::Forwarding) } else { port };
        let port = port.learning(false).flood(mode.flood);
        let port = port.bcast_flood(mode.group_flood).mcast_flood(mode.group_flood).hairpin(mode.hairpin);
        let port = port.neigh_suppress(mode.answer);
        let request = self.handle.link().set_port(port.build());
        request.execute().await.map_err(refused("set the port flags of", &link.name))
    }

    /// Makes a port of a bridge take no frame and give none, at once and for all processors. The state is `disabled`:
    /// without STP the kernel turns `blocking` back into `forwarding` itself (br_port_state_selection). And it is said
    /// in the bridge's own family: a change by `IFLA_LINKINFO` ends with a notice of a changed device, upon which the
    /// bridge enables a port that it finds disabled (br_port_carrier_check).
    pub(crate) async fn mute(&self, link: &Link) -> Result<(), NetworkError> {
        let state = DefaultNla::new(IFLA_BRPORT_STATE, vec![BridgePortState::Disabled.into()]);
        let mut message = LinkMessage::default();
        message.header.interface_family = AddressFamily::Bridge;
        message.header.index = link.index;
        message.attributes.push(LinkAttribute::ProtoInfoBridge(vec![LinkProtoInfoBridge::Other(state)]));
        self.handle.link().set(message).execute().await.map_err(refused("mute", &link.name))
    }

    pub(crate) async fn leave(&self, link: &Link) -> Result<(), NetworkError> {
        self.change(link, "unplug", LinkUnspec::new_with_index(link.index).nocontroller()).await
    }

    async fn change(
        &self,
        link: &Link,
        action: &'static str,
        message: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetworkError> {
        self.handle.link().change(message.build()).execute().await.map_err(refused(action, &link.name))
    }

    /// Makes the IPv4 addresses of `link` exactly these; addresses that stay are not touched.
    pub(crate) async fn set_addresses(&self, link: &Link, wanted: &[(Ipv4Addr, u8)]) -> Result<(), NetworkError> {
        let request = self.handle.address().get().set_link_index_filter(link.index);
        let present = self.list("addresses", move || request.execute()).await?;
        let mut kept = Vec::new();
        for message in present.into_iter().filter(|message| message.header.family == AddressFamily::Inet) {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => Some((*address, message.header.prefix_len)),
                _ => None,
            });
            match local {
                Some(address) if wanted.contains(&address) => kept.push(address),
                _ => {
                    let result = self.handle.address().del(message).execute().await;
                    match result {
                        // Deleting a primary address takes its secondaries along.
                        Err(error) if errno(&error) == Some(libc::EADDRNOTAVAIL) => {}
                        result => result.map_err(refused("take an address off", &link.name))?,
                    }
                }
            }
        }
        for (address, prefix_len) in wanted.iter().filter(|address| !kept.contains(address)) {
            self.add_address(link, *address, *prefix_len).await?;
        }
        Ok(())
    }

    pub(crate) async fn add_address(&self, link: &Link, address: Ipv4Addr, prefix_len: u8) -> Result<(), NetworkError> {
        let message = AddressMessageBuilder::<Ipv4Addr>::new().index(link.index).address(address, prefix_len).build();
        let mut request = self.handle.address().add(link.index, IpAddr::V4(address), prefix_len).replace();
        *request.message_mut() = message;
        request.execute().await.map_err(refused("give an address to", &link.name))
    }

    pub(crate) async fn add_default_route(&self, link: &Link, gateway: Ipv4Addr) -> Result<(), NetworkError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .output_interface(link.index)
            .scope(RouteScope::Universe)
            .build();
        self.handle.route().add(route).replace().execute().await.map_err(refused("route through", &link.name))
    }

    /// Writes a permanent neighbour entry: no question is ever asked for this address.
    pub(crate) async fn set_neighbour(&self, link: &Link, address: Ipv4Addr, mac: Mac) -> Result<(), NetworkError> {
        self.write_neighbour(link, address, mac, NeighbourState::Permanent).await
    }

    /// Writes a neighbour entry that holds for now: it ages, and is asked for again, like one the kernel learned.
    pub(crate) async fn suggest_neighbour(&self, link: &Link, address: Ipv4Addr, mac: Mac) -> Result<(), NetworkError> {
        self.write_neighbour(link, address, mac, NeighbourState::Reachable).await
    }

    async fn write_neighbour(
        &self,
        link: &Link,
        address: Ipv4Addr,
        mac: Mac,
        state: NeighbourState,
    ) -> Result<(), NetworkError> {
        let request = self.handle.neighbours().add(link.index, IpAddr::V4(address));
        let request = request.link_layer_address(&mac.0).state(state).replace();
        let failed = |source| NetworkError::Neighbour { address, link: link.name.clone(), source };
        request.execute().await.map_err(failed)
    }

    /// Makes the permanent IPv4 neighbour entries of `link` exactly these.
    pub(crate) async fn set_neighbours(&self, link: &Link, wanted: &[(Ipv4Addr, Mac)]) -> Result<(), NetworkError> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Inet);
        let messages = self.list("neighbours", move || request.execute()).await?;
        let mut kept = Vec::new();
        let permanent = |header: &netlink_packet_route::neighbour::NeighbourHeader| {
            header.ifindex == link.index && header.state == NeighbourState::Permanent
        };
        for message in messages.into_iter().filter(|message| permanent(&message.header)) {
            let (mut address, mut mac) = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(*ip),
                    NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_of(bytes),
                    _ => {}
                }
            }
            let Some(entry) = address.zip(mac) else { continue };
            if wanted.contains(&entry) {
                kept.push(entry);
            } else if !wanted.iter().any(|(ip, _)| *ip == entry.0) {
                let failed = |source| NetworkError::Neighbour { address: entry.0, link: link.name.clone(), source };
                self.handle.neighbours().del(message).execute().await.map_err(failed)?;
            }
        }
        for (address, mac) in wanted.iter().filter(|entry| !kept.contains(entry)) {
            self.set_neighbour(link, *address, *mac).await?;
        }
        Ok(())
    }
}

impl Link {
    fn read(message: LinkMessage) -> Self {
        use netlink_packet_route::link::{InfoVxlan, LinkInfo};
        let mut link =
            Self { index: message.header.index, up: message.header.flags.contains(LinkFlags::Up), ..Self::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(index) => link.controller = Some(index).filter(|index| *index != 0),
                LinkAttribute::Address(bytes) => link.mac = mac_of(&bytes),
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        if let LinkInfo::Data(InfoData::Vxlan(data)) = info {
                            link.vxlan_local = data.iter().find_map(|entry| match entry {
                                InfoVxlan::Local(address) => Some(*address),
                                _ => None,
                            });
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

pub(crate) fn mac_of(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

fn refused(action: &'static str, link: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let link = link.to_owned();
    move |source| NetworkError::Link { action, link, source }
}

/// Only for messages whose kernel code says so: the thing to be removed was not there.
pub(crate) fn absent(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(libc::ENOENT | libc::ENODEV | libc::EADDRNOTAVAIL))
}
