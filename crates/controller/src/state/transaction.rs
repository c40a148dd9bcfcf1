//! A change of several keys, in one piece.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use godwit_model::event::{Event, EventKind};
use godwit_model::migration::Move;
use godwit_model::{ContainerName, EnvName, HostName};
use godwit_store::{Compare, Op, Txn};
use serde::Serialize;

use super::records::*;
use super::{StateError, Versioned, World};

/// Collects compares and changes; errors wait until [`Tx::finish`].
#[derive(Debug, Default)]
pub struct Tx {
    compares: Vec<Compare>,
    ops: Vec<Op>,
    error: Option<StateError>,
}

/// Milliseconds since the epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

impl Tx {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Puts `value`; `old` is what it replaces, and must still be there (or still be absent).
    fn put<T: Serialize>(&mut self, key: String, old: Option<&Versioned<T>>, value: &T) {
        self.compares.push(match old {
            Some(old) => Compare::revision(key.clone(), old.revision),
            None => Compare::absent(key.clone()),
        });
        self.put_freely(key, value);
    }

    fn put_freely(&mut self, key: String, value: &impl Serialize) {
        match serde_json::to_vec(value) {
            Ok(bytes) => self.ops.push(Op::put(key, bytes)),
            Err(source) => self.error = Some(StateError::Encode { key, source: Arc::new(source) }),
        }
    }

    fn delete<T>(&mut self, key: String, old: &Versioned<T>) {
        self.compares.push(Compare::revision(key.clone(), old.revision));
        self.ops.push(Op::delete(key));
    }

    pub fn put_env(&mut self, old: Option<&Versioned<EnvRecord>>, value: &EnvRecord) {
        self.put(env_key(&value.manifest.name), old, value);
    }

    pub fn delete_env(&mut self, old: &Versioned<EnvRecord>) {
        self.delete(env_key(&old.manifest.name), old);
    }

    pub fn put_container(&mut self, old: Option<&Versioned<ContainerRecord>>, value: &ContainerRecord) {
        self.put(container_key(value.name()), old, value);
    }

    pub fn delete_container(&mut self, old: &Versioned<ContainerRecord>) {
        self.delete(container_key(old.name()), old);
    }

    pub fn put_host(&mut self, old: Option<&Versioned<HostRecord>>, value: &HostRecord) {
        self.put(host_key(&value.facts.name), old, value);
    }

    pub fn put_balance(&mut self, old: Option<&Versioned<BalanceRecord>>, value: &BalanceRecord) {
        self.put(BALANCE.to_owned(), old, value);
    }

    pub fn put_move(&mut self, old: Option<&Versioned<Move>>, value: &Move) {
        self.put(move_key(&value.id), old, value);
    }

    pub fn delete_move(&mut self, old: &Versioned<Move>) {
        self.delete(move_key(&old.id), old);
    }

    pub fn delete_event(&mut self, key: &str) {
        self.ops.push(Op::delete(key));
    }

    /// Numbers were given out: nobody else may have done so since this snapshot.
    pub fn allocate(&mut self, world: &World) {
        self.compares.push(match world.allocation {
            Some(revision) => Compare::revision(ALLOCATION, revision),
            None => Compare::absent(ALLOCATION),
        });
        self.put_freely(ALLOCATION.to_owned(), &world.revision);
    }

    pub fn event(&mut self, kind: EventKind, about: About<'_>, message: impl Into<String>) {
        let at_ms = now_ms();
        let event = Event {
            number: 0,
            at_ms,
            kind,
            env: about.container.map(|c| c.env.clone()).or_else(|| about.env.cloned()),
            container: about.container.cloned(),
            host: about.host.cloned(),
            message: message.into(),
        };
        let key = format!("{EVENT_PREFIX}{at_ms:015}-{:03}-{}", self.ops.len(), uuid::Uuid::new_v4().simple());
        self.put_freely(key, &event);
    }

    pub fn finish(mut self) -> Result<Txn, StateError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.ops.push(Op::put(TICK, Vec::new()));
        Ok(Txn { compares: self.compares, then: self.ops })
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy, Default)]
pub struct About<'a> {
    pub env: Option<&'a EnvName>,
    pub container: Option<&'a ContainerName>,
    pub host: Option<&'a HostName>,
}

impl<'a> About<'a> {
    pub fn env(env: &'a EnvName) -> Self {
        Self { env: Some(env), ..Self::default() }
    }

    pub fn host(host: &'a HostName) -> Self {
        Self { host: Some(host), ..Self::default() }
    }

    pub fn container(container: &'a ContainerName, host: Option<&'a HostName>) -> Self {
        Self { env: None, container: Some(container), host }
    }
}
