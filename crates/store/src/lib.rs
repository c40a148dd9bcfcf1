//! State with revisions, compare-and-set, watch and lease.
//!
//! The semantics are etcd's, so that an embedded file and a cluster stand behind one trait:
//!
//! - One counter, the [`Revision`], counts the commits that changed something. A transaction's changes
//!   all carry the same revision, and are seen together or not at all.
//! - A commit that returned is on disk: killing the process or the machine afterwards does not lose it.
//! - [`Store::list`] plus [`Store::watch`] from the listing's revision + 1 sees every later change once,
//!   in order. Who is too slow or comes too late is told so ([`WatchError`]) and lists again.
//! - Keys put with a lease disappear, in one revision, when the lease is not kept alive.
//!
//! ```text
//!  callers ──bounded queue──▶ writer thread ── one SQLite transaction per group ──▶ file (WAL, fsync)
//!     │                            └── after the fsync: replies, then events to the watches
//!     └─────bounded queue──▶ reader threads (snapshots, history replay)
//! ```
//! [`SqliteStore`] is the embedded backend. [`Typed`] keeps JSON values of one type under one prefix.
#![forbid(unsafe_code)]

mod error;
mod sqlite;
mod store;
mod typed;
mod types;

pub use error::{CommitError, CompactError, LeaseError, OpenError, ReadError, StoreFault, TypedError, WatchError};
pub use sqlite::{Options, SqliteStore};
pub use store::{BoxFuture, Store, Watch, WatchSource};
pub use typed::{Typed, TypedChange, TypedEvent, TypedListing, TypedWatch, Versioned};
pub use types::{
    Change, Commit, Compare, Condition, Conflict, Entry, LeaseId, Listing, MAX_KEY_BYTES, MAX_LEASE_TTL_MS,
    MAX_LIST_ENTRIES, MAX_TXN_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES, MIN_LEASE_TTL_MS, Op, Revision, Txn, WatchEvent,
};
