//! What a lab shall be: names, number of hosts, limits, addresses.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most hosts in one lab. Host addresses end in 11 to 26.
pub const MAX_HOSTS: u32 = 16;
/// Longest lab name in bytes; it becomes part of cgroup and directory names.
const MAX_NAME_BYTES: usize = 32;
/// Slowest link that the token bucket handles without stalling on one full frame.
const MIN_RATE_BITS_PER_SECOND: u64 = 64_000;

/// A lab description that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error(
        "lab name {0:?} is not usable: 1 to {MAX_NAME_BYTES} of a-z, 0-9 and '-', beginning with a letter or digit"
    )]
    Name(String),
    #[error("a lab has 1 to {MAX_HOSTS} hosts, not {0}")]
    Hosts(u32),
    #[error("{0:?} is no host of a lab: h1, h2, …, ctl or client")]
    Node(String),
    #[error(
        "link rate {0:?} is not usable: a number and one of bit, kbit, mbit, gbit, from 64kbit up, for example 10gbit"
    )]
    Rate(String),
    #[error("a lab host needs at least {least} bytes of memory, not {given}")]
    Memory { least: u64, given: u64 },
    #[error("{hosts} hosts cannot be in {zones} zones; give 1 to {hosts}")]
    Zones { zones: u32, hosts: u32 },
    #[error("a lab host needs at least 10 thousandths of a CPU, not {0}")]
    Cpus(u32),
}

/// The checked name of a lab.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    pub fn new(name: impl Into<String>) -> Result<Self, SpecError> {
        let name = name.into();
        let first_ok = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let all_ok = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if first_ok && all_ok && name.len() <= MAX_NAME_BYTES { Ok(Self(name)) } else { Err(SpecError::Name(name)) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for LabName {
    type Err = SpecError;
    fn from_str(s: &str) -> Result<Self, SpecError> {
        Self::new(s)
    }
}

impl TryFrom<String> for LabName {
    type Error = SpecError;
    fn try_from(s: String) -> Result<Self, SpecError> {
        Self::new(s)
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> String {
        name.0
    }
}

/// A link rate in bits per second, of whole Ethernet frames as the token bucket counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BitsPerSecond(u64);

impl BitsPerSecond {
    pub fn new(bits: u64) -> Result<Self, SpecError> {
        if bits >= MIN_RATE_BITS_PER_SECOND { Ok(Self(bits)) } else { Err(SpecError::Rate(format!("{bits}bit"))) }
    }

    pub fn get(self) -> u64 {
        self.0
    }

    pub fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }
}

impl FromStr for BitsPerSecond {
    type Err = SpecError;

    /// Reads `10gbit`, `100mbit`, `64kbit`, `1000000bit` (powers of ten, as `tc` counts).
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let wrong = || SpecError::Rate(text.to_owned());
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = lower.split_at(digits);
        let factor: u64 = match unit {
            "bit" => 1,
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).ok_or_else(wrong).and_then(|bits| Self::new(bits).map_err(|_| wrong()))
    }
}

impl fmt::Display for BitsPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b if b % 1_000_000_000 == 0 => write!(f, "{}gbit", b / 1_000_000_000),
            b if b % 1_000_000 == 0 => write!(f, "{}mbit", b / 1_000_000),
            b if b % 1_000 == 0 => write!(f, "{}kbit", b / 1_000),
            b => write!(f, "{b}bit"),
        }
    }
}

/// A member of a lab: a host with an agent, or one of the two others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// Where the controller runs.
    Controller,
    /// Where test clients run.
    Client,
    /// `h1`, `h2`, …
    Host(u32),
}

impl Node {
    /// The underlay prefix length. All labs use the same range: nothing leads out of a lab.
    pub const PREFIX_LENGTH: u8 = 24;

    /// The underlay address.
    pub fn address(self) -> Ipv4Addr {
        let last = match self {
            Node::Controller => 2,
            Node::Client => 3,
            Node::Host(number) => 10 + number.min(MAX_HOSTS) as u8,
        };
        Ipv4Addr::new(192, 168, 77, last)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Node::Controller => f.write_str("ctl"),
            Node::Client => f.write_str("client"),
            Node::Host(number) => write!(f, "h{number}"),
        }
    }
}

impl FromStr for Node {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text {
            "ctl" => Ok(Node::Controller),
            "client" => Ok(Node::Client),
            _ => text
                .strip_prefix('h')
                .filter(|digits| !digits.starts_with(['0', '+']))
                .and_then(|digits| digits.parse().ok())
                .filter(|number| (1..=MAX_HOSTS).contains(number))
                .map(Node::Host)
                .ok_or_else(|| SpecError::Node(text.to_owned())),
        }
    }
}

/// What a lab shall be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabSpec {
    pub name: LabName,
    /// 1 to [`MAX_HOSTS`].
    pub hosts: u32,
    /// Memory limit of each host's cgroup subtree, agent and containers together.
    pub memory_bytes: Option<u64>,
    /// CPU limit of each host's cgroup subtree in thousandths of a CPU.
    pub cpus_milli: Option<u32>,
    /// Rate of each link, in each direction. None: as fast as the machine is.
    pub link: Option<BitsPerSecond>,
    /// In how many zones the hosts are: h1 has the label `zone=z1`, h2 `zone=z2`, and after the last one again z1.
    #[serde(default)]
    pub zones: Option<u32>,
    /// The `godwit` binary that controller and agents run.
    pub binary: PathBuf,
    /// Arguments added at the end of the controller's command line.
    pub controller_args: Vec<String>,
    /// Arguments added at the end of each agent's command line.
    pub agent_args: Vec<String>,
    /// False: hosts and links only, no controller and no agents.
    pub start_daemons: bool,
    /// Daemons stand still at named points of a move where a test wants that (`godwit-hold`), each with a directory of
    /// its own.
    #[serde(default)]
    pub hold_points: bool,
}

impl LabSpec {
    /// A lab without limits whose hosts run `binary`.
    pub fn new(name: LabName, hosts: u32, binary: impl Into<PathBuf>) -> Self {
        Self {
            name,
            hosts,
            memory_bytes: None,
            cpus_milli: None,
            link: None,
            zones: None,
            binary: binary.into(),
            controller_args: Vec::new(),
            agent_args: Vec::new(),
            start_daemons: true,
            hold_points: false,
        }
    }

    pub(crate) fn check(&self) -> Result<(), SpecError> {
        const LEAST_MEMORY_BYTES: u64 = 64 << 20;
        if !(1..=MAX_HOSTS).contains(&self.hosts) {
            return Err(SpecError::Hosts(self.hosts));
        }
        if let Some(zones) = self.zones.filter(|zones| !(1..=self.hosts).contains(zones)) {
            return Err(SpecError::Zones { zones, hosts: self.hosts });
        }
        if let Some(given) = self.memory_bytes.filter(|&m| m < LEAST_MEMORY_BYTES) {
            return Err(SpecError::Memory { least: LEAST_MEMORY_BYTES, given });
        }
        if let Some(given) = self.cpus_milli.filter(|&c| c < 10) {
            return Err(SpecError::Cpus(given));
        }
        Ok(())
    }

    /// The zone of a host; `None`: it has none.
    pub(crate) fn zone(&self, host: u32) -> Option<String> {
        self.zones.map(|zones| format!("z{}", (host.max(1) - 1) % zones.max(1) + 1))
    }

    /// The hosts with an agent, in order.
    pub fn host_nodes(&self) -> impl Iterator<Item = Node> + use<> {
        (1..=self.hosts).map(Node::Host)
    }

    /// Every member: controller, client, hosts.
    pub fn nodes(&self) -> impl Iterator<Item = Node> + use<> {
        [Node::Controller, Node::Client].into_iter().chain(self.host_nodes())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_empty_zones() {
        let spec = LabSpec::new(LabName::new("demo").unwrap(), 3, "/bin/true");
        for (zones, fits) in [(None, true), (Some(0), false), (Some(1), true), (Some(3), true), (Some(4), false)] {
            assert_eq!(LabSpec { zones, ..spec.clone() }.check().is_ok(), fits, "{zones:?}");
        }
    }

    #[test]
    fn names_rates_and_nodes_are_checked() {
        for bad in ["", "A", "-a", "a/b", "..", "a_b", "ä", &"x".repeat(33)] {
            assert!(LabName::new(bad).is_err(), "{bad}");
        }
        assert!(LabName::new("demo-1").is_ok());
        for (text, bits) in [("10gbit", 10_000_000_000), ("100Mbit", 100_000_000), ("64kbit", 64_000)] {
            let rate: BitsPerSecond = text.parse().unwrap();
            assert_eq!(rate.get(), bits);
            assert_eq!(rate.to_string(), text.to_ascii_lowercase());
        }
        for bad in ["", "10", "gbit", "1bit", "-1gbit", "99999999999gbit", "1.5gbit"] {
            assert!(bad.parse::<BitsPerSecond>().is_err(), "{bad}");
        }
        for node in [Node::Controller, Node::Client, Node::Host(1), Node::Host(16)] {
            assert_eq!(node.to_string().parse::<Node>().unwrap(), node);
        }
        for bad in ["h0", "h17", "h01", "h+1", "h", "x", "H1"] {
            assert!(bad.parse::<Node>().is_err(), "{bad}");
        }
    }
}
