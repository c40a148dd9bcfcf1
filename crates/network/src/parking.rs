//! Frames that arrive for a container before it is there: kept in order, delivered when its sockets exist.
//!
//! While a port is parked, frames for its MAC **that come in from the overlay** are sent to a tap instead (a rule
//! changes their destination MAC to the tap's, see the firewall), where a thread keeps them. Frames of this host's own
//! containers still go to the source of the move; it sends them back as soon as it diverts. So a parking can be opened
//! long before the freeze without cutting anyone off, and nobody has to tell this host when the freeze happens.
//!
//! ```text
//!  overlay ─▶ gwx ─[rule: MAC → 02:69:…]─▶ bridge ─▶ gwt (tap) ─▶ thread ─▶ queue … deliver() … raw socket on gwp
//! ```
//!
//! After delivery the thread hands on what still comes by this way until the rule is gone, so nothing is lost; a frame
//! that goes the direct way may overtake one that is still in the thread's hands for some microseconds.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendFlags, send};
use tokio::sync::oneshot;

use crate::error::NetworkError;
use crate::firewall::parking_mac;
use crate::host::HostNetwork;
use crate::link_name::{self, PortRecord};
use crate::netlink::PortMode;
use crate::sysctl;
use crate::tap;
use crate::types::{Mac, Port};

/// What one parking keeps at most; beyond either the oldest frames are dropped (their senders send them again).
const MAX_PARKED_BYTES: usize = 16 << 20;
const MAX_PARKED_FRAMES: usize = 100_000;
/// Larger than any frame a link of ours carries.
const MAX_FRAME_BYTES: usize = 65_536;
/// How long a frame that was on its way to the tap when the rule went may take, in milliseconds.
const STRAGGLER_MS: i64 = 5;
/// Frames handed on in one go before commands are looked at again.
const MAX_BATCH_FRAMES: usize = 4096;
/// The tap gets frames for its own MAC and no others.
const TAP_PORT: PortMode = PortMode { flood: false, group_flood: false, hairpin: false, answer: false };
/// Frames that fit between two turns of the thread.
const TAP_QUEUE_FRAMES: u32 = 8192;

/// Frames of one port wait until [`Parking::deliver`] or [`Parking::cancel`]. Dropping it cancels.
pub struct Parking {
    host: HostNetwork,
    record: PortRecord,
    commands: Sender<Command>,
    wake: OwnedFd,
    counts: Arc<Counts>,
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

#[derive(Default)]
struct Counts {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

enum Command {
    /// Send what waits, and from now on all that comes, by this socket.
    Deliver(OwnedFd, oneshot::Sender<Delivered>),
    /// Hand on the last frames if delivering, and end.
    End(oneshot::Sender<()>),
}

impl HostNetwork {
    /// Opens a parking for a port that will be attached here. Also lets the port send as soon as it is plugged in.
    /// The environment must have been applied, with the host the container comes from among its remotes.
    pub async fn park(&self, port: &Port) -> Result<Parking, NetworkError> {
        port.validate()?;
        let record = PortRecord::of(port);
        {
            let mut steps = self.inner.moving.lock();
            if steps.parked.contains_key(&record.id) {
                return Err(NetworkError::AlreadyParked { id: record.id });
            }
            steps.diverted.remove(&(record.vni, record.mac));
            steps.parked.insert(record.id.clone(), record.clone());
        }
        let opened = self.open_tap(&record, port.mtu).await.and_then(|tap| Keeper::start(tap, &record));
        let (commands, wake, counts) = match opened {
            Ok(parts) => parts,
            Err(error) => {
                self.inner.moving.lock().parked.remove(&record.id);
                return Err(error);
            }
        };
        // From here on dropping it undoes all.
        let parking = Parking { host: self.clone(), record, commands, wake, counts };
        self.sync_firewall(&mut *self.inner.state.lock().await).await?;
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
}

impl Parking {
    pub fn counts(&self) -> ParkingCounts {
        ParkingCounts {
            frames: self.counts.frames.load(Ordering::Relaxed),
            bytes: self.counts.bytes.load(Ordering::Relaxed),
            dropped: self.counts.dropped.load(Ordering::Relaxed),
        }
    }

    /// Hands the waiting frames to the port in order, then opens the direct way. The port must be attached; whether
    /// it is plugged in makes no difference to this. The frames are with the container before the rest (some
    /// milliseconds of clearing away) is done.
    pub async fn deliver(self) -> Result<Delivered, NetworkError> {
        let netlink = &self.host.inner.netlink;
        let (link, _) = self.host.port(&self.record.id).await?;
        let failed = |source| NetworkError::RawSocket { link: link.name.clone(), source };
        let socket = tap::packet_socket(link.index).map_err(failed)?;
        let (done, result) = oneshot::channel();
        self.command(Command::Deliver(socket, done))?;
        let delivered = result.await.map_err(|_| self.gone())?;
        if link.controller.is_some() {
            netlink.forward_to_port(&link, self.record.mac).await?;
        }
        self.close().await?;
        Ok(delivered)
    }

    /// Drops the waiting frames; everything goes the way it went before.
    pub async fn cancel(self) -> Result<(), NetworkError> {
        self.close().await
    }

    /// Removes the rule first, then ends the thread and with it the tap, so that no frame falls between.
    async fn close(&self) -> Result<(), NetworkError> {
        self.host.inner.moving.lock().parked.remove(&self.record.id);
        self.host.sync_firewall(&mut *self.host.inner.state.lock().await).await?;
        let (done, result) = oneshot::channel();
        self.command(Command::End(done))?;
        result.await.map_err(|_| self.gone())
    }

    fn command(&self, command: Command) -> Result<(), NetworkError> {
        self.commands.send(command).map_err(|_| self.gone())?;
        ring(&self.wake);
        Ok(())
    }

    fn gone(&self) -> NetworkError {
        NetworkError::ParkingGone { id: self.record.id.clone() }
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        self.host.inner.moving.lock().parked.remove(&self.record.id);
        let (done, _) = oneshot::channel();
        // If the thread is gone there is nothing to end. The rule goes with the next apply; without the tap its MAC
        // leads nowhere.
        let _ = self.commands.send(Command::End(done));
        ring(&self.wake);
    }
}

fn ring(wake: &OwnedFd) {
    // Fails only if the counter is full, and then the thread is awake anyway.
    let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
}

/// The thread that keeps the frames.
struct Keeper {
    tap: File,
    wake: OwnedFd,
    mac: Mac,
    parking_mac: Mac,
    queue: VecDeque<(Instant, Vec<u8>)>,
    queued_bytes: usize,
    out: Option<OwnedFd>,
    delivered: Delivered,
    counts: Arc<Counts>,
    buffer: Vec<u8>,
}

impl Keeper {
    fn start(tap: File, record: &PortRecord) -> Result<(Sender<Command>, OwnedFd, Arc<Counts>), NetworkError> {
        let failed = |source| NetworkError::Thread { what: "parked frames", source };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|error| failed(error.into()))?;
        let counts = Arc::new(Counts::default());
        let mut keeper = Self {
            tap,
            wake: wake.try_clone().map_err(failed)?,
            mac: record.mac,
            parking_mac: parking_mac(&record.id),
            queue: VecDeque::new(),
            queued_bytes: 0,
            out: None,
            delivered: Delivered::default(),
            counts: counts.clone(),
            buffer: vec![0; MAX_FRAME_BYTES],
        };
        let (commands, inbox) = channel();
        let body = move || {
            if let Err(error) = keeper.run(&inbox) {
                tracing::error!(%error, "parked frames are lost");
            }
        };
        thread::Builder::new().name("gw-parking".into()).spawn(body).map_err(failed)?;
        Ok((commands, wake, counts))
    }

    fn run(&mut self, inbox: &Receiver<Command>) -> io::Result<()> {
        loop {
            self.wait(None)?;
            let mut rung = [0; 8];
            // Nothing to read only means that it was a frame that woke us.
            let _ = rustix::io::read(&self.wake, &mut rung);
            self.take_in()?;
            for command in inbox.try_iter() {
                match command {
                    Command::Deliver(socket, done) => {
                        self.out = Some(socket);
                        self.flush();
                        let _ = done.send(self.delivered);
                    }
                    Command::End(done) => {
                        if self.out.is_some() {
                            while self.wait(Some(STRAGGLER_MS))? {
                                self.take_in()?;
                            }
                        }
                        let _ = done.send(());
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Waits for a frame or, without a limit, also for a command. True if there is something.
    fn wait(&self, limit_ms: Option<i64>) -> io::Result<bool> {
        let tap = PollFd::new(&self.tap, PollFlags::IN);
        let wake = PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN);
        let limit = limit_ms.map(|ms| Timespec { tv_sec: ms / 1000, tv_nsec: (ms % 1000) * 1_000_000 });
        let mut both = [tap, wake];
        let watched = if limit.is_some() { &mut both[..1] } else { &mut both[..] };
        match poll(watched, limit.as_ref()) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what the tap has, up to a batch, and hands it on if delivering.
    fn take_in(&mut self) -> io::Result<()> {
        for _ in 0..MAX_BATCH_FRAMES {
            let length = match self.tap.read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut frame = self.buffer[..length].to_vec();
            // The host's own stack may speak on any link that is up; that is not for the container.
            if frame.len() < 14 || frame[..6] != self.parking_mac.0 {
                continue;
            }
            frame[..6].copy_from_slice(&self.mac.0);
            self.keep(frame);
        }
        if self.out.is_some() {
            self.flush();
        }
        Ok(())
    }

    fn keep(&mut self, frame: Vec<u8>) {
        self.queued_bytes += frame.len();
        self.queue.push_back((Instant::now(), frame));
        while self.queued_bytes > MAX_PARKED_BYTES || self.queue.len() > MAX_PARKED_FRAMES {
            let Some((_, oldest)) = self.queue.pop_front() else { break };
            self.queued_bytes -= oldest.len();
            self.delivered.dropped += 1;
        }
        self.publish();
    }

    fn flush(&mut self) {
        let Some(out) = &self.out else { return };
        for (arrived, frame) in self.queue.drain(..) {
            let waited = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.delivered.longest_wait_us = self.delivered.longest_wait_us.max(waited);
            match send(out, &frame, SendFlags::empty()) {
                Ok(_) => {
                    self.delivered.frames += 1;
                    self.delivered.bytes += frame.len() as u64;
                }
                // The link went, or is out of memory: like a frame lost on the wire.
                Err(_) => self.delivered.dropped += 1,
            }
        }
        self.queued_bytes = 0;
        self.publish();
    }

    fn publish(&self) {
        self.counts.frames.store(self.queue.len() as u64, Ordering::Relaxed);
        self.counts.bytes.store(self.queued_bytes as u64, Ordering::Relaxed);
        self.counts.dropped.store(self.delivered.dropped, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn a_full_parking_drops_the_oldest() {
        let record = PortRecord {
            id: "0123456789ab".into(),
            vni: 1,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            address: Ipv4Addr::new(10, 0, 0, 1),
        };
        let mut keeper = Keeper {
            tap: File::open("/dev/null").unwrap(),
            wake: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            mac: record.mac,
            parking_mac: parking_mac(&record.id),
            queue: VecDeque::new(),
            queued_bytes: 0,
            out: None,
            delivered: Delivered::default(),
            counts: Arc::default(),
            buffer: vec![],
        };
        let frames = 20_000_usize;
        for number in 0..frames {
            let mut frame = vec![0; 1400];
            frame[..8].copy_from_slice(&(number as u64).to_be_bytes());
            keeper.keep(frame);
        }
        assert!(keeper.queued_bytes <= MAX_PARKED_BYTES);
        assert_eq!(keeper.queue.len() + keeper.delivered.dropped as usize, frames);
        let last = keeper.queue.back().unwrap();
        assert_eq!(last.1[..8], (frames as u64 - 1).to_be_bytes());
        assert!(keeper.delivered.dropped > 0);
    }
}
