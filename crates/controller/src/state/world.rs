//! Everything the store holds, decoded, at one revision.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use godwit_model::event::Event;
use godwit_model::migration::Move;
use godwit_model::{ContainerId, ContainerName, EnvName, HostName, MoveId};
use godwit_store::{Change, Entry, Listing, Revision, WatchEvent};
use serde::de::DeserializeOwned;

use super::StateError;
use super::records::*;

/// A value and the revision that a change of it has to name.
#[derive(Debug, PartialEq)]
pub struct Versioned<T> {
    pub value: T,
    pub revision: Revision,
}

impl<T> std::ops::Deref for Versioned<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

pub type Shared<T> = Arc<Versioned<T>>;

/// A snapshot. Cloning it copies pointers only.
#[derive(Debug, Clone, Default)]
pub struct World {
    pub revision: Revision,
    pub store_id: String,
    /// Revision of the allocation key; `None` before the first allocation.
    pub allocation: Option<Revision>,
    /// `None` while nobody has changed it.
    pub balance: Option<Shared<BalanceRecord>>,
    pub envs: BTreeMap<EnvName, Shared<EnvRecord>>,
    pub containers: BTreeMap<ContainerName, Shared<ContainerRecord>>,
    pub hosts: BTreeMap<HostName, Shared<HostRecord>>,
    pub moves: BTreeMap<MoveId, Shared<Move>>,
    /// Oldest first, with their keys.
    pub events: VecDeque<(Arc<str>, Arc<Event>)>,
}

impl World {
    pub fn from_listing(listing: Listing) -> Result<Self, StateError> {
        let mut world = Self::default();
        let mut events = Vec::new();
        for entry in listing.entries {
            if entry.key.starts_with(EVENT_PREFIX) {
                events.push(event(entry)?);
            } else {
                world.put(entry)?;
            }
        }
        events.sort_by(|a, b| (a.1.number, &a.0).cmp(&(b.1.number, &b.0)));
        world.events = events.into();
        world.revision = listing.revision;
        Ok(world)
    }

    pub fn apply(&mut self, change: WatchEvent) -> Result<(), StateError> {
        match change.change {
            Change::Put(entry) if entry.key.starts_with(EVENT_PREFIX) => self.events.push_back(event(entry)?),
            Change::Put(entry) => self.put(entry)?,
            Change::Delete { key, .. } => self.delete(&key),
        }
        Ok(())
    }

    fn put(&mut self, entry: Entry) -> Result<(), StateError> {
        let key = entry.key.as_str();
        if let Some(name) = key.strip_prefix(ENV_PREFIX).and_then(|n| n.parse().ok()) {
            self.envs.insert(name, decode(&entry)?);
        } else if let Some(name) = key.strip_prefix(CONTAINER_PREFIX).and_then(|n| n.parse().ok()) {
            self.containers.insert(name, decode(&entry)?);
        } else if let Some(name) = key.strip_prefix(HOST_PREFIX).and_then(|n| n.parse().ok()) {
            self.hosts.insert(name, decode(&entry)?);
        } else if let Some(id) = key.strip_prefix(MOVE_PREFIX).and_then(|n| n.parse().ok()) {
            self.moves.insert(id, decode(&entry)?);
        } else if key == STORE_ID {
            self.store_id = decode::<String>(&entry)?.value.clone();
        } else if key == BALANCE {
            self.balance = Some(decode(&entry)?);
        } else if key == ALLOCATION {
            self.allocation = Some(entry.mod_revision);
        }
        Ok(())
    }

    fn delete(&mut self, key: &str) {
        if let Some(name) = key.strip_prefix(ENV_PREFIX).and_then(|n| n.parse::<EnvName>().ok()) {
            self.envs.remove(&name);
        } else if let Some(name) = key.strip_prefix(CONTAINER_PREFIX).and_then(|n| n.parse::<ContainerName>().ok()) {
            self.containers.remove(&name);
        } else if let Some(name) = key.strip_prefix(HOST_PREFIX).and_then(|n| n.parse::<HostName>().ok()) {
            self.hosts.remove(&name);
        } else if let Some(id) = key.strip_prefix(MOVE_PREFIX).and_then(|n| n.parse::<MoveId>().ok()) {
            self.moves.remove(&id);
        } else if key.starts_with(EVENT_PREFIX)
            && let Some(at) = self.events.iter().position(|(k, _)| **k == *key)
        {
            self.events.remove(at);
        }
    }

    /// The container with this id, unless it has been replaced.
    pub fn container_by_id(&self, id: &ContainerId) -> Option<&Shared<ContainerRecord>> {
        self.containers.values().find(|c| c.spec.id == *id)
    }

    /// The containers of one environment, in order of their names.
    pub fn containers_of<'a>(&'a self, env: &'a EnvName) -> impl Iterator<Item = &'a Shared<ContainerRecord>> {
        self.containers.values().filter(move |c| c.name().env == *env)
    }

    /// Moves that are not over.
    pub fn open_moves(&self) -> impl Iterator<Item = &Shared<Move>> {
        self.moves.values().filter(|m| !m.outcome.over())
    }
}

fn decode<T: DeserializeOwned>(entry: &Entry) -> Result<Shared<T>, StateError> {
    let value = serde_json::from_slice(&entry.value)
        .map_err(|source| StateError::Decode { key: entry.key.clone(), source: Arc::new(source) })?;
    Ok(Arc::new(Versioned { value, revision: entry.mod_revision }))
}

fn event(entry: Entry) -> Result<(Arc<str>, Arc<Event>), StateError> {
    let mut event: Event = serde_json::from_slice(&entry.value)
        .map_err(|source| StateError::Decode { key: entry.key.clone(), source: Arc::new(source) })?;
    event.number = entry.mod_revision.0;
    Ok((entry.key.into(), Arc::new(event)))
}
