//! From what is known to the text of the rules. Pure.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::Ipv4Addr;

use crate::link_name::{self, PortRecord};
use crate::netlink::VXLAN_PORT;
use crate::types::{EnvironmentNetwork, GATEWAY_MAC, Mac, PublishedPort, host_mac};

/// Everything the rules depend on. Lists are sorted by the renderer: equal content gives equal text.
pub(crate) struct Rules<'a> {
    pub tunnel_address: Ipv4Addr,
    pub uplink: Option<&'a str>,
    pub environments: &'a [EnvironmentNetwork],
    /// Further addresses that are guarded like the other hosts'.
    pub protected: &'a BTreeSet<Ipv4Addr>,
    /// Ports that may send.
    pub ports: &'a [PortRecord],
    /// Ports whose frames from the overlay wait on a tap.
    pub parked: &'a [PortRecord],
    /// Network and MAC of containers whose frames may be sent back into the overlay.
    pub diverted: &'a [(u32, Mac)],
}

/// The MAC that frames for a parked port carry on their way to its tap. `02:69` marks it; it never leaves the host.
pub(crate) fn parking_mac(id: &str) -> Mac {
    let digits = id.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0);
    let [a, b, c, d] = digits.to_be_bytes();
    Mac([0x02, 0x69, a, b, c, d])
}

impl Rules<'_> {
    pub(crate) fn render(&self) -> String {
        let mut text = self.bridge_table();
        text.push_str(&self.inet_table());
        text
    }

    /// What enters and leaves bridges. Ports and overlay are told apart by the kind of link (`gwp*`, `gwx*`).
    fn bridge_table(&self) -> String {
        let own_mac = host_mac(self.tunnel_address);
        let to_gateway = format!("ether daddr {GATEWAY_MAC} ether daddr set {own_mac} meta pkttype set host");
        let known = self.ports.iter().chain(self.parked);
        let port_address = known.clone().map(|p| format!("{} . {} . {}", link_name::port(&p.id), p.mac, p.address));
        let same_port = known.clone().map(|p| format!("{0} . {0}", link_name::port(&p.id)));
        let port_mac = known.map(|p| format!("{} . {}", link_name::port(&p.id), p.mac));
        let gateway = self.environments.iter().map(|e| format!("{} . {}", link_name::vxlan(e.vni), e.gateway));
        let address = self.environments.iter().map(|e| e.gateway.to_string());
        let parked = self.parked.iter();
        let parked = parked.map(|p| format!("{} . {} : {}", link_name::vxlan(p.vni), p.mac, parking_mac(&p.id)));
        let diverted = self.diverted.iter().map(|(vni, mac)| format!("{} . {mac}", link_name::vxlan(*vni)));
        format!(
            "table bridge godwit {{
{}{}{}{}{}{}{}  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
    iifname \"gwp*\" jump from_container
    iifname \"gwx*\" jump from_overlay
    iifname \"gwt*\" drop
  }}
  chain from_container {{
    iifname . ether saddr != @port_mac drop
    ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
    ether type arp goto arp_from_container
    ether type != ip drop
    iifname . ether saddr . ip saddr != @port_address drop
    udp sport 67 drop
    {to_gateway}
  }}
  chain arp_from_container {{
    arp htype != 1 drop
    arp ptype != ip drop
    iifname . arp saddr ether . arp saddr ip != @port_address drop
    {to_gateway}
  }}
  chain from_overlay {{
    ether saddr {GATEWAY_MAC} drop
    ether daddr {GATEWAY_MAC} drop
    ether type arp goto arp_from_overlay
    ether type != ip drop
    iifname . ip saddr @gateway drop
    ether daddr set iifname . ether daddr map @parked
  }}
  chain arp_from_overlay {{
    iifname . arp saddr ip @gateway drop
    iifname . arp daddr ip @gateway drop
    ether daddr set iifname . ether daddr map @parked
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname \"gwx*\" oifname \"gwx*\" jump back_into_overlay
    oifname \"gwx*\" ether type arp oifname . arp daddr ip @gateway drop
    iifname . oifname @same_port ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 drop
  }}
  chain back_into_overlay {{
    oifname . ether daddr @diverted accept
    drop
  }}
  chain output {{
    type filter hook output priority 0; policy accept;
    oifname \"gwx*\" ether type arp oifname . arp saddr ip @gateway drop
    oifname \"gwp*\" ether type arp arp saddr ip @gateway_address arp saddr ether set {GATEWAY_MAC} ether saddr set {GATEWAY_MAC}
  }}
}}
",
            set("port_mac", "ifname . ether_addr", port_mac),
            set("port_address", "ifname . ether_addr . ipv4_addr", port_address),
            set("same_port", "ifname . ifname", same_port),
            set("gateway", "ifname . ipv4_addr", gateway),
            set("gateway_address", "ipv4_addr", address),
            map("parked", "ifname . ether_addr : ether_addr", parked),
            set("diverted", "ifname . ether_addr", diverted),
        )
    }

    /// What is routed. Order of the postrouting rules: a redirected connection is an environment's own business and
    /// gets the host's address there; the rest that leaves is masqueraded.
    fn inet_table(&self) -> String {
        let environments = self.environments.iter();
        let gateway = environments.clone().map(|e| format!("{} . {}", link_name::bridge(e.vni), e.gateway));
        let inside = environments.clone().map(|e| format!("{0} . {0}", link_name::bridge(e.vni)));
        let own = environments.clone().map(|e| format!("{} : {}", link_name::bridge(e.vni), e.host_address));
        let subnet = environments.clone().map(|e| format!("{} . {}", link_name::bridge(e.vni), e.subnet));
        let source = environments.clone().map(|e| e.subnet.to_string());
        let hosts = environments.clone().flat_map(|e| &e.remotes).chain(self.protected).map(Ipv4Addr::to_string);
        let ports = environments.clone().flat_map(|e| &e.ports).filter(|port| !port.targets.is_empty());
        let published = ports.clone().map(|port| format!("{} . {}", port.protocol.keyword(), port.host_port));
        let redirects: BTreeSet<String> = ports.map(redirect).collect();
        let vnis: BTreeSet<u32> = environments.map(|e| e.vni).collect();
        let foreign_tunnel = if vnis.is_empty() {
            String::new()
        } else {
            let list = vnis.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            // The network identifier sits in bytes 4 to 6 of the VXLAN header (RFC 7348), behind 8 bytes of UDP.
            format!("    ip saddr != @host udp dport {VXLAN_PORT} @th,96,24 {{ {list} }} drop\n")
        };
        let (only_uplink, out) = match self.uplink {
            Some(uplink) => (format!("    oifname != \"{uplink}\" drop\n"), format!("oifname \"{uplink}\"")),
            None => (String::new(), "oifname != \"gwb*\"".to_owned()),
        };
        format!(
            "table inet godwit {{
{}{}{}{}{}{}{}  chain untracked {{
    type filter hook prerouting priority -300; policy accept;
    fib daddr type != local iifname . ip daddr @subnet notrack
  }}
  chain input {{
    type filter hook input priority 0; policy accept;
{foreign_tunnel}    iifname != \"gwb*\" accept
    ct state established,related accept
    icmp type echo-request iifname . ip daddr @gateway accept
    meta l4proto {{ tcp, udp }} th dport 53 iifname . ip daddr @gateway accept
    drop
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname != \"gwb*\" oifname != \"gwb*\" accept
    ct state established,related accept
    ct status dnat accept
    iifname . oifname @inside accept
    oifname \"gwb*\" drop
    udp dport {VXLAN_PORT} drop
    ip daddr @host meta l4proto . th dport != @published drop
{only_uplink}  }}
  chain output {{
    type filter hook output priority 0; policy accept;
    oifname \"gwb*\" icmp type redirect drop
  }}
  chain redirect_in {{
    type nat hook prerouting priority -100; policy accept;
    fib daddr type != local accept
    iifname . ip daddr @gateway accept
    jump to_containers
  }}
  chain redirect_own {{
    type nat hook output priority -100; policy accept;
    fib daddr type != local accept
    jump to_containers
  }}
  chain to_containers {{
{}  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    ct status dnat snat ip to oifname map @own_address
    ip saddr @source {out} masquerade
  }}
}}
",
            set("gateway", "ifname . ipv4_addr", gateway),
            set("inside", "ifname . ifname", inside),
            map("own_address", "ifname : ipv4_addr", own),
            interval_set("subnet", "ifname . ipv4_addr", subnet),
            interval_set("source", "ipv4_addr", source),
            set("host", "ipv4_addr", hosts),
            set("published", "inet_proto . inet_service", published),
            redirects.into_iter().collect::<String>(),
        )
    }
}

/// One published port: new connections go to its targets in turn.
fn redirect(port: &PublishedPort) -> String {
    let head = format!("    {} dport {} dnat ip to", port.protocol.keyword(), port.host_port);
    if let [(address, target)] = port.targets.as_slice() {
        return format!("{head} {address}:{target}\n");
    }
    let mut targets = port.targets.clone();
    targets.sort_unstable();
    let entries = targets.iter().enumerate().map(|(turn, (address, target))| format!("{turn} : {address} . {target}"));
    let entries = entries.collect::<Vec<_>>().join(", ");
    format!("{head} numgen inc mod {} map {{ {entries} }}\n", targets.len())
}

fn set(name: &str, kind: &str, elements: impl Iterator<Item = String>) -> String {
    container("set", name, kind, "", elements)
}

fn interval_set(name: &str, kind: &str, elements: impl Iterator<Item = String>) -> String {
    container("set", name, kind, " flags interval;", elements)
}

fn map(name: &str, kind: &str, elements: impl Iterator<Item = String>) -> String {
    container("map", name, kind, "", elements)
}

fn container(what: &str, name: &str, kind: &str, flags: &str, elements: impl Iterator<Item = String>) -> String {
    let elements: BTreeSet<String> = elements.collect();
    let mut text = format!("  {what} {name} {{ type {kind};{flags}");
    if !elements.is_empty() {
        let list = elements.into_iter().collect::<Vec<_>>().join(", ");
        // Writing to a String cannot fail.
        let _ = write!(text, " elements = {{ {list} }}");
    }
    text.push_str(" }\n");
    text
}
