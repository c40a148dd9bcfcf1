//! The fleet: every host and every container, kept up to date change by change.
//!
//! ```text
//! Host, Container (what is told) ─▶ tables: names as numbers, counts of who is where
//!                                └▶ index: hosts in the order in which they are wanted
//! ```
//! A fleet states facts and refuses none: what is on a host is there, whether a rule likes it or not. Decisions never
//! change it; they work on a draft laid over it.

mod host;
mod index;
mod machine;
mod read;
mod tables;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_model::{ContainerName, HostName};
use thiserror::Error;

pub use host::{CPU_OVERCOMMIT, Container, DEFAULT_LINK, Host, ZONE_LABEL};
pub(crate) use index::{Index, Key};
pub use machine::{Machine, NO_CRIU};
pub(crate) use tables::{Count, LooseTies, Tables, Ties, is_spread, lower, raise};

macro_rules! number {
    ($($name:ident),*) => {$(
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name(u32);

        impl $name {
            pub fn of(at: usize) -> Self {
                Self(at as u32)
            }

            pub fn at(self) -> usize {
                self.0 as usize
            }
        }
    )*};
}

number!(HostId, MemberId, EnvId, LayerId, GroupId, ImageId, ZoneId);

/// A kind of machine; there is no list of them, so nothing is found by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MachineId(usize);

/// What was said of something that the fleet does not have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FleetError {
    #[error("there is no host {0}")]
    NoSuchHost(HostName),
    #[error("there is no container {0}")]
    NoSuchContainer(ContainerName),
    #[error("{container} is not on {host}")]
    NotThere { container: ContainerName, host: HostName },
    #[error("{host} still has {containers} containers; take them away first")]
    HostHasContainers { host: HostName, containers: usize },
}

/// What is on a host, and what of it is taken.
#[derive(Debug, Clone, Default)]
pub(crate) struct Occupied {
    pub members: Vec<MemberId>,
    /// Bytes.
    pub memory: u64,
    /// Thousandths of a core.
    pub cpu: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct HostSlot {
    pub host: Host,
    pub name: Arc<HostName>,
    pub zone: ZoneId,
    pub machine: MachineId,
    pub occupied: Occupied,
    pub images: Count<ImageId>,
    /// Its place in the index; `None`: it takes nothing.
    key: Option<Key>,
}

/// A container with its places.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub container: Container,
    pub ties: Ties,
    pub home: Option<HostId>,
    /// Further hosts on which room is held for it: where it is moving to, or is not gone from yet.
    pub also: Vec<HostId>,
}

impl Member {
    pub fn is_on(&self, host: HostId) -> bool {
        self.home == Some(host) || self.also.contains(&host)
    }
}

/// Every host and every container. See the module for what it promises.
///
/// Names of environments, layers, groups and images are kept for good, some hundred bytes each, so that their numbers
/// never change: whoever lives for years makes a new fleet from its records now and then.
#[derive(Debug, Clone, Default)]
pub struct Fleet {
    pub(crate) hosts: Vec<Option<HostSlot>>,
    pub(crate) host_ids: BTreeMap<HostName, HostId>,
    pub(crate) members: Vec<Option<Member>>,
    pub(crate) member_ids: BTreeMap<ContainerName, MemberId>,
    free_hosts: Vec<HostId>,
    free_members: Vec<MemberId>,
    pub(crate) tables: Tables,
    pub(crate) index: Index,
    /// Hosts by label and value.
    pub(crate) labelled: BTreeMap<String, BTreeMap<String, BTreeSet<HostId>>>,
    /// Memory of the hosts that take containers, in bytes; how many have how much.
    sizes: Count<u64>,
    size_sum: u128,
    reserve_permille: u64,
}

impl Occupied {
    pub fn add(&mut self, id: MemberId, container: &Container) {
        self.members.push(id);
        self.memory = self.memory.saturating_add(container.reserved_memory.0);
        self.cpu += u64::from(container.reserved_cpu.0);
    }

    pub fn remove(&mut self, id: MemberId, container: &Container) {
        if let Some(at) = self.members.iter().position(|m| *m == id) {
            self.members.swap_remove(at);
            self.memory = self.memory.saturating_sub(container.reserved_memory.0);
            self.cpu = self.cpu.saturating_sub(u64::from(container.reserved_cpu.0));
        }
    }
}
