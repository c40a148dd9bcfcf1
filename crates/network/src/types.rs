//! What the caller says: environments, endpoints, ports. Values only, no I/O.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

use thiserror::Error;

/// The gateway's MAC as every container sees it, on every host.
pub const GATEWAY_MAC: Mac = Mac([0x02, 0x67, 0x77, 0x00, 0x00, 0x01]);

/// Largest VXLAN network identifier (24 bits, RFC 7348 section 5).
const MAX_VNI: u32 = 0x00ff_ffff;
/// Smallest MTU every IPv4 host must take (RFC 791), in bytes.
const MIN_MTU_BYTES: u32 = 576;
const MAX_MTU_BYTES: u32 = 65_535 - 50;
/// Length of a port's id in hexadecimal digits: with the prefix `gwp` it fills an interface name.
pub(crate) const PORT_ID_DIGITS: usize = 12;

/// The MAC of a host's own bridges, derived from its tunnel address so that every host knows every other's.
/// `02:68` marks it; container MACs must not start so.
pub fn host_mac(tunnel_address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = tunnel_address.octets();
    Mac([0x02, 0x68, a, b, c, d])
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<[u8; 6]> for Mac {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

impl Mac {
    /// Six pairs of hexadecimal digits with colons; anything else is `None`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2)?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(bytes))
    }

    fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }
}

/// An IPv4 network: address without host bits, and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    address: Ipv4Addr,
    prefix_len: u8,
}

impl Subnet {
    /// Host bits of `address` are cleared. Prefixes of 8 to 30 bits are taken: less is a mistake, more has no room.
    pub fn new(address: Ipv4Addr, prefix_len: u8) -> Result<Self, InvalidNetwork> {
        if !(8..=30).contains(&prefix_len) {
            return Err(InvalidNetwork::PrefixLength { address, prefix_len });
        }
        let address = Ipv4Addr::from_bits(address.to_bits() & mask(prefix_len));
        Ok(Self { address, prefix_len })
    }

    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    pub fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix_len) == self.address.to_bits()
    }

    fn overlaps(&self, other: &Self) -> bool {
        let shorter = self.prefix_len.min(other.prefix_len);
        self.address.to_bits() & mask(shorter) == other.address.to_bits() & mask(shorter)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX << (32 - u32::from(prefix_len))
}

/// Where a container's frames go from this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// A container of this host.
    Local,
    /// A container behind another host's tunnel address.
    Remote(Ipv4Addr),
}

/// One container of an environment, as this host should see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub at: Location,
    /// Names it answers to inside the environment: `db-1`, `db`, link aliases. Several endpoints may share one.
    pub names: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub(crate) fn keyword(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port of the host that leads to containers, new connections in turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedPort {
    pub host_port: u16,
    pub protocol: Protocol,
    /// Address and port inside the environment. With none, nothing is redirected and the host answers itself.
    pub targets: Vec<(Ipv4Addr, u16)>,
}

/// One environment's private network, as it should be on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvironmentNetwork {
    /// VXLAN network identifier, 1 to 16,777,215.
    pub vni: u32,
    /// Must not overlap another environment's: all share the host's routing table.
    pub subnet: Subnet,
    /// The same on every host.
    pub gateway: Ipv4Addr,
    /// This host's own address in the subnet: source of connections through published ports. One per host.
    pub host_address: Ipv4Addr,
    /// Bytes a container may put into one IP packet: the uplink's MTU less 50 for VXLAN over IPv4.
    pub mtu: u32,
    /// Names are also answered as `name.<domain>`. Empty: only bare names.
    pub domain: String,
    /// Tunnel addresses of the other hosts of this environment.
    pub remotes: Vec<Ipv4Addr>,
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<PublishedPort>,
}

/// A container's interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// 12 lower-case hexadecimal digits, unique on this host.
    pub id: String,
    pub vni: u32,
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    pub mtu: u32,
    /// Permanent neighbour entries put into the container's namespace before its processes run. The gateway's own
    /// ([`GATEWAY_MAC`]) is added if it is missing.
    pub neighbours: Vec<(Ipv4Addr, Mac)>,
}

/// What [`crate::HostNetwork::open`] has to know.
#[derive(Debug, Clone)]
pub struct HostNetworkConfig {
    /// This host's address on the network that joins the hosts.
    pub tunnel_address: Ipv4Addr,
    /// Interface egress leaves by. `None`: any interface that is not ours.
    pub uplink: Option<String>,
    /// Where names that are not an environment's own are asked, in order. Empty: such questions get SERVFAIL.
    pub resolvers: Vec<SocketAddr>,
}

/// Why a description was refused before anything was changed for it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum InvalidNetwork {
    #[error("{address}/{prefix_len} is no subnet for an environment: give a prefix of 8 to 30 bits")]
    PrefixLength { address: Ipv4Addr, prefix_len: u8 },
    #[error("network {vni} is outside 1..={MAX_VNI}: choose another identifier")]
    Vni { vni: u32 },
    #[error("network {vni} is given twice: merge the two")]
    VniTwice { vni: u32 },
    #[error("{what} {address} of network {vni} is outside its subnet {subnet}: give an address of the subnet")]
    OutsideSubnet { vni: u32, what: &'static str, address: Ipv4Addr, subnet: Subnet },
    #[error("{address} is given to two users in network {vni}: give each its own")]
    AddressTwice { vni: u32, address: Ipv4Addr },
    #[error("MAC {mac} is given to two containers in network {vni}: give each its own")]
    MacTwice { vni: u32, mac: Mac },
    #[error(
        "MAC {mac} cannot be a container's: use a unicast address that does not start with 02:68 and is not {GATEWAY_MAC}"
    )]
    Mac { mac: Mac },
    #[error("the subnets {one} and {other} overlap: give each environment its own")]
    Overlap { one: Subnet, other: Subnet },
    #[error("host port {port}/{protocol:?} is published twice: choose another for one of them")]
    PortTwice { port: u16, protocol: Protocol },
    #[error("an MTU of {mtu} bytes is outside {MIN_MTU_BYTES}..={MAX_MTU_BYTES}: use the uplink's less 50")]
    Mtu { mtu: u32 },
    #[error("`{id}` is no port id: give {PORT_ID_DIGITS} lower-case hexadecimal digits")]
    PortId { id: String },
}

impl Port {
    pub(crate) fn validate(&self) -> Result<(), InvalidNetwork> {
        let digits = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if self.id.len() != PORT_ID_DIGITS || !self.id.chars().all(digits) {
            return Err(InvalidNetwork::PortId { id: self.id.clone() });
        }
        check_vni(self.vni)?;
        check_mtu(self.mtu)?;
        check_container_mac(self.mac)?;
        let subnet = Subnet::new(self.address, self.prefix_len)?;
        if !subnet.contains(self.gateway) {
            return Err(outside(self.vni, "gateway", self.gateway, subnet));
        }
        Ok(())
    }
}

impl EnvironmentNetwork {
    pub(crate) fn validate(&self) -> Result<(), InvalidNetwork> {
        check_vni(self.vni)?;
        check_mtu(self.mtu)?;
        let (mut addresses, mut macs) = (HashSet::new(), HashSet::new());
        let named = [("gateway", self.gateway), ("host address", self.host_address)];
        let containers = self.endpoints.iter().map(|endpoint| ("container address", endpoint.address));
        for (what, address) in named.into_iter().chain(containers) {
            if !self.subnet.contains(address) {
                return Err(outside(self.vni, what, address, self.subnet));
            }
            if !addresses.insert(address) {
                return Err(InvalidNetwork::AddressTwice { vni: self.vni, address });
            }
        }
        for mac in self.endpoints.iter().map(|endpoint| endpoint.mac) {
            check_container_mac(mac)?;
            if !macs.insert(mac) {
                return Err(InvalidNetwork::MacTwice { vni: self.vni, mac });
            }
        }
        let targets = self.ports.iter().flat_map(|port| &port.targets);
        for (address, _) in targets {
            if !self.subnet.contains(*address) {
                return Err(outside(self.vni, "target of a published port", *address, self.subnet));
            }
        }
        Ok(())
    }
}

/// Checks what no environment can see by itself. Returns for each refused environment its index and the reason; the
/// first of two that collide is kept.
pub(crate) fn refuse_collisions(wanted: &[EnvironmentNetwork]) -> Vec<(usize, InvalidNetwork)> {
    let mut refused = Vec::new();
    let mut kept: Vec<&EnvironmentNetwork> = Vec::new();
    let mut ports = BTreeSet::new();
    for (index, environment) in wanted.iter().enumerate() {
        let collision = environment.validate().err().or_else(|| {
            if kept.iter().any(|other| other.vni == environment.vni) {
                return Some(InvalidNetwork::VniTwice { vni: environment.vni });
            }
            if let Some(other) = kept.iter().find(|other| other.subnet.overlaps(&environment.subnet)) {
                return Some(InvalidNetwork::Overlap { one: other.subnet, other: environment.subnet });
            }
            let taken = environment.ports.iter().find(|port| !ports.insert((port.protocol, port.host_port)));
            taken.map(|port| InvalidNetwork::PortTwice { port: port.host_port, protocol: port.protocol })
        });
        match collision {
            Some(reason) => refused.push((index, reason)),
            None => kept.push(environment),
        }
    }
    refused
}

fn outside(vni: u32, what: &'static str, address: Ipv4Addr, subnet: Subnet) -> InvalidNetwork {
    InvalidNetwork::OutsideSubnet { vni, what, address, subnet }
}

fn check_vni(vni: u32) -> Result<(), InvalidNetwork> {
    if (1..=MAX_VNI).contains(&vni) { Ok(()) } else { Err(InvalidNetwork::Vni { vni }) }
}

fn check_mtu(mtu: u32) -> Result<(), InvalidNetwork> {
    if (MIN_MTU_BYTES..=MAX_MTU_BYTES).contains(&mtu) { Ok(()) } else { Err(InvalidNetwork::Mtu { mtu }) }
}

fn check_container_mac(mac: Mac) -> Result<(), InvalidNetwork> {
    let reserved = mac == GATEWAY_MAC || mac.0[..2] == [0x02, 0x68] || mac.is_group() || mac == Mac([0; 6]);
    if reserved { Err(InvalidNetwork::Mac { mac }) } else { Ok(()) }
}
