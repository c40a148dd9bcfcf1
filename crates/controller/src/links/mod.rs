//! The controller's end of the agents' links: what each host last said, and a way to ask it.
//!
//! A host has one link at a time; a newer one ends the older. What a host reports lives here and nowhere else: it is
//! found again by the next link, so it is not stored.

mod serve;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_api::link::{REQUEST_TIMEOUT_MS, Reply, Request};
use godwit_api::types::ErrorBody;
use godwit_model::container::ContainerStatus;
use godwit_model::{ContainerId, HostName};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

pub use serve::serve;

use crate::core::locked;
use crate::state::now_ms;

/// Requests waiting to be written to one link.
const QUEUE_REQUESTS: usize = 256;

/// Why a host did not do what it was asked to.
#[derive(Debug, Clone, Error)]
pub enum AskError {
    #[error("the host {host} is not connected")]
    NotConnected { host: HostName },
    #[error("the host {host} did not answer within {} s", timeout_ms / 1000)]
    Silent { host: HostName, timeout_ms: u64 },
    #[error("the link to the host {host} broke before it answered")]
    Gone { host: HostName },
    #[error("the host {host} could not do it")]
    Refused { host: HostName, source: ErrorBody },
}

/// What a host last said.
#[derive(Debug, Clone, Default)]
pub struct HostReport {
    pub connected: bool,
    /// Milliseconds since the epoch.
    pub last_seen_ms: Option<u64>,
    pub containers: BTreeMap<ContainerId, ContainerStatus>,
    /// Revision of the last `Desired` that the host has carried out.
    pub applied_revision: u64,
    /// Which link said it: grows with every new one, of whatever host.
    pub link: u64,
    /// The link has brought a status: `containers` is what is there now.
    pub current: bool,
}

struct Ask {
    body: Request,
    answer: oneshot::Sender<Result<Reply, ErrorBody>>,
}

#[derive(Default)]
struct Peer {
    report: Arc<HostReport>,
    line: Option<mpsc::Sender<Ask>>,
}

#[derive(Default)]
pub struct Links {
    peers: Mutex<BTreeMap<HostName, Peer>>,
    changed: watch::Sender<u64>,
    last_link: AtomicU64,
}

impl Links {
    pub fn new() -> Self {
        Self::default()
    }

    /// What this host last said; `None` if it has not been linked since this controller started.
    pub fn report(&self, host: &HostName) -> Option<Arc<HostReport>> {
        locked(&self.peers).get(host).map(|peer| Arc::clone(&peer.report))
    }

    pub fn connected(&self, host: &HostName) -> bool {
        self.report(host).is_some_and(|report| report.connected)
    }

    /// Changes with every report, link and end of a link.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Asks and waits for the answer. Before the request goes out, the host gets the newest `Desired`.
    pub async fn ask(&self, host: &HostName, body: Request) -> Result<Reply, AskError> {
        self.ask_within(host, body, REQUEST_TIMEOUT_MS).await
    }

    /// As [`Links::ask`], for something that may take as long as `timeout_ms`.
    pub async fn ask_within(&self, host: &HostName, body: Request, timeout_ms: u64) -> Result<Reply, AskError> {
        let line = locked(&self.peers).get(host).and_then(|peer| peer.line.clone());
        let line = line.ok_or_else(|| AskError::NotConnected { host: host.clone() })?;
        let (answer, answered) = oneshot::channel();
        let gone = || AskError::Gone { host: host.clone() };
        let work = async {
            line.send(Ask { body, answer }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())
        };
        match tokio::time::timeout(Duration::from_millis(timeout_ms), work).await {
            Ok(answered) => answered?.map_err(|source| AskError::Refused { host: host.clone(), source }),
            Err(_) => Err(AskError::Silent { host: host.clone(), timeout_ms }),
        }
    }

    /// A new link of this host takes over: its number, and the queue of what the host is asked.
    fn open(&self, host: &HostName) -> (u64, mpsc::Receiver<Ask>) {
        let number = self.last_link.fetch_add(1, Ordering::Relaxed) + 1;
        let (line, queue) = mpsc::channel(QUEUE_REQUESTS);
        let mut peers = locked(&self.peers);
        let peer = peers.entry(host.clone()).or_default();
        peer.line = Some(line);
        let mut report = HostReport::clone(&peer.report);
        report.connected = true;
        report.current = false;
        report.link = number;
        report.last_seen_ms = Some(now_ms());
        peer.report = Arc::new(report);
        drop(peers);
        self.nudge();
        (number, queue)
    }

    /// Changes what is known of a host, if this link is still its newest.
    fn update(&self, host: &HostName, link: u64, change: impl FnOnce(&mut HostReport)) {
        let mut peers = locked(&self.peers);
        let Some(peer) = peers.get_mut(host).filter(|peer| peer.report.link == link) else { return };
        let mut report = HostReport::clone(&peer.report);
        report.last_seen_ms = Some(now_ms());
        change(&mut report);
        peer.report = Arc::new(report);
        drop(peers);
        self.nudge();
    }

    /// The link has ended; `false` if a newer one has taken over.
    fn close(&self, host: &HostName, link: u64) -> bool {
        let mut peers = locked(&self.peers);
        let Some(peer) = peers.get_mut(host).filter(|peer| peer.report.link == link) else { return false };
        peer.line = None;
        let mut report = HostReport::clone(&peer.report);
        report.connected = false;
        report.current = false;
        peer.report = Arc::new(report);
        drop(peers);
        self.nudge();
        true
    }

    fn nudge(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}
