//! The store as this process sees it: a snapshot that follows the store's watch, and transactions against it.
//!
//! Decisions are made from a snapshot and committed only if what they were made from has not changed since;
//! otherwise they are made again. Nothing else in the controller writes to the store.

pub mod records;
mod transaction;
mod world;

use std::sync::Arc;
use std::time::Duration;

use godwit_store::{Commit, CommitError, Compare, Op, ReadError, Revision, Store, Txn, WatchError};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use transaction::{About, Tx, now_ms};
pub use world::{Shared, Versioned, World};

/// How often a decision is made again when someone else was faster.
const MAX_TRIES: u32 = 16;
/// How long the snapshot may lag behind a commit before something is wrong, in milliseconds.
const CATCH_UP_TIMEOUT_MS: u64 = 10_000;

#[derive(Debug, Clone, Error)]
pub enum StateError {
    #[error("the value of {key:?} in the store cannot be read; it may be from a newer version: use that")]
    Decode { key: String, source: Arc<serde_json::Error> },
    #[error("a value for {key:?} cannot be written as JSON")]
    Encode { key: String, source: Arc<serde_json::Error> },
    #[error("the state cannot be read")]
    Read(#[from] ReadError),
    #[error("the state cannot be changed")]
    Commit(#[from] CommitError),
    #[error("the state cannot be watched")]
    Watch(#[from] WatchError),
    #[error("{} hosts have joined, that is the most; remove some", records::MAX_HOSTS)]
    TooManyHosts,
    #[error("others changed the same thing {MAX_TRIES} times in a row; try again")]
    Contended,
    #[error("the change is made, but is not visible after {CATCH_UP_TIMEOUT_MS} ms; look again in a moment")]
    Behind,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct State {
    store: Arc<dyn Store>,
    world: watch::Receiver<Arc<World>>,
}

/// Keeps the snapshot up to date; to be run until the controller ends.
pub struct Follower {
    store: Arc<dyn Store>,
    world: watch::Sender<Arc<World>>,
}

impl State {
    /// Reads everything, makes the store's identity if it has none.
    pub async fn open(store: Arc<dyn Store>) -> Result<(Self, Follower), StateError> {
        let id = serde_json::to_vec(&uuid::Uuid::new_v4().to_string())
            .map_err(|source| StateError::Encode { key: records::STORE_ID.to_owned(), source: Arc::new(source) })?;
        let txn = Txn::new(vec![Op::put(records::STORE_ID, id)]).only_if(Compare::absent(records::STORE_ID));
        // A conflict is a store that has its identity.
        let _: Commit = store.commit(txn).await?;
        let world = World::from_listing(store.list("").await?)?;
        let (sender, receiver) = watch::channel(Arc::new(world));
        let follower = Follower { store: Arc::clone(&store), world: sender };
        Ok((Self { store, world: receiver }, follower))
    }

    /// The newest snapshot.
    pub fn world(&self) -> Arc<World> {
        Arc::clone(&self.world.borrow())
    }

    /// A receiver that sees every later snapshot (not each of them).
    pub fn follow(&self) -> watch::Receiver<Arc<World>> {
        self.world.clone()
    }

    /// Decides and commits: `decide` gets a snapshot and gives back what to change under which conditions, and a
    /// value; it may be called several times. Returns when the snapshot shows the change. An empty transaction
    /// changes nothing and makes no revision.
    pub async fn transact<T, E: From<StateError>>(
        &self,
        mut decide: impl FnMut(&World) -> Result<(Tx, T), E>,
    ) -> Result<(T, Revision), E> {
        for _ in 0..MAX_TRIES {
            let world = self.world();
            let (tx, value) = decide(&world)?;
            if tx.is_empty() {
                return Ok((value, world.revision));
            }
            match self.store.commit(tx.finish().map_err(E::from)?).await.map_err(StateError::from)? {
                Commit::Committed { revision } => {
                    self.catch_up(revision).await?;
                    return Ok((value, revision));
                }
                Commit::Conflict(conflict) => {
                    let newer = conflict.actual.unwrap_or_default().max(world.revision.next());
                    self.catch_up(newer).await?;
                }
            }
        }
        Err(StateError::Contended.into())
    }

    async fn catch_up(&self, revision: Revision) -> Result<(), StateError> {
        let mut world = self.world.clone();
        let reached = world.wait_for(|w| w.revision >= revision);
        match tokio::time::timeout(Duration::from_millis(CATCH_UP_TIMEOUT_MS), reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(StateError::Behind),
        }
    }
}

impl Follower {
    /// Ends with `Ok` when `stop` says so, with an error when the store cannot be followed any more.
    pub async fn run(self, stop: CancellationToken) -> Result<(), StateError> {
        loop {
            let from = self.world.borrow().revision.next();
            let ended = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ended = self.follow(from) => ended,
            };
            match ended {
                StateError::Watch(WatchError::Lagged { .. } | WatchError::Compacted { .. }) => {
                    let world = World::from_listing(self.store.list("").await?)?;
                    self.world.send_replace(Arc::new(world));
                }
                other => return Err(other),
            }
        }
    }

    async fn follow(&self, from: Revision) -> StateError {
        let mut watch = match self.store.watch("", from).await {
            Ok(watch) => watch,
            Err(error) => return error.into(),
        };
        let mut pending = Vec::new();
        loop {
            let event = match watch.next().await {
                Ok(event) => event,
                Err(error) => return error.into(),
            };
            // Changes of one revision are seen together: what the tick ends, or what a later revision follows.
            if pending.first().is_some_and(|first: &godwit_store::WatchEvent| first.revision < event.revision)
                && let Err(error) = self.publish(std::mem::take(&mut pending))
            {
                return error;
            }
            let complete = event.key() == records::TICK;
            pending.push(event);
            if complete && let Err(error) = self.publish(std::mem::take(&mut pending)) {
                return error;
            }
        }
    }

    fn publish(&self, events: Vec<godwit_store::WatchEvent>) -> Result<(), StateError> {
        let mut world = World::clone(&self.world.borrow());
        for event in events {
            world.revision = event.revision;
            world.apply(event)?;
        }
        self.world.send_replace(Arc::new(world));
        Ok(())
    }
}
