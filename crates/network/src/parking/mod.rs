//! Frames that arrive for a container before it is there: kept in order, delivered when its sockets exist.
//!
//! While a port is parked, frames for its MAC **that come in from the overlay** are sent to a tap instead (a rule
//! changes their destination MAC to the tap's, see the firewall), where a thread keeps them. Frames of this host's own
//! containers, and of the host itself, still go to the source of the move; it sends them back as soon as it diverts. So
//! a parking can be opened long before the freeze without cutting anyone off, and nobody has to tell this host when the
//! freeze happens. Once the port is attached the container cannot be at the source any more: from then on the entry
//! for its MAC leads to the tap as well, so that at the end every frame is switched at this host and none is under way
//! to the source and back.
//!
//! ```text
//!  overlay ─▶ gwx ─[rule: MAC → 02:69:…]─▶ bridge ─▶ gwt (tap) ─▶ thread ─▶ queue … deliver() … raw socket on gwp
//!  own containers, host ──[entry for MAC: once attached]──▶┘
//! ```
//!
//! After delivery the thread hands on what still comes by this way until the entry and the rule are gone, so nothing is
//! lost. It runs before everything else on the machine meanwhile: a frame that goes the direct way could overtake one
//! only within the microseconds that one is in the thread's hands.

mod keeper;
mod peers;

use std::fs::File;
use std::net::Ipv4Addr;
use std::sync::Arc;

use rustix::thread::{MembarrierCommand, membarrier};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::error::NetworkError;
use crate::firewall::parking_mac;
use crate::host::HostNetwork;
use crate::link_name::{self, PortRecord};
use crate::netlink::PortMode;
use crate::state::{Parked, Stage};
use crate::sysctl;
use crate::tap;
use crate::types::{Mac, Port};
use keeper::{Command, Counts, Keeper, Thread};
pub(crate) use peers::Peers;

/// The tap gets frames for its own MAC and its container's, and no others.
const TAP_PORT: PortMode = PortMode { flood: false, group_flood: false, hairpin: false, answer: false };
/// Frames that fit between two turns of the thread.
const TAP_QUEUE_FRAMES: u32 = 8192;

/// Frames of one port wait until [`Parking::deliver`] or [`Parking::cancel`]. Dropping it cancels: from that moment on
/// no rule is written for it any more, and what is there is cleared away by a task of the runtime it was made in.
pub struct Parking {
    host: HostNetwork,
    record: PortRecord,
    /// Gone when the end has begun.
    thread: Option<Thread>,
    counts: Arc<Counts>,
    runtime: Handle,
}

/// What a parking holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParkingCounts {
    pub frames: u64,
    pub bytes: u64,
    /// Oldest frames that had to go because there were too many.
    pub dropped: u64,
}

/// What a delivery did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delivered {
    pub frames: u64,
    pub bytes: u64,
    /// Dropped while waiting, or refused by the port.
    pub dropped: u64,
    /// How long the oldest delivered frame had waited, in microseconds.
    pub longest_wait_us: u64,
}

impl HostNetwork {
    /// Opens a parking for a port that will be attached here. Also lets the port send as soon as it is plugged in.
    /// The environment must have been applied, with the host the container comes from among its remotes.
    ///
    /// From here on an apply leaves the container's entries alone, wherever it says that it is, and keeps the network
    /// even if it does not name it.
    pub async fn park(&self, port: &Port) -> Result<Parking, NetworkError> {
        port.validate()?;
        let record = PortRecord::of(port);
        // An earlier one that is being cleared away still has the tap. It ends by itself, whatever goes wrong.
        let present = self.inner.moving.lock().parked.get(&record.id).cloned();
        if let Some(mut ending) = present.filter(|parked| !parked.stage.holds()) {
            while ending.ended.changed().await.is_ok() {}
        }
        let (over, ended) = watch::channel(());
        let mut state = self.inner.state.lock().await;
        let environment = state.environments.iter().find(|environment| environment.vni == record.vni);
        let peers = environment.map(|e| Peers::of(e, self.inner.config.tunnel_address, record.mac)).unwrap_or_default();
        {
            let mut steps = self.inner.moving.lock();
            if steps.holds(&record.id) {
                return Err(NetworkError::AlreadyParked { id: record.id });
            }
            steps.diverted.remove(&(record.vni, record.mac));
            let parked = Parked { record: record.clone(), stage: Stage::Open, peers: peers.clone(), ended };
            steps.parked.insert(record.id.clone(), parked);
        }
        let opened = self.open_tap(&record, port.mtu).await.and_then(|tap| Keeper::start(tap, &record, peers, over));
        let (thread, counts) = match opened {
            Ok(parts) => parts,
            Err(error) => {
                self.inner.moving.lock().parked.remove(&record.id);
                return Err(error);
            }
        };
        // From here on dropping it undoes all.
        let parking = Parking { host: self.clone(), record, thread: Some(thread), counts, runtime: Handle::current() };
        self.sync_firewall(&mut state).await?;
        Ok(parking)
    }
    /// The tap, in the bridge, up, and with the entry for its MAC. It is gone when the file closes.
    async fn open_tap(&self, record: &PortRecord, mtu: u32) -> Result<File, NetworkError> {
        let netlink = &self.inner.netlink;
        let bridge = netlink.existing(&link_name::bridge(record.vni)).await?;
        let name = link_name::tap(&record.id);
        let file = tap::open(&name).map_err(|source| NetworkError::Tap { link: name.clone(), source })?;
        sysctl::set_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
        let link = netlink.existing(&name).await?;
        netlink.set_queue(&link, TAP_QUEUE_FRAMES).await?;
        netlink.set_mtu(&link, mtu).await?;
        netlink.join(&link, bridge.index, TAP_PORT).await?;
        netlink.set_up(&link).await?;
        // Asking makes the kernel finish bringing it up.
        let link = netlink.existing(&name).await?;
        netlink.forward_to_port(&link, parking_mac(&record.id)).await?;
        Ok(file)
    }

    /// Neighbours for a port that is parked, empty for any other.
    pub(crate) fn peers(&self, id: &str) -> Vec<(Ipv4Addr, Mac)> {
        let peers = self.inner.moving.lock().parked.get(id).map(|parked| parked.peers.clone());
        peers.map(|peers| peers.list()).unwrap_or_default()
    }

    /// The port of an open parking is attached: this host's own frames wait too from now on.
    pub(crate) async fn hold_own_frames(&self, record: &PortRecord) -> Result<(), NetworkError> {
        if !self.inner.moving.lock().holds(&record.id) {
            return Ok(());
        }
        let tap = self.inner.netlink.existing(&link_name::tap(&record.id)).await?;
        self.inner.netlink.forward_to_port(&tap, record.mac).await?;
        self.inner.moving.lock().set_stage(&record.id, Stage::Arrived);
        Ok(())
    }

    /// Clears a parking away in the order in which no frame falls between, and goes on after an error. Returns the
    /// first.
    async fn wind_down(self, record: PortRecord, thread: Thread, stage: Stage) -> Result<(), NetworkError> {
        let mut errors = Vec::new();
        let delivered = stage == Stage::Delivered;
        let ways = if delivered { self.open_direct_way(&record).await } else { self.take_back(&record).await };
        errors.extend(ways.err());
        self.inner.moving.lock().set_stage(&record.id, stage);
        {
            let mut state = self.inner.state.lock().await;
            if !delivered {
                errors.extend(self.forward_again(&state, record.vni).await.err());
            }
            errors.extend(self.sync_firewall(&mut state).await.err());
        }
        if delivered {
            // A frame that met the old entry or rule is in the tap when this returns: the kernel's networking works
            // under RCU, and this waits for all who read before. Where it is refused the thread waits a little.
            let waited = tokio::task::spawn_blocking(|| membarrier(MembarrierCommand::Global)).await;
            if !matches!(waited, Ok(Ok(()))) {
                tracing::debug!(?waited, "no barrier on this machine");
            }
        }
        let (done, ended) = oneshot::channel();
        match thread.command(&record, Command::End(Some(done))) {
            Ok(()) => errors.extend(ended.await.map_err(|_| gone(&record)).err()),
            Err(error) => errors.push(error),
        }
        self.inner.moving.lock().parked.remove(&record.id);
        drop(thread);
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    async fn open_direct_way(&self, record: &PortRecord) -> Result<(), NetworkError> {
        let (link, _) = self.port(&record.id).await?;
        if link.controller.is_some() {
            self.inner.netlink.forward_to_port(&link, record.mac).await?;
        }
        Ok(())
    }

    /// What has been attached for a cancelled parking must not be heard, nor hear.
    async fn take_back(&self, record: &PortRecord) -> Result<(), NetworkError> {
        match self.unplug(&record.id).await {
            Err(NetworkError::NoPort { .. }) => Ok(()),
            result => result,
        }
    }
}

impl Parking {
    pub fn counts(&self) -> ParkingCounts {
        self.counts.read()
    }

    /// Hands the waiting frames to the port in order, then opens the direct way. The port must be attached; whether
    /// it is plugged in makes no difference to this. The frames are with the container before the rest (some
    /// milliseconds of clearing away) is done, and the rest is done even if the caller stops waiting for it.
    pub async fn deliver(mut self) -> Result<Delivered, NetworkError> {
        let delivered = self.hand_out().await?;
        self.end().await?;
        Ok(delivered)
    }

    /// The first half of [`Parking::deliver`]: the waiting frames are with the container. Frames take the way over
    /// the parking until [`Parking::end`].
    pub async fn hand_out(&mut self) -> Result<Delivered, NetworkError> {
        let (link, _) = self.host.port(&self.record.id).await?;
        let failed = |source| NetworkError::RawSocket { link: link.name.clone(), source };
        let socket = tap::packet_socket(link.index).map_err(failed)?;
        let (done, result) = oneshot::channel();
        self.host.inner.moving.lock().set_stage(&self.record.id, Stage::Delivering);
        let thread = self.thread.as_ref().ok_or_else(|| gone(&self.record))?;
        thread.command(&self.record, Command::Deliver(socket, done))?;
        result.await.map_err(|_| gone(&self.record))
    }

    /// Drops the waiting frames; everything goes the way the last apply said. A port that was attached meanwhile is
    /// unplugged.
    pub async fn cancel(self) -> Result<(), NetworkError> {
        self.end().await
    }

    /// Clears the parking away: after [`Parking::hand_out`] the direct way is open when this returns, without it the
    /// waiting frames are dropped. The next move of the container must not begin before that.
    pub async fn end(mut self) -> Result<(), NetworkError> {
        match self.begin_end() {
            // Not even a panic in there keeps the thread: it ends when its owner is dropped.
            Some(task) => task.await.unwrap_or_else(|_| Err(gone(&self.record))),
            None => Ok(()),
        }
    }

    fn begin_end(&mut self) -> Option<JoinHandle<Result<(), NetworkError>>> {
        let thread = self.thread.take()?;
        let stage = {
            let mut steps = self.host.inner.moving.lock();
            let delivering = steps.parked.get(&self.record.id).is_some_and(|p| p.stage == Stage::Delivering);
            if !delivering {
                // At once, so that whatever writes rules or entries next leaves this parking out.
                steps.set_stage(&self.record.id, Stage::Cancelled);
            }
            if delivering { Stage::Delivered } else { Stage::Cancelled }
        };
        Some(self.runtime.spawn(self.host.clone().wind_down(self.record.clone(), thread, stage)))
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        let id = self.record.id.clone();
        if let Some(task) = self.begin_end() {
            self.runtime.spawn(async move {
                if let Ok(Err(error)) = task.await {
                    tracing::error!(%error, id, "a dropped parking was not cleared away");
                }
            });
        }
    }
}

fn gone(record: &PortRecord) -> NetworkError {
    NetworkError::ParkingGone { id: record.id.clone() }
}
