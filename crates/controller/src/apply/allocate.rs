//! Numbers that must be unique: environments' slots, user id ranges, addresses, hosts' indexes. The lowest free one is
//! given out, computed from everything that exists; [`crate::state::Tx::allocate`] keeps two from getting the same.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use godwit_model::container::ID_RANGE;

use super::check::ApplyError;
use crate::state::World;
use crate::state::records::{EnvRecord, MAX_ENVIRONMENTS, MAX_HOSTS};

/// The first container's root on the host: above what distributions give to people, on a multiple of the range.
const FIRST_ID_BASE: u32 = 1_000_000_u32.next_multiple_of(ID_RANGE);
/// The most containers of one installation: so many ranges end below 2³².
const MAX_ID_RANGES: u32 = (u32::MAX - FIRST_ID_BASE) / ID_RANGE;

/// Hands out user id ranges and addresses within one transaction.
pub struct Allocator {
    id_slots: BTreeSet<u32>,
    addresses: BTreeSet<Ipv4Addr>,
    /// Whether anything was handed out.
    pub used: bool,
}

impl Allocator {
    /// Knows what is in use in all of the installation, and in this environment's network.
    pub fn new(world: &World, env: &EnvRecord) -> Self {
        let id_slots = world.containers.values().map(|c| (c.spec.id_base - FIRST_ID_BASE) / ID_RANGE).collect();
        let addresses = world.containers_of(&env.manifest.name).map(|c| c.spec.network.address).collect();
        Self { id_slots, addresses, used: false }
    }

    pub fn id_base(&mut self) -> Result<u32, ApplyError> {
        let slot = lowest(&self.id_slots, MAX_ID_RANGES).ok_or(ApplyError::Exhausted { what: "user id ranges" })?;
        self.id_slots.insert(slot);
        self.used = true;
        Ok(FIRST_ID_BASE + slot * ID_RANGE)
    }

    pub fn address(&mut self, env: &EnvRecord) -> Result<Ipv4Addr, ApplyError> {
        let free = env.container_addresses().find(|a| !self.addresses.contains(a));
        let address = free.ok_or(ApplyError::Exhausted { what: "addresses of the environment" })?;
        self.addresses.insert(address);
        self.used = true;
        Ok(address)
    }
}

pub fn env_slot(world: &World) -> Result<u32, ApplyError> {
    let used = world.envs.values().map(|e| e.slot).collect();
    lowest(&used, MAX_ENVIRONMENTS).ok_or(ApplyError::Exhausted { what: "private networks" })
}

pub fn host_index(world: &World) -> Option<u32> {
    let used = world.hosts.values().map(|h| h.index).collect();
    lowest(&used, MAX_HOSTS)
}

fn lowest(used: &BTreeSet<u32>, end: u32) -> Option<u32> {
    (0..end).find(|n| !used.contains(n))
}
