//! What the store keeps, as JSON.
//!
//! | key | value |
//! |---|---|
//! | `/meta/store_id` | identity of the store, made once with it |
//! | `/meta/allocation` | changes with every number that is given out, so that two cannot give out the same |
//! | `/meta/balance` | [`BalanceRecord`]; absent while nobody has changed it |
//! | `/env/NAME` | [`EnvRecord`] |
//! | `/container/ENV/LAYER-NUMBER` | [`ContainerRecord`]: its key is its name, so a name exists once |
//! | `/host/NAME` | [`HostRecord`] |
//! | `/move/ID` | [`godwit_model::migration::Move`] |
//! | `/event/MILLISECONDS-ID` | [`godwit_model::event::Event`]; its number is the revision it was put at |
//! | `/tick` | last in every transaction: what carries the same revision is complete when it is seen |

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use godwit_api::types::BalanceMode;
use godwit_model::container::{ContainerSpec, Resources};
use godwit_model::host::{HostFacts, HostState};
use godwit_model::manifest::Manifest;
use godwit_model::{ContainerId, ContainerName, EnvName, Generation, HostName, MoveId};
use godwit_plan::{EvacuateOptions, Policy};
use serde::{Deserialize, Serialize};

pub const STORE_ID: &str = "/meta/store_id";
pub const ALLOCATION: &str = "/meta/allocation";
pub const BALANCE: &str = "/meta/balance";
pub const TICK: &str = "/tick";
pub const ENV_PREFIX: &str = "/env/";
pub const CONTAINER_PREFIX: &str = "/container/";
pub const HOST_PREFIX: &str = "/host/";
pub const MOVE_PREFIX: &str = "/move/";
pub const EVENT_PREFIX: &str = "/event/";

pub fn env_key(name: &EnvName) -> String {
    format!("{ENV_PREFIX}{name}")
}

pub fn container_key(name: &ContainerName) -> String {
    format!("{CONTAINER_PREFIX}{name}")
}

pub fn host_key(name: &HostName) -> String {
    format!("{HOST_PREFIX}{name}")
}

pub fn move_key(id: &MoveId) -> String {
    format!("{MOVE_PREFIX}{id}")
}

/// The first VXLAN network identifier that is given out.
const FIRST_VNI: u32 = 4_097;
/// Private networks are cut from 10.64.0.0/10, one /20 for each environment.
const FIRST_SUBNET: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 0);
pub const SUBNET_PREFIX_LEN: u8 = 20;
const SUBNET_ADDRESSES: u32 = 1 << (32 - SUBNET_PREFIX_LEN);
/// So many /20 networks are in a /10: the most environments at one time.
pub const MAX_ENVIRONMENTS: u32 = 1 << (SUBNET_PREFIX_LEN - 10);
/// The first container's distance from the gateway.
const FIRST_CONTAINER_OFFSET: u32 = 10;
/// The end of a network, with its broadcast address, is for the hosts themselves.
pub const MAX_HOSTS: u32 = 1_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvRecord {
    pub manifest: Manifest,
    /// Stands for the network identifier and the subnet; free again when the record is gone.
    pub slot: u32,
    /// Its containers are being removed; the record goes when the last one is gone.
    pub deleted: bool,
}

impl EnvRecord {
    pub fn vni(&self) -> u32 {
        FIRST_VNI + self.slot
    }

    pub fn subnet(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(FIRST_SUBNET.to_bits() + self.slot * SUBNET_ADDRESSES)
    }

    pub fn gateway(&self) -> Ipv4Addr {
        self.address_at(1)
    }

    /// A host's own address: from the end of the subnet downwards.
    pub fn host_address(&self, index: u32) -> Ipv4Addr {
        self.address_at(SUBNET_ADDRESSES - 2 - index)
    }

    /// All addresses for containers, in order.
    pub fn container_addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        (1 + FIRST_CONTAINER_OFFSET..SUBNET_ADDRESSES - 1 - MAX_HOSTS).map(|offset| self.address_at(offset))
    }

    fn address_at(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.subnet().to_bits() + offset)
    }
}

/// One container as it is wanted, and who owns it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub spec: ContainerSpec,
    /// The owner; `None` until a place is found.
    pub host: Option<HostName>,
    /// Grows with every hand-over.
    pub generation: Generation,
    /// `false`: a person stopped it.
    pub run: bool,
    pub start_count: u64,
    /// Set from the request for a move until its hand-over or failure.
    pub moving: Option<MoveId>,
    /// Where its volumes are, so that what replaces it finds them.
    pub volumes_on: Option<HostName>,
    /// Containers this one replaces that a host may still hold. They share its name, address and user ids, so it is
    /// placed only when they are gone.
    pub leaving: Vec<Leaving>,
    /// To be removed; the record goes when no host holds it any more.
    pub removed: bool,
    /// What it shall have instead of what its specification says, once its host has the room.
    #[serde(default)]
    pub growth: Option<Growth>,
}

/// Resources that were asked for and that a container does not have yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    pub resources: Resources,
    /// Milliseconds since the epoch.
    pub requested_at_ms: u64,
    /// Where it will have them by plan: nothing else gets that room. `None`: there is no plan.
    pub host: Option<HostName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    pub id: ContainerId,
    pub host: HostName,
}

impl ContainerRecord {
    pub fn name(&self) -> &ContainerName {
        &self.spec.name
    }

    /// The host that owns it now and shall keep it.
    pub fn owner(&self) -> Option<&HostName> {
        self.host.as_ref().filter(|_| !self.removed)
    }

    /// What it shall have: what was asked for last.
    pub fn wanted(&self) -> &Resources {
        self.growth.as_ref().map_or(&self.spec.resources, |growth| &growth.resources)
    }

    /// With other resources: at once where that takes nothing from anybody, else when there is room.
    pub fn resized(&self, resources: Resources, now_ms: u64) -> Self {
        let has = &self.spec.resources;
        let more = resources.reserved_memory > has.reserved_memory || resources.reserved_cpu > has.reserved_cpu;
        let mut record = self.clone();
        if more && self.owner().is_some() {
            record.growth = Some(Growth { resources, requested_at_ms: now_ms, host: None });
        } else {
            record.growth = None;
            record.spec.resources = resources;
        }
        record
    }

    /// Takes it off its host: what the host holds becomes something that leaves. Whatever it grows to, its next place
    /// has room for that.
    pub fn leave_host(&mut self) {
        if let Some(growth) = self.growth.take() {
            self.spec.resources = growth.resources;
        }
        if let Some(host) = self.host.take() {
            self.leaving.push(Leaving { id: self.spec.id.clone(), host });
        }
        self.moving = None;
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    pub facts: HostFacts,
    pub state: HostState,
    /// Its number, from which its address in every network follows.
    pub index: u32,
    /// The last one that was asked for, until the host is opened again.
    #[serde(default)]
    pub evacuation: Option<Evacuation>,
    /// Containers that are still to be moved here again.
    #[serde(default)]
    pub bring_back: Vec<ContainerName>,
    /// `None`: it has no lease, and nobody knows when it runs nothing any more.
    #[serde(default)]
    pub lease: Option<LeaseTerms>,
    /// Its state before it was lost, for when it comes back.
    #[serde(default)]
    pub before_failure: Option<HostState>,
    /// A person has said that it is dead.
    #[serde(default)]
    pub declared_dead: bool,
}

/// Whom a host asks when it has no controller: one of these two, by all that is known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeaseTerms {
    /// By its own last word.
    pub held: Vec<HostName>,
    /// By the last grant that may have reached it.
    pub offered: Vec<HostName>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evacuation {
    pub options: EvacuateOptions,
    /// Milliseconds since the epoch.
    pub requested_at_ms: u64,
    /// Containers that were there then.
    pub total: u32,
    /// What could not be moved away in the end, and why.
    pub stays: BTreeMap<ContainerName, Vec<String>>,
}

/// How containers are balanced over the hosts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BalanceRecord {
    pub mode: BalanceMode,
    pub policy: Policy,
    /// Moves for it at the same time.
    pub at_once: u32,
    /// Containers that are still to be moved because a person asked to carry out the advice; `None`: nobody did.
    #[serde(default)]
    pub once: Option<BTreeSet<ContainerName>>,
}

impl Default for BalanceRecord {
    fn default() -> Self {
        Self { mode: BalanceMode::default(), policy: Policy::default(), at_once: 2, once: None }
    }
}
