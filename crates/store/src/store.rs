//! The trait that the controller holds as `Arc<dyn Store>`.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use crate::error::{CommitError, CompactError, LeaseError, ReadError, WatchError};
use crate::types::{Commit, Entry, LeaseId, Listing, Revision, Txn, WatchEvent};

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// See the crate's page for the semantics. Dropping a returned future does not undo a commit that has
/// been queued.
pub trait Store: Send + Sync + 'static {
    /// The entry of `key`, if it exists, not older than any commit that returned before the call.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>>;

    /// All entries whose key starts with `prefix` (all, if it is empty), of one revision.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, ReadError>>;

    /// Applies a transaction: atomic, and durable before this returns.
    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Commit, CommitError>>;

    /// The changes of keys that start with `prefix`, from revision `from` on (inclusive; 0 and 1 both
    /// mean the beginning), first those of history, then new ones as they are committed. History that is
    /// trimmed before a long replay came to it ends the watch with [`WatchError::Compacted`].
    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<Watch, WatchError>>;

    /// A new lease. It ends when `ttl` passes without [`Store::lease_keep_alive`]; after a restart of
    /// the store every lease begins a full `ttl` again.
    fn lease_grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, LeaseError>>;

    /// Begins the lease's time to live again and returns it.
    fn lease_keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<Duration, LeaseError>>;

    /// Ends the lease and deletes its keys in one revision.
    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<Revision, LeaseError>>;

    /// Forgets history before `revision`: a watch can then start at `revision` at the earliest.
    /// Entries are not touched. Nothing happens if that history is gone already.
    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), CompactError>>;
}

/// What a backend implements for [`Watch`].
pub trait WatchSource: Send {
    /// The next event. Dropping the future loses no event. After an error every call returns an error.
    fn next(&mut self) -> BoxFuture<'_, Result<WatchEvent, WatchError>>;
}

/// Changes in order, without gap and without duplicate. Ends when dropped.
pub struct Watch(Box<dyn WatchSource>);

impl Watch {
    /// Wraps a backend's source.
    pub fn new(source: impl WatchSource + 'static) -> Self {
        Self(Box::new(source))
    }

    /// Waits for the next event. Cancel-safe: may be used in `select!`.
    pub async fn next(&mut self) -> Result<WatchEvent, WatchError> {
        self.0.next().await
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}
