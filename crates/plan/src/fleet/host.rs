//! A host and a container as decisions see them.

use std::collections::{BTreeMap, BTreeSet};

use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::units::BitRate;
use godwit_model::{Bytes, ContainerName, HostName, LayerName, MilliCpu};
use serde::{Deserialize, Serialize};

use super::machine::Machine;

/// How often the CPU of a host may be reserved: reservations of CPU are shares, and an idle share is everyone's.
/// Memory is never overcommitted.
pub const CPU_OVERCOMMIT: u32 = 4;

/// The label that says in which zone (room, rack, data centre) a host is.
pub const ZONE_LABEL: &str = "zone";

/// The rate counted with where a host's link is not known.
pub const DEFAULT_LINK: BitRate = BitRate(1_000_000_000);

/// A host as decisions see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    pub name: HostName,
    #[serde(default)]
    pub state: HostState,
    pub connected: bool,
    pub memory: Bytes,
    pub cpu: MilliCpu,
    /// The label `zone` names its zone.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub machine: Machine,
    /// CPU in use as measured, in thousandths of what the host has.
    #[serde(default)]
    pub cpu_load_permille: u16,
    /// Memory in use as measured, in thousandths of what the host has.
    #[serde(default)]
    pub memory_load_permille: u16,
    /// Since when the measured load has been above the threshold of balancing, in milliseconds of the caller's clock.
    #[serde(default)]
    pub overloaded_since_ms: Option<u64>,
    /// What of its link moves may use; `None`: not known, [`DEFAULT_LINK`] is counted with.
    #[serde(default)]
    pub link_free: Option<BitRate>,
    /// Images it has beside those of its containers.
    #[serde(default)]
    pub images: BTreeSet<String>,
}

impl Host {
    /// An active, connected host with no labels and no load.
    pub fn new(name: HostName, memory: Bytes, cpu: MilliCpu) -> Self {
        Self {
            name,
            state: HostState::Active,
            connected: true,
            memory,
            cpu,
            labels: BTreeMap::new(),
            machine: Machine::default(),
            cpu_load_permille: 0,
            memory_load_permille: 0,
            overloaded_since_ms: None,
            link_free: None,
            images: BTreeSet::new(),
        }
    }

    /// CPU that may be reserved in all, in thousandths of a core.
    pub fn cpu_capacity(&self) -> u64 {
        u64::from(self.cpu.0) * u64::from(CPU_OVERCOMMIT)
    }

    pub fn zone(&self) -> Option<&str> {
        self.labels.get(ZONE_LABEL).map(String::as_str)
    }
}

/// A container as decisions see it, wherever it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    pub name: ContainerName,
    pub reserved_memory: Bytes,
    pub reserved_cpu: MilliCpu,
    /// CPU in use as measured.
    #[serde(default)]
    pub used_cpu: MilliCpu,
    /// Memory in use as measured.
    #[serde(default)]
    pub used_memory: Bytes,
    #[serde(default)]
    pub spread: Spread,
    /// The most containers of its layer on one host; `Spread::Strict` is one, whatever is said here.
    #[serde(default)]
    pub max_per_host: Option<u32>,
    /// Names of groups of which a host holds one member at most, across layers and environments.
    #[serde(default)]
    pub apart: BTreeSet<String>,
    /// Layers of its environment of which a container must be on its host.
    #[serde(default)]
    pub near: BTreeSet<LayerName>,
    /// Labels its host must have.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub image: String,
    /// Where its local volumes are. A new start must be there; a live move takes them along.
    #[serde(default)]
    pub volumes_on: Option<HostName>,
    /// Whether its volumes may be made anew, empty, where the host that had them is lost.
    #[serde(default)]
    pub may_recreate_volumes: bool,
    /// Why it cannot move live, as sentences; empty: it can.
    #[serde(default)]
    pub unmovable: Vec<String>,
    /// Weight of a moment of its downtime, and what is restarted first after a failure; 1 is the usual.
    #[serde(default = "one")]
    pub importance: u32,
    /// What a move has to send: memory and files.
    #[serde(default)]
    pub bytes: Bytes,
    /// How long a move is expected to hold it still.
    #[serde(default)]
    pub downtime_ms: u64,
    /// When it was last moved, in milliseconds of the caller's clock.
    #[serde(default)]
    pub last_moved_ms: Option<u64>,
}

fn one() -> u32 {
    1
}

impl Container {
    /// A movable container without rules beyond `spread`.
    pub fn new(name: ContainerName, memory: Bytes, cpu: MilliCpu, spread: Spread) -> Self {
        Self {
            name,
            reserved_memory: memory,
            reserved_cpu: cpu,
            used_cpu: MilliCpu(0),
            used_memory: Bytes(0),
            spread,
            max_per_host: None,
            apart: BTreeSet::new(),
            near: BTreeSet::new(),
            labels: BTreeMap::new(),
            image: String::new(),
            volumes_on: None,
            may_recreate_volumes: false,
            unmovable: Vec::new(),
            importance: 1,
            bytes: memory,
            downtime_ms: 0,
            last_moved_ms: None,
        }
    }

    /// The most containers of its layer on one host.
    pub fn most_per_host(&self) -> Option<u32> {
        match self.spread {
            Spread::Strict => Some(1),
            Spread::Preferred | Spread::None => self.max_per_host,
        }
    }

    /// What a move of it costs, in the unit in which plans are compared: milliseconds of downtime times importance,
    /// and one for each started mebibyte.
    pub fn move_cost(&self) -> u64 {
        let mebibytes = self.bytes.0.div_ceil(1 << 20);
        self.downtime_ms.saturating_mul(u64::from(self.importance)).saturating_add(mebibytes)
    }
}
