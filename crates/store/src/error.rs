//! One error type per operation, and the fault of the storage below that all of them share.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::types::{
    Conflict, LeaseId, MAX_KEY_BYTES, MAX_LEASE_TTL_MS, MAX_LIST_ENTRIES, MAX_TXN_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES,
    MIN_LEASE_TTL_MS, Revision,
};

/// The storage below the store did not do what it was asked to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreFault {
    #[error(
        "no space left for the state file {path}; nothing was changed: free space on its file system, then try again"
    )]
    Full { path: PathBuf },
    #[error(
        "the state file {path} cannot be written, its file system is read-only; nothing was changed: make it writable and restart"
    )]
    ReadOnly { path: PathBuf },
    #[error("the state file {path} is damaged; stop, keep a copy and restore a backup")]
    Damaged { path: PathBuf, source: Arc<dyn Error + Send + Sync> },
    #[error("writing the state file {path} failed; nothing was changed")]
    Failed { path: PathBuf, source: Arc<dyn Error + Send + Sync> },
    /// After a failed fsync nobody knows what is on the disk, and a second fsync may lie.
    #[error(
        "the disk did not confirm a write to the state file {path}, so it is unknown whether the latest changes are there; restart to see what is"
    )]
    Unconfirmed { path: PathBuf },
    #[error("the store is closed")]
    Closed,
}

/// Opening a state file.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot create the directory {path} for the state file")]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot use the lock file {path}")]
    LockFile { path: PathBuf, source: io::Error },
    #[error("the state file {path} is in use by process {pid}; stop that process or choose another state directory")]
    InUse { path: PathBuf, pid: String },
    #[error("cannot open the state file {path}")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("cannot create the state file {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("{path} is not a state file of this program; choose another path")]
    Foreign { path: PathBuf },
    #[error(
        "the state file {path} has schema version {found}, this program knows up to {known}; use the newer program that wrote it"
    )]
    TooNew { path: PathBuf, found: i64, known: i64 },
    #[error("cannot start a thread for the state file {path}")]
    Thread { path: PathBuf, source: io::Error },
}

/// Reading keys.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    #[error("a key of {bytes} bytes is too long; at most {MAX_KEY_BYTES} are allowed")]
    KeyLength { bytes: usize },
    #[error("more than {MAX_LIST_ENTRIES} keys start with {prefix:?}; list a longer prefix")]
    TooManyEntries { prefix: String },
    #[error("cannot read the state")]
    Fault(#[from] StoreFault),
}

/// Committing a transaction.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    #[error("a key of {bytes} bytes was given; 1 to {MAX_KEY_BYTES} are allowed")]
    KeyLength { bytes: usize },
    #[error("the value of key {key:?} has {bytes} bytes; at most {MAX_VALUE_BYTES} are allowed")]
    ValueTooLong { key: String, bytes: usize },
    #[error("a transaction has {count} {what}; at most {MAX_TXN_OPS} are allowed: split it")]
    TooManyOps { what: &'static str, count: usize },
    #[error("a transaction has {bytes} bytes of keys and values; at most {MAX_TXN_BYTES} are allowed: split it")]
    TooManyBytes { bytes: usize },
    #[error("a transaction changes {key:?} twice; which change should win is not defined")]
    ChangedTwice { key: String },
    #[error("key {key:?} was to be attached to lease {lease}, which has expired or never existed; grant a new lease")]
    NoSuchLease { key: String, lease: LeaseId },
    #[error("cannot commit")]
    Fault(#[from] StoreFault),
}

/// Watching a prefix.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WatchError {
    #[error("a prefix of {bytes} bytes is too long; at most {MAX_KEY_BYTES} are allowed")]
    KeyLength { bytes: usize },
    #[error(
        "history from revision {from} is gone, it begins at {oldest}; list again and watch from the listing's revision + 1"
    )]
    Compacted { from: Revision, oldest: Revision },
    #[error(
        "the watch of {prefix:?} was read too slowly and ended; list again and watch from the listing's revision + 1"
    )]
    Lagged { prefix: String },
    #[error("{count} watches are open, that is the most; close some")]
    TooManyWatches { count: usize },
    #[error("cannot watch")]
    Fault(#[from] StoreFault),
}

/// Granting, keeping alive and revoking leases.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LeaseError {
    #[error("a time to live of {ttl_ms} ms was given; {MIN_LEASE_TTL_MS} to {MAX_LEASE_TTL_MS} are allowed")]
    Ttl { ttl_ms: u128 },
    #[error("lease {lease} has expired or never existed; grant a new one")]
    NoSuchLease { lease: LeaseId },
    #[error("{count} leases exist, that is the most; revoke some")]
    TooManyLeases { count: usize },
    #[error("cannot change a lease")]
    Fault(#[from] StoreFault),
}

/// Trimming history.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CompactError {
    #[error("revision {revision} is in the future, the store is at {current}")]
    Future { revision: Revision, current: Revision },
    #[error("cannot trim the history")]
    Fault(#[from] StoreFault),
}

/// Working with values of one type.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TypedError {
    #[error("the value of key {key:?} cannot be written as JSON")]
    Encode { key: String, source: Arc<serde_json::Error> },
    #[error(
        "the value of key {key:?} (revision {revision}) is not what this program expects there; it may be from a newer version"
    )]
    Decode { key: String, revision: Revision, source: Arc<serde_json::Error> },
    #[error("someone else changed it first")]
    Conflict(#[from] Conflict),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Watch(#[from] WatchError),
}
