//! The one thread that writes.
//!
//! Requests that wait together are written together: one SQLite transaction, one fsync, each request at
//! its own revision. If a group fails, its requests are tried one by one, so that a small change does
//! not fail because it shared a group with one that does not fit on the disk.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::live::{Listeners, Live};
use super::rows::{self, Applied, Counters};
use super::{Options, database};
use crate::error::{CommitError, CompactError, LeaseError, OpenError, StoreFault, WatchError};
use crate::types::{Commit, LeaseId, Revision, Txn, WatchEvent};

/// Requests that wait for the thread; further callers wait before queueing.
const WRITE_QUEUE_REQUESTS: usize = 256;
/// Requests written with one fsync.
const GROUP_REQUESTS: usize = 64;
/// Leases that may exist at once.
const MAX_LEASES: usize = 10_000;
/// A lease whose expiry could not be written is tried again after this time.
const EXPIRY_RETRY_MS: u64 = 1000;

type Reply<T, E> = oneshot::Sender<Result<T, E>>;

/// What the thread can be asked for.
pub(super) enum Request {
    Commit {
        txn: Txn,
        reply: Reply<Commit, CommitError>,
    },
    Watch {
        prefix: String,
        from: Revision,
        reply: Reply<Live, WatchError>,
    },
    LeaseGrant {
        ttl_ms: u64,
        reply: Reply<LeaseId, LeaseError>,
    },
    LeaseKeepAlive {
        lease: LeaseId,
        reply: Reply<Duration, LeaseError>,
    },
    LeaseRevoke {
        lease: LeaseId,
        reply: Reply<Revision, LeaseError>,
    },
    Compact {
        revision: Revision,
        reply: Reply<(), CompactError>,
    },
    /// Ends the thread after what was queued before.
    Stop,
}

/// The queue to the writing thread.
pub(super) struct Writer {
    requests: Sender<(Request, Option<OwnedSemaphorePermit>)>,
    room: Arc<Semaphore>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(path: &Path, database: Connection, lock: File, options: Options) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Database { path: path.to_owned(), source };
        let counters = rows::counters(&database).map_err(failed)?;
        let now = Instant::now();
        let leases = rows::leases(&database)
            .map_err(failed)?
            .into_iter()
            .map(|(id, ttl_ms)| (id, Lease::starting(ttl_ms, now)))
            .collect();
        let (requests, queue) = channel();
        let state = State {
            path: path.to_owned(),
            counters,
            leases,
            listeners: Listeners::new(options.watch_buffer_revisions),
            history_revisions: options.history_revisions.max(1),
            broken: None,
            database,
        };
        let thread = std::thread::Builder::new()
            .name("store-write".to_owned())
            .spawn(move || {
                state.serve(&queue);
                // The file is closed by now.
                drop(lock);
            })
            .map_err(|source| OpenError::Thread { path: path.to_owned(), source })?;
        Ok(Self { requests, room: Arc::new(Semaphore::new(WRITE_QUEUE_REQUESTS)), thread: Some(thread) })
    }

    pub(super) async fn send(&self, request: Request) -> Result<(), StoreFault> {
        let permit = Arc::clone(&self.room).acquire_owned().await.map_err(|_| StoreFault::Closed)?;
        self.requests.send((request, Some(permit))).map_err(|_| StoreFault::Closed)
    }

    /// Ends the thread after what is queued, and waits for it.
    pub(super) fn stop(&mut self) {
        self.room.close();
        let _ = self.requests.send((Request::Stop, None));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

struct Lease {
    ttl: Duration,
    deadline: Instant,
}

impl Lease {
    fn starting(ttl_ms: u64, now: Instant) -> Self {
        let ttl = Duration::from_millis(ttl_ms);
        Self { ttl, deadline: now + ttl }
    }
}

/// A change of the file.
enum Change {
    Commit {
        txn: Txn,
        reply: Reply<Commit, CommitError>,
    },
    LeaseGrant {
        ttl_ms: u64,
        reply: Reply<LeaseId, LeaseError>,
    },
    LeaseRevoke {
        lease: LeaseId,
        reply: Reply<Revision, LeaseError>,
    },
    Compact {
        revision: Revision,
        reply: Reply<(), CompactError>,
    },
    /// From the thread itself.
    LeaseExpire {
        lease: LeaseId,
    },
    /// From the thread itself: bounds the history.
    Trim {
        revision: Revision,
    },
}

/// What a change came to, told once the group is on disk.
enum Outcome {
    Commit(Result<Commit, CommitError>),
    Granted(Result<LeaseId, LeaseError>),
    Ended(Result<Revision, LeaseError>),
    Compacted(Result<(), CompactError>),
}

struct Staged {
    outcome: Outcome,
    events: Vec<WatchEvent>,
}

struct State {
    path: PathBuf,
    counters: Counters,
    leases: BTreeMap<LeaseId, Lease>,
    listeners: Listeners,
    history_revisions: u64,
    /// Set when it is no longer known what is on the disk; everything is refused then.
    broken: Option<StoreFault>,
    database: Connection,
}

impl State {
    fn serve(mut self, queue: &Receiver<(Request, Option<OwnedSemaphorePermit>)>) {
        loop {
            let received = match self.next_expiry() {
                Some(at) => queue.recv_timeout(at.saturating_duration_since(Instant::now())),
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let mut group = Vec::new();
            match received {
                Ok(first) => group.push(first),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while group.len() < GROUP_REQUESTS
                && let Ok(next) = queue.try_recv()
            {
                group.push(next);
            }
            if self.handle(group) {
                return;
            }
            // After the group: a keep-alive that waited in the queue came in time.
            self.expire();
            self.trim();
        }
    }

    /// Returns whether the thread should end.
    fn handle(&mut self, group: Vec<(Request, Option<OwnedSemaphorePermit>)>) -> bool {
        let mut stop = false;
        let mut changes = Vec::with_capacity(group.len());
        let mut later = Vec::new();
        let mut permits = Vec::with_capacity(group.len());
        for (request, permit) in group {
            permits.push(permit);
            match request {
                Request::Commit { txn, reply } => changes.push(Change::Commit { txn, reply }),
                Request::LeaseGrant { ttl_ms, reply } => changes.push(Change::LeaseGrant { ttl_ms, reply }),
                Request::LeaseRevoke { lease, reply } => changes.push(Change::LeaseRevoke { lease, reply }),
                Request::Compact { revision, reply } => changes.push(Change::Compact { revision, reply }),
                Request::Stop => stop = true,
                memory_only => later.push(memory_only),
            }
        }
        self.write(changes);
        // A watch joins after the group, so that its first revision is one that is on disk.
        for request in later {
            match request {
                Request::Watch { prefix, from, reply } => {
                    let Counters { revision, oldest, .. } = self.counters;
                    let _ = reply.send(self.listeners.join(prefix, from, revision, oldest));
                }
                Request::LeaseKeepAlive { lease, reply } => {
                    let _ = reply.send(self.keep_alive(lease));
                }
                _ => {}
            }
        }
        stop
    }

    /// Writes changes, all with one fsync if that works, else one by one; answers each.
    fn write(&mut self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        match self.write_group(&changes) {
            Ok(staged) => changes.into_iter().zip(staged).for_each(|(change, staged)| self.finish(change, staged)),
            Err(fault) if changes.len() == 1 => changes.into_iter().for_each(|change| self.refuse(change, &fault)),
            Err(_) => changes.into_iter().for_each(|change| self.write(vec![change])),
        }
    }

    /// All or nothing; afterwards the counters are those on disk.
    fn write_group(&mut self, changes: &[Change]) -> Result<Vec<Staged>, StoreFault> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone());
        }
        let path = &self.path;
        let failed = |error| database::fault(path, error);
        let mut counters = self.counters;
        let lease_count = self.leases.len();
        let transaction = self.database.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let mut staged = Vec::with_capacity(changes.len());
        for change in changes {
            staged.push(stage(&transaction, &mut counters, lease_count, change).map_err(failed)?);
        }
        rows::save_counters(&transaction, self.counters, counters).map_err(failed)?;
        if let Err(error) = transaction.commit() {
            if database::surely_undone(&error) {
                return Err(failed(error));
            }
            let fault = StoreFault::Unconfirmed { path: self.path.clone() };
            tracing::error!(error = %error, "{fault}");
            self.broken = Some(fault.clone());
            return Err(fault);
        }
        self.counters = counters;
        Ok(staged)
    }

    /// Brings memory up to date with the disk, then tells who listens and who asked.
    fn finish(&mut self, change: Change, staged: Staged) {
        self.listeners.publish(staged.events);
        match (change, staged.outcome) {
            (Change::Commit { reply, .. }, Outcome::Commit(result)) => {
                let _ = reply.send(result);
            }
            (Change::LeaseGrant { ttl_ms, reply }, Outcome::Granted(result)) => {
                if let Ok(id) = result {
                    self.leases.insert(id, Lease::starting(ttl_ms, Instant::now()));
                }
                let _ = reply.send(result);
            }
            (Change::LeaseRevoke { lease, reply }, Outcome::Ended(result)) => {
                self.leases.remove(&lease);
                let _ = reply.send(result);
            }
            (Change::LeaseExpire { lease }, Outcome::Ended(_)) => {
                self.leases.remove(&lease);
            }
            (Change::Compact { reply, .. }, Outcome::Compacted(result)) => {
                let _ = reply.send(result);
            }
            // `stage` answers each kind of change with its own kind of outcome.
            _ => {}
        }
    }

    fn refuse(&mut self, change: Change, fault: &StoreFault) {
        match change {
            Change::Commit { reply, .. } => {
                let _ = reply.send(Err(fault.clone().into()));
            }
            Change::LeaseGrant { reply, .. } => {
                let _ = reply.send(Err(fault.clone().into()));
            }
            Change::LeaseRevoke { reply, .. } => {
                let _ = reply.send(Err(fault.clone().into()));
            }
            Change::Compact { reply, .. } => {
                let _ = reply.send(Err(fault.clone().into()));
            }
            Change::LeaseExpire { lease } => {
                tracing::warn!(%lease, "an expired lease could not be removed yet: {fault}");
                if let Some(lease) = self.leases.get_mut(&lease) {
                    lease.deadline = Instant::now() + Duration::from_millis(EXPIRY_RETRY_MS);
                }
            }
            Change::Trim { .. } => tracing::warn!("the history could not be trimmed yet: {fault}"),
        }
    }

    fn keep_alive(&mut self, lease: LeaseId) -> Result<Duration, LeaseError> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone().into());
        }
        let held = self.leases.get_mut(&lease).ok_or(LeaseError::NoSuchLease { lease })?;
        held.deadline = Instant::now() + held.ttl;
        Ok(held.ttl)
    }

    fn next_expiry(&self) -> Option<Instant> {
        if self.broken.is_some() {
            return None;
        }
        self.leases.values().map(|lease| lease.deadline).min()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let over = self.leases.iter().filter(|(_, lease)| lease.deadline <= now);
        let changes = over.map(|(id, _)| Change::LeaseExpire { lease: *id }).take(GROUP_REQUESTS).collect();
        self.write(changes);
    }

    /// Keeps the history within its bound, an eighth more at a time so that not every commit trims.
    fn trim(&mut self) {
        let Counters { revision, oldest, .. } = self.counters;
        let kept = (revision.0 + 1).saturating_sub(oldest.0);
        if kept > self.history_revisions + self.history_revisions / 8 && self.broken.is_none() {
            let revision = Revision(revision.0 + 1 - self.history_revisions);
            self.write(vec![Change::Trim { revision }]);
        }
    }
}

/// Applies one change within the group's transaction.
fn stage(
    connection: &Connection,
    counters: &mut Counters,
    lease_count: usize,
    change: &Change,
) -> rusqlite::Result<Staged> {
    let mut events = Vec::new();
    let outcome = match change {
        Change::Commit { txn, .. } => Outcome::Commit(match rows::apply(connection, counters, txn, &mut events)? {
            Applied::Done(commit) => Ok(commit),
            Applied::NoSuchLease { key, lease } => Err(CommitError::NoSuchLease { key, lease }),
        }),
        // A group may exceed the bound by its own size.
        Change::LeaseGrant { .. } if lease_count >= MAX_LEASES => {
            Outcome::Granted(Err(LeaseError::TooManyLeases { count: lease_count }))
        }
        Change::LeaseGrant { ttl_ms, .. } => {
            counters.lease += 1;
            let lease = LeaseId(counters.lease);
            rows::insert_lease(connection, lease, *ttl_ms)?;
            Outcome::Granted(Ok(lease))
        }
        Change::LeaseRevoke { lease, .. } | Change::LeaseExpire { lease } => {
            Outcome::Ended(match rows::end_lease(connection, counters, *lease)? {
                Some(deleted) => {
                    events = deleted;
                    Ok(counters.revision)
                }
                None => Err(LeaseError::NoSuchLease { lease: *lease }),
            })
        }
        Change::Compact { revision, .. } if *revision > counters.revision => {
            Outcome::Compacted(Err(CompactError::Future { revision: *revision, current: counters.revision }))
        }
        Change::Compact { revision, .. } | Change::Trim { revision } => {
            rows::compact(connection, counters, *revision)?;
            Outcome::Compacted(Ok(()))
        }
    };
    Ok(Staged { outcome, events })
}
