//! Names of our links, and what a port's alias says. The kernel keeps both, so they are the memory that survives us.

use std::net::Ipv4Addr;

use crate::types::{Mac, Port};

/// Links of ours by kind; a link that merely starts with `gw` is somebody else's.
const KINDS: [&str; 4] = ["gwb", "gwx", "gwp", "gwt"];

pub(crate) fn bridge(vni: u32) -> String {
    format!("gwb{vni}")
}

pub(crate) fn vxlan(vni: u32) -> String {
    format!("gwx{vni}")
}

/// Host side of a container's veth pair.
pub(crate) fn port(id: &str) -> String {
    format!("gwp{id}")
}

/// Tap that keeps frames for a port that is moving.
pub(crate) fn tap(id: &str) -> String {
    format!("gwt{id}")
}

/// Whether this name can only be ours: a kind and then digits of the right sort.
pub(crate) fn is_ours(name: &str) -> bool {
    let Some((kind, rest)) = name.split_at_checked(3) else { return false };
    if !KINDS.contains(&kind) || rest.is_empty() {
        return false;
    }
    match kind {
        "gwb" | "gwx" => rest.len() <= 8 && rest.bytes().all(|b| b.is_ascii_digit()),
        _ => rest.len() == 12 && rest.bytes().all(|b| b.is_ascii_hexdigit()),
    }
}

/// The network a bridge or VXLAN link belongs to.
pub(crate) fn vni_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("gwb").or_else(|| name.strip_prefix("gwx"))?;
    digits.parse().ok()
}

/// What has to be known of a port after a restart of the agent, written into the link's alias:
/// `godwit VNI MAC ADDRESS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PortRecord {
    pub id: String,
    pub vni: u32,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

impl PortRecord {
    pub(crate) fn of(port: &Port) -> Self {
        Self { id: port.id.clone(), vni: port.vni, mac: port.mac, address: port.address }
    }

    pub(crate) fn alias(&self) -> String {
        format!("godwit {} {} {}", self.vni, self.mac, self.address)
    }

    /// Reads a link's name and alias; `None` if it is no port of ours.
    pub(crate) fn read(name: &str, alias: &str) -> Option<Self> {
        let id = name.strip_prefix("gwp").filter(|_| is_ours(name))?;
        let mut words = alias.split(' ');
        if words.next()? != "godwit" {
            return None;
        }
        let vni = words.next()?.parse().ok()?;
        let mac = Mac::parse(words.next()?)?;
        let address = words.next()?.parse().ok()?;
        Some(Self { id: id.to_owned(), vni, mac, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alias_is_read_back() {
        let record = PortRecord {
            id: "0123456789ab".into(),
            vni: 16_777_215,
            mac: Mac([2, 0, 0, 0, 0, 0xff]),
            address: Ipv4Addr::new(10, 1, 2, 3),
        };
        assert_eq!(PortRecord::read("gwp0123456789ab", &record.alias()), Some(record));
        assert_eq!(PortRecord::read("gwp0123456789ab", "something else"), None);
    }

    #[test]
    fn only_our_names_are_ours() {
        for name in ["gwb1", "gwx16777215", "gwp0123456789ab", "gwt0123456789ab"] {
            assert!(is_ours(name), "{name}");
            assert!(name.len() <= 15, "{name}");
        }
        for name in ["gw0", "gwbridge", "gwp1", "gwb", "eth0", "gwpx", "gwp0123456789ag"] {
            assert!(!is_ours(name), "{name}");
        }
    }
}
