//! Watches: the writer's list of who listens, and the listener's end.
//!
//! A listener is entered into the list by the writer thread between two groups, at a known revision.
//! Up to that revision it reads history from the file; everything later comes through its channel. So
//! nothing is missed and nothing comes twice.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::reader::Readers;
use super::rows::{self, Page, Position};
use crate::error::{StoreFault, WatchError};
use crate::store::{BoxFuture, WatchSource};
use crate::types::{Revision, WatchEvent};

/// Watches that may be open at once.
const MAX_WATCHES: usize = 4096;
/// Events of history read in one go.
const REPLAY_PAGE_EVENTS: usize = 128;

/// The changes of one revision, shared by all who listen.
type Changes = Arc<[WatchEvent]>;

/// Who listens.
pub(super) struct Listeners {
    list: Vec<Listener>,
    buffer_revisions: usize,
}

struct Listener {
    prefix: String,
    from: Revision,
    channel: Sender<Changes>,
    lagged: Arc<AtomicBool>,
}

/// What the writer hands to a new watch.
#[derive(Debug)]
pub(super) struct Live {
    /// Changes after this revision come through the channel.
    joined: Revision,
    channel: Receiver<Changes>,
    lagged: Arc<AtomicBool>,
}

impl Listeners {
    pub(super) fn new(buffer_revisions: usize) -> Self {
        Self { list: Vec::new(), buffer_revisions: buffer_revisions.max(1) }
    }

    /// Enters a listener; `revision` is the store's, `oldest` where history begins.
    pub(super) fn join(
        &mut self,
        prefix: String,
        from: Revision,
        revision: Revision,
        oldest: Revision,
    ) -> Result<Live, WatchError> {
        if from < oldest && from <= revision {
            return Err(WatchError::Compacted { from, oldest });
        }
        self.list.retain(|listener| !listener.channel.is_closed());
        if self.list.len() >= MAX_WATCHES {
            return Err(WatchError::TooManyWatches { count: self.list.len() });
        }
        let (sender, receiver) = channel(self.buffer_revisions);
        let lagged = Arc::new(AtomicBool::new(false));
        self.list.push(Listener { prefix, from, channel: sender, lagged: Arc::clone(&lagged) });
        Ok(Live { joined: revision, channel: receiver, lagged })
    }

    /// Hands one revision's changes to all whom they concern. Who has no room left is cut off.
    pub(super) fn publish(&mut self, events: Vec<WatchEvent>) {
        let Some(revision) = events.first().map(|event| event.revision) else { return };
        let changes: Changes = events.into();
        self.list.retain(|listener| {
            let concerned =
                revision >= listener.from && changes.iter().any(|event| event.key().starts_with(&listener.prefix));
            if !concerned {
                return !listener.channel.is_closed();
            }
            match listener.channel.try_send(Arc::clone(&changes)) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    listener.lagged.store(true, Ordering::Release);
                    false
                }
                Err(TrySendError::Closed(_)) => false,
            }
        });
    }
}

/// The listener's end.
pub(super) struct SqliteWatch {
    prefix: String,
    from: Revision,
    /// Where the replay of history stands; `None` once it is complete.
    replay: Option<Position>,
    live: Live,
    readers: Arc<Readers>,
    ready: VecDeque<WatchEvent>,
    ended: Option<WatchError>,
}

impl SqliteWatch {
    pub(super) fn new(prefix: String, from: Revision, live: Live, readers: Arc<Readers>) -> Self {
        let replay = (from <= live.joined).then_some(Position { revision: from, seq: -1 });
        Self { prefix, from, replay, live, readers, ready: VecDeque::new(), ended: None }
    }

    /// Reads the first piece of history, so that a short one is complete whatever is trimmed later.
    pub(super) async fn begin(mut self) -> Result<Self, WatchError> {
        if let Some(after) = self.replay {
            self.read_page(after).await?;
        }
        Ok(self)
    }

    async fn read_page(&mut self, after: Position) -> Result<(), WatchError> {
        let (prefix, until) = (self.prefix.clone(), self.live.joined);
        let page = self
            .readers
            .run::<_, WatchError>(move |connection| rows::replay(connection, &prefix, after, until, REPLAY_PAGE_EVENTS))
            .await?;
        match page {
            Page::Compacted { oldest } => Err(WatchError::Compacted { from: after.revision, oldest }),
            Page::Events(events) => {
                self.replay = match events.last() {
                    Some((position, _)) if events.len() == REPLAY_PAGE_EVENTS => Some(*position),
                    _ => None,
                };
                self.ready.extend(events.into_iter().map(|(_, event)| event));
                Ok(())
            }
        }
    }

    async fn advance(&mut self) -> Result<WatchEvent, WatchError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            if let Some(error) = &self.ended {
                return Err(error.clone());
            }
            if let Some(after) = self.replay {
                if let Err(error) = self.read_page(after).await {
                    self.ended = Some(error);
                }
                continue;
            }
            match self.live.channel.recv().await {
                Some(changes) => {
                    let wanted = changes
                        .iter()
                        .filter(|event| event.revision >= self.from && event.key().starts_with(&self.prefix));
                    self.ready.extend(wanted.cloned());
                }
                None if self.live.lagged.load(Ordering::Acquire) => {
                    self.ended = Some(WatchError::Lagged { prefix: self.prefix.clone() });
                }
                None => self.ended = Some(StoreFault::Closed.into()),
            }
        }
    }
}

impl WatchSource for SqliteWatch {
    fn next(&mut self) -> BoxFuture<'_, Result<WatchEvent, WatchError>> {
        Box::pin(self.advance())
    }
}
