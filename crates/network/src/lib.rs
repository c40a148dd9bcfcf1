//! The network of one host: links, overlay, addresses, firewall, frame parking, names.
//!
//! Everything here happens in the network namespace of the calling process, and the caller is its only writer. All
//! that is made carries the prefix `gw` (links, see [`link_name`]) or the table name `godwit` (nftables), so that it can
//! be found again and removed after any crash.
//!
//! ```text
//!  container ── eth0 ═veth═ gwp<id> ──┐                      ┌── gwx<vni> ══ VXLAN ══▶ other hosts
//!  (own MAC, own address, for life)   ├── bridge gwb<vni> ───┤
//!  while a move is under way: tap gwt<id>                    └── host: gateway, names, published ports, egress
//! ```
//!
//! Invariants:
//! - Nothing learns: every forwarding entry is written by us, so a moved container is where the last entry says, and a
//!   frame of its own cannot say otherwise.
//! - The gateway has the same address and, seen from a container, the same MAC ([`GATEWAY_MAC`]) on every host, so a
//!   container that moved keeps its neighbour entry. The bridge's own MAC is the host's ([`host_mac`]): frames to
//!   [`GATEWAY_MAC`] are redirected to it at the container's port, and neither gateway address nor gateway MAC ever
//!   crosses the overlay.
//! - A connection to a published port gets the ingress host's own address in the environment as its source. The reply
//!   therefore returns to the ingress host from wherever the container lives now, and the container can move without
//!   the client noticing. The price: the program sees that address instead of the client's.
//! - Egress is masqueraded by the host the container lives on. Connections *to the outside* that a container opened
//!   itself do not outlive its move unless the far end is in the environment.
//! - What is absent: IPv6 inside environments (dropped at the port), and trust in bridge netfilter (rules hold with
//!   `net.bridge.bridge-nf-call-iptables` 0 and 1).

#![deny(unsafe_code)]

mod dns;
mod drain;
mod error;
mod firewall;
mod forwarding;
mod host;
mod link_name;
mod namespace;
mod netlink;
mod overlay;
mod parking;
mod port;
mod state;
mod sysctl;
#[allow(unsafe_code)]
mod tap;
mod types;

pub use error::NetworkError;
pub use host::HostNetwork;
pub use parking::{Delivered, Parking, ParkingCounts};
pub use types::{
    Endpoint, EnvironmentNetwork, GATEWAY_MAC, HostNetworkConfig, InvalidNetwork, Location, Mac, Port, Protocol,
    PublishedPort, Subnet, host_mac,
};
