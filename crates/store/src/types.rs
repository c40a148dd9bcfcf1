//! The values that go in and out of a store, and their bounds.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{CommitError, ReadError};

/// Longest key or prefix, in bytes of UTF-8.
pub const MAX_KEY_BYTES: usize = 512;
/// Longest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;
/// Most compares, and most operations, in one transaction. etcd's default (`--max-txn-ops`), so that
/// what works on the embedded store works there.
pub const MAX_TXN_OPS: usize = 128;
/// Most bytes of keys and values in one transaction: etcd's default request limit (`--max-request-bytes`).
pub const MAX_TXN_BYTES: usize = 1536 * 1024;
/// Most entries that one listing returns.
pub const MAX_LIST_ENTRIES: usize = 100_000;
/// Shortest time to live of a lease, in milliseconds.
pub const MIN_LEASE_TTL_MS: u64 = 100;
/// Longest time to live of a lease, in milliseconds (one day).
pub const MAX_LEASE_TTL_MS: u64 = 24 * 60 * 60 * 1000;

/// Number of a commit that changed something. An empty store is at 0, its first change makes 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision after this one: where a watch continues a listing.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a lease. Never reused within one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key with its value and its place in history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    /// Revision that created the key (again, after a delete).
    pub create_revision: Revision,
    /// Revision of the latest put.
    pub mod_revision: Revision,
    /// Puts since the creation, counted from 1.
    pub version: u64,
    /// The lease that keeps the key alive, if any.
    pub lease: Option<LeaseId>,
}

/// All entries below a prefix at one revision, ordered by the bytes of the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    pub entries: Vec<Entry>,
    /// The store's revision when the entries were read; watch from its successor.
    pub revision: Revision,
}

/// What a transaction demands of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// The key exists and was last put at this revision.
    ModRevision(Revision),
    /// The key does not exist.
    Absent,
    /// The key exists.
    Exists,
}

/// A key and what is demanded of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    pub key: String,
    pub condition: Condition,
}

impl Compare {
    /// Holds when `key` was last put at `revision`.
    pub fn revision(key: impl Into<String>, revision: Revision) -> Self {
        Self { key: key.into(), condition: Condition::ModRevision(revision) }
    }

    /// Holds when `key` does not exist.
    pub fn absent(key: impl Into<String>) -> Self {
        Self { key: key.into(), condition: Condition::Absent }
    }

    /// Holds when `key` exists.
    pub fn exists(key: impl Into<String>) -> Self {
        Self { key: key.into(), condition: Condition::Exists }
    }
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets the key. Without a lease an earlier attachment to one ends.
    Put { key: String, value: Vec<u8>, lease: Option<LeaseId> },
    /// Removes the key; nothing happens if it is not there.
    Delete { key: String },
    /// Removes every key that starts with the prefix.
    DeletePrefix { prefix: String },
}

impl Op {
    /// A put without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// A put that lives as long as `lease`.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Vec<u8>>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// A delete of one key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// A delete of every key below `prefix`.
    pub fn delete_prefix(prefix: impl Into<String>) -> Self {
        Self::DeletePrefix { prefix: prefix.into() }
    }
}

/// If every compare holds, all of `then` happens in one revision; else nothing happens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub then: Vec<Op>,
}

impl Txn {
    /// A transaction without conditions.
    pub fn new(then: Vec<Op>) -> Self {
        Self { compares: Vec::new(), then }
    }

    /// The same transaction, only if `compare` holds too.
    #[must_use]
    pub fn only_if(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Checks the bounds, and that no key is changed twice (what would happen then is not obvious, and
    /// etcd refuses it too).
    pub(crate) fn check(&self) -> Result<(), CommitError> {
        for (what, count) in [("compares", self.compares.len()), ("operations", self.then.len())] {
            if count > MAX_TXN_OPS {
                return Err(CommitError::TooManyOps { what, count });
            }
        }
        let mut bytes = 0;
        for compare in &self.compares {
            check_key(&compare.key)?;
            bytes += compare.key.len();
        }
        for op in &self.then {
            bytes += match op {
                Op::Put { key, value, .. } => {
                    check_key(key)?;
                    if value.len() > MAX_VALUE_BYTES {
                        return Err(CommitError::ValueTooLong { key: key.clone(), bytes: value.len() });
                    }
                    key.len() + value.len()
                }
                Op::Delete { key } => {
                    check_key(key)?;
                    key.len()
                }
                Op::DeletePrefix { prefix } => {
                    if prefix.len() > MAX_KEY_BYTES {
                        return Err(CommitError::KeyLength { bytes: prefix.len() });
                    }
                    prefix.len()
                }
            };
        }
        if bytes > MAX_TXN_BYTES {
            return Err(CommitError::TooManyBytes { bytes });
        }
        self.check_overlap()
    }

    fn check_overlap(&self) -> Result<(), CommitError> {
        let mut keys: Vec<&str> = Vec::with_capacity(self.then.len());
        let mut prefixes: Vec<&str> = Vec::new();
        for op in &self.then {
            match op {
                Op::Put { key, .. } | Op::Delete { key } => keys.push(key),
                Op::DeletePrefix { prefix } => prefixes.push(prefix),
            }
        }
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(CommitError::ChangedTwice { key: pair[0].to_owned() });
        }
        for (at, prefix) in prefixes.iter().enumerate() {
            let other = prefixes.iter().enumerate().any(|(o, p)| o != at && p.starts_with(prefix));
            if let Some(key) = keys.iter().find(|key| key.starts_with(prefix)) {
                return Err(CommitError::ChangedTwice { key: (*key).to_owned() });
            }
            if other {
                return Err(CommitError::ChangedTwice { key: (*prefix).to_owned() });
            }
        }
        Ok(())
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a conflict means that nothing happened"]
pub enum Commit {
    /// Durable. `revision` is the store's revision afterwards; a transaction that changed nothing
    /// (only compares, or deletes of absent keys) does not advance it.
    Committed { revision: Revision },
    /// A compare did not hold, nothing happened.
    Conflict(Conflict),
}

impl Commit {
    /// The revision, or the conflict as an error.
    pub fn committed(self) -> Result<Revision, Conflict> {
        match self {
            Self::Committed { revision } => Ok(revision),
            Self::Conflict(conflict) => Err(conflict),
        }
    }
}

/// The first compare that did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Its place in [`Txn::compares`].
    pub index: usize,
    pub compare: Compare,
    /// The key's revision; `None` if it does not exist.
    pub actual: Option<Revision>,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {:?} ", self.compare.key)?;
        match self.compare.condition {
            Condition::ModRevision(revision) => write!(f, "was expected at revision {revision} and ")?,
            Condition::Absent => f.write_str("was expected to be absent and ")?,
            Condition::Exists => f.write_str("was expected to exist and ")?,
        }
        match self.actual {
            Some(revision) => write!(f, "is at revision {revision}; read it again and decide anew"),
            None => f.write_str("does not exist; read it again and decide anew"),
        }
    }
}

impl std::error::Error for Conflict {}

/// One change of one key, as a watch reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    pub revision: Revision,
    pub change: Change,
}

impl WatchEvent {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match &self.change {
            Change::Put(entry) => &entry.key,
            Change::Delete { key, .. } => key,
        }
    }
}

/// What happened to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put(Entry),
    /// The key is gone; `prev_revision` was its last put.
    Delete {
        key: String,
        prev_revision: Revision,
    },
}

/// A key must be 1 to [`MAX_KEY_BYTES`] long.
pub(crate) fn check_key(key: &str) -> Result<(), CommitError> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(CommitError::KeyLength { bytes: key.len() });
    }
    Ok(())
}

/// A prefix may be empty (everything).
pub(crate) fn check_read_key(key: &str) -> Result<(), ReadError> {
    if key.len() > MAX_KEY_BYTES {
        return Err(ReadError::KeyLength { bytes: key.len() });
    }
    Ok(())
}
