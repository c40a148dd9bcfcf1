//! Commands run inside a container from outside, and the moment of a move in which there may be none.
//!
//! CRIU carries the container's own processes. A command that joins it while it is being frozen would stop half-way, and
//! its keeper with it; one that is open at the freeze would be left behind. So a move closes the gate first: new
//! sessions wait for its end, health checks are skipped, and one that is at work is given a moment and then ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};
use tokio::time::{sleep, timeout};

/// A health check that is at work when the gate closes has this time to end by itself, in milliseconds.
const PROBE_GRACE_MS: u64 = 200;
/// The gate closes within this time, in milliseconds: the grace, and a killed process's last steps.
const CLOSE_TIMEOUT_MS: u64 = 10_000;
/// A new session waits this long for a move to be over, in milliseconds.
const ENTER_TIMEOUT_MS: u64 = 10_000;

/// Shared by all who run commands in one container.
pub struct ExecGate {
    lock: Arc<RwLock<()>>,
    closing: watch::Sender<bool>,
    probes: Arc<AtomicU32>,
}

/// Held while a command is started, and by a health check until it has ended.
pub struct Entered {
    _open: OwnedRwLockReadGuard<()>,
}

/// A health check at work.
pub struct Probe {
    _open: OwnedRwLockReadGuard<()>,
    closing: watch::Receiver<bool>,
    probes: Arc<AtomicU32>,
}

/// Nobody starts a command as long as it lives.
pub struct Closed {
    // Dropped in this order: whoever enters next is not called off.
    _reopen: Reopen,
    _shut: OwnedRwLockWriteGuard<()>,
}

impl Default for ExecGate {
    fn default() -> Self {
        Self { lock: Arc::default(), closing: watch::Sender::new(false), probes: Arc::default() }
    }
}

impl ExecGate {
    /// For the start of a session; waits while a move holds the container. `None` if that takes too long.
    pub async fn enter(&self) -> Option<Entered> {
        let open = Arc::clone(&self.lock).read_owned();
        timeout(Duration::from_millis(ENTER_TIMEOUT_MS), open).await.ok().map(|open| Entered { _open: open })
    }

    /// For one health check; `None` while a move holds the container.
    pub fn probe(&self) -> Option<Probe> {
        let open = Arc::clone(&self.lock).try_read_owned().ok()?;
        self.probes.fetch_add(1, Ordering::Relaxed);
        Some(Probe { _open: open, closing: self.closing.subscribe(), probes: Arc::clone(&self.probes) })
    }

    /// Health checks at work; they are nobody's sessions.
    pub fn probes(&self) -> u32 {
        self.probes.load(Ordering::Relaxed)
    }

    /// Waits until no command is being started and no health check is at work. `None` if one does not end.
    pub async fn close(&self) -> Option<Closed> {
        self.closing.send_replace(true);
        let reopen = Reopen(self.closing.clone());
        let shut = timeout(Duration::from_millis(CLOSE_TIMEOUT_MS), Arc::clone(&self.lock).write_owned()).await.ok()?;
        Some(Closed { _reopen: reopen, _shut: shut })
    }
}

/// Takes the closing back, also where whoever closes is cancelled.
struct Reopen(watch::Sender<bool>);

impl Drop for Reopen {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

impl Probe {
    /// Ends when the check has to: a while after the gate began to close.
    pub async fn called_off(&mut self) {
        if self.closing.wait_for(|closing| *closing).await.is_err() {
            // The container's record is gone; whoever unmakes it ends the check.
            std::future::pending::<()>().await;
        }
        sleep(Duration::from_millis(PROBE_GRACE_MS)).await;
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.probes.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closing_gate_waits_for_a_check_and_calls_it_off() {
        let gate = Arc::new(ExecGate::default());
        let mut probe = gate.probe().unwrap();
        assert_eq!(gate.probes(), 1);
        let closer = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.close().await }
        });
        probe.called_off().await;
        assert!(gate.probe().is_none(), "no new check once somebody waits");
        drop(probe);
        let closed = closer.await.unwrap().unwrap();
        assert_eq!(gate.probes(), 0);
        assert!(gate.probe().is_none());
        // A session that comes now waits for the end of it.
        let session = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.enter().await.is_some() }
        });
        tokio::task::yield_now().await;
        assert!(!session.is_finished());
        drop(closed);
        assert!(session.await.unwrap());
        let mut probe = gate.probe().unwrap();
        assert!(
            timeout(Duration::from_millis(2 * PROBE_GRACE_MS), probe.called_off()).await.is_err(),
            "nobody closes any more"
        );
    }

    #[tokio::test]
    async fn who_gives_up_closing_leaves_it_open() {
        let gate = ExecGate::default();
        let mut probe = gate.probe().unwrap();
        assert!(timeout(Duration::from_millis(20), gate.close()).await.is_err());
        assert!(timeout(Duration::from_millis(2 * PROBE_GRACE_MS), probe.called_off()).await.is_err(), "taken back");
        assert!(gate.enter().await.is_some());
    }
}
