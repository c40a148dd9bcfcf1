//! The embedded backend: one SQLite file, one process at a time.

mod database;
mod live;
mod reader;
mod rows;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::error::{CommitError, CompactError, LeaseError, OpenError, ReadError, StoreFault, WatchError};
use crate::store::{BoxFuture, Store, Watch};
use crate::types::{
    Commit, Entry, LeaseId, Listing, MAX_KEY_BYTES, MAX_LEASE_TTL_MS, MIN_LEASE_TTL_MS, Revision, Txn, check_read_key,
};
use live::SqliteWatch;
use reader::Readers;
use writer::{Request, Writer};

/// Bounds that a deployment may want to change.
#[derive(Debug, Clone)]
pub struct Options {
    /// Revisions of history that are kept for watches; older ones are trimmed as new ones come.
    pub history_revisions: u64,
    /// Revisions that a watch may fall behind before it ends as lagged.
    pub watch_buffer_revisions: usize,
    /// Largest size of the database, in bytes (not counting its write-ahead log).
    pub max_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { history_revisions: 10_000, watch_buffer_revisions: 1024, max_bytes: 8 * 1024 * 1024 * 1024 }
    }
}

/// State in one SQLite file (write-ahead log, fsync on every commit).
///
/// The file belongs to one process, which holds an exclusive lock on `<file>.lock` while open. Dropping
/// the store finishes what was queued, closes the file and then gives the lock back.
#[derive(Debug)]
pub struct SqliteStore {
    writer: Writer,
    readers: Arc<Readers>,
}

impl SqliteStore {
    /// Opens the file at `path`, creates it and its directory if needed. Blocks for disk work.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::open_with(path, Options::default())
    }

    /// Opens with other bounds than the defaults.
    pub fn open_with(path: &Path, options: Options) -> Result<Self, OpenError> {
        let (database, lock) = database::open(path, &options)?;
        let readers = Readers::start(path)?;
        let writer = Writer::start(path, database, lock, options)?;
        Ok(Self { writer, readers: Arc::new(readers) })
    }

    /// Queues a request for the writer thread and waits for its answer.
    async fn ask<T, E: From<StoreFault>>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Request,
    ) -> Result<T, E> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(request(reply)).await?;
        answer.await.unwrap_or_else(|_| Err(StoreFault::Closed.into()))
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        // Readers first: the writer gives the lock back, and then nobody may have the file open.
        self.readers.stop();
        self.writer.stop();
    }
}

impl Store for SqliteStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        Box::pin(async move {
            check_read_key(key)?;
            let key = key.to_owned();
            self.readers.run(move |connection| rows::get(connection, &key)).await
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, ReadError>> {
        Box::pin(async move {
            check_read_key(prefix)?;
            let wanted = prefix.to_owned();
            self.readers
                .run::<_, ReadError>(move |connection| rows::list(connection, &wanted))
                .await?
                .ok_or_else(|| ReadError::TooManyEntries { prefix: prefix.to_owned() })
        })
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Commit, CommitError>> {
        Box::pin(async move {
            txn.check()?;
            self.ask(|reply| Request::Commit { txn, reply }).await
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<Watch, WatchError>> {
        Box::pin(async move {
            if prefix.len() > MAX_KEY_BYTES {
                return Err(WatchError::KeyLength { bytes: prefix.len() });
            }
            let from = from.max(Revision(1));
            let prefix = prefix.to_owned();
            let live = self.ask(|reply| Request::Watch { prefix: prefix.clone(), from, reply }).await?;
            Ok(Watch::new(SqliteWatch::new(prefix, from, live, Arc::clone(&self.readers)).begin().await?))
        })
    }

    fn lease_grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, LeaseError>> {
        Box::pin(async move {
            let ttl_ms = match u64::try_from(ttl.as_millis()) {
                Ok(ms) if (MIN_LEASE_TTL_MS..=MAX_LEASE_TTL_MS).contains(&ms) => ms,
                _ => return Err(LeaseError::Ttl { ttl_ms: ttl.as_millis() }),
            };
            self.ask(|reply| Request::LeaseGrant { ttl_ms, reply }).await
        })
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<Duration, LeaseError>> {
        Box::pin(self.ask(move |reply| Request::LeaseKeepAlive { lease, reply }))
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<Revision, LeaseError>> {
        Box::pin(self.ask(move |reply| Request::LeaseRevoke { lease, reply }))
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), CompactError>> {
        Box::pin(self.ask(move |reply| Request::Compact { revision, reply }))
    }
}
