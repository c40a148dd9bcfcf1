//! The thread that keeps the frames of one parking.

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
use tokio::sync::{oneshot, watch};

use super::peers::Peers;
use super::{Delivered, ParkingCounts};
use crate::error::NetworkError;
use crate::firewall::parking_mac;
use crate::link_name::PortRecord;
use crate::tap;
use crate::types::Mac;

/// What one parking keeps at most; beyond either the oldest frames are dropped (their senders send them again).
const MAX_PARKED_BYTES: usize = 16 << 20;
const MAX_PARKED_FRAMES: usize = 100_000;
/// Batches handed on before a delivery says that it has caught up.
const MAX_CATCH_UP_BATCHES: usize = 64;
/// Larger than any frame a link of ours carries.
const MAX_FRAME_BYTES: usize = 65_536;
/// How long a delivery goes on after its end was asked for while nothing comes, in milliseconds: for machines whose
/// kernel cannot say that nothing is on its way any more.
const STRAGGLER_MS: i64 = 5;
/// Frames handed on in one go before commands are looked at again.
const MAX_BATCH_FRAMES: usize = 4096;

pub(super) enum Command {
    /// Send what waits, and from now on all that comes, by this socket.
    Deliver(OwnedFd, oneshot::Sender<Delivered>),
    /// Hand on the last frames if delivering, and end. Answered when the tap is gone.
    End(Option<oneshot::Sender<()>>),
}

#[derive(Default)]
pub(super) struct Counts {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

impl Counts {
    pub(super) fn read(&self) -> ParkingCounts {
        ParkingCounts {
            frames: self.frames.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}

/// The thread as the rest sees it. Dropping it ends the thread without waiting.
pub(super) struct Thread {
    commands: Sender<Command>,
    wake: OwnedFd,
    /// Whoever watches the other end learns that the parking is over.
    _over: watch::Sender<()>,
}

impl Thread {
    pub(super) fn command(&self, record: &PortRecord, command: Command) -> Result<(), NetworkError> {
        self.commands.send(command).map_err(|_| NetworkError::ParkingGone { id: record.id.clone() })?;
        // Fails only if the counter is full, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        Ok(())
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // If the thread is gone there is nothing to end.
        let _ = self.commands.send(Command::End(None));
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

pub(super) struct Keeper {
    tap: File,
    wake: OwnedFd,
    mac: Mac,
    parking_mac: Mac,
    /// Frames from the overlay.
    queue: VecDeque<(Instant, Vec<u8>)>,
    /// Frames of this host's own, which come straight here since the port is attached. Before that they went to the
    /// source of the move and came back over the overlay: what is in the other queue is older.
    own: VecDeque<(Instant, Vec<u8>)>,
    queued_bytes: usize,
    /// Where frames are handed on to, once they are.
    out: Option<OwnedFd>,
    delivered: Delivered,
    peers: Peers,
    counts: Arc<Counts>,
    buffer: Vec<u8>,
}

impl Keeper {
    pub(super) fn start(
        tap: File,
        record: &PortRecord,
        peers: Peers,
        over: watch::Sender<()>,
    ) -> Result<(Thread, Arc<Counts>), NetworkError> {
        let failed = |source| NetworkError::Thread { what: "parked frames", source };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|error| failed(error.into()))?;
        let keeper = Self::new(tap, wake.try_clone().map_err(failed)?, record, peers);
        let counts = keeper.counts.clone();
        let (commands, inbox) = channel();
        let body = move || {
            // A frame that goes the direct way must not get past one in this thread's hands, however busy the
            // machine is. Where that is not allowed the thread is as good as any other.
            if let Err(error) = tap::run_first() {
                tracing::debug!(%error, "parked frames are handed on with ordinary priority");
            }
            let ended = { keeper }.run(&inbox);
            match ended {
                Ok(Some(done)) => drop(done.send(())),
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "parked frames are lost"),
            }
        };
        thread::Builder::new().name("gw-parking".into()).spawn(body).map_err(failed)?;
        Ok((Thread { commands, wake, _over: over }, counts))
    }

    fn new(tap: File, wake: OwnedFd, record: &PortRecord, peers: Peers) -> Self {
        Self {
            tap,
            wake,
            mac: record.mac,
            parking_mac: parking_mac(&record.id),
            queue: VecDeque::new(),
            own: VecDeque::new(),
            queued_bytes: 0,
            out: None,
            delivered: Delivered::default(),
            peers,
            counts: Arc::default(),
            buffer: vec![0; MAX_FRAME_BYTES],
        }
    }

    /// Returns whom to tell that it ended; the tap is gone by then.
    fn run(mut self, inbox: &Receiver<Command>) -> io::Result<Option<oneshot::Sender<()>>> {
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
                        self.catch_up()?;
                        let _ = done.send(self.delivered);
                    }
                    Command::End(done) => {
                        if self.out.is_some() {
                            while self.wait(Some(STRAGGLER_MS))? {
                                self.take_in()?;
                            }
                        }
                        return Ok(done);
                    }
                }
            }
        }
    }

    /// Hands on what came while the queue was handed on: whoever opens the direct way after this must find nothing left
    /// to overtake. Bounded, should frames come faster than they go.
    fn catch_up(&mut self) -> io::Result<()> {
        for _ in 0..MAX_CATCH_UP_BATCHES {
            if self.take_in()? == 0 {
                break;
            }
        }
        Ok(())
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

    /// Reads what the tap has, up to a batch, and hands it on at once if delivering. Returns how many frames.
    fn take_in(&mut self) -> io::Result<usize> {
        for frames in 0..MAX_BATCH_FRAMES {
            let length = match self.tap.read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(frames),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.sort_in(self.buffer[..length].to_vec());
        }
        Ok(MAX_BATCH_FRAMES)
    }

    fn sort_in(&mut self, mut frame: Vec<u8>) {
        // The host's own stack may speak on any link that is up; that is not for the container.
        let Some(to) = frame.first_chunk::<6>().copied().filter(|_| frame.len() >= 14) else { return };
        let from_overlay = to == self.parking_mac.0;
        if !from_overlay && to != self.mac.0 {
            return;
        }
        frame[..6].copy_from_slice(&self.mac.0);
        self.peers.notice(&frame);
        if self.out.is_some() {
            self.hand_on(Instant::now(), &frame);
        } else {
            self.keep(frame, from_overlay);
        }
    }

    fn keep(&mut self, frame: Vec<u8>, from_overlay: bool) {
        self.queued_bytes += frame.len();
        let queue = if from_overlay { &mut self.queue } else { &mut self.own };
        queue.push_back((Instant::now(), frame));
        while self.queued_bytes > MAX_PARKED_BYTES || self.queue.len() + self.own.len() > MAX_PARKED_FRAMES {
            let Some((_, oldest)) = self.queue.pop_front().or_else(|| self.own.pop_front()) else { break };
            self.queued_bytes -= oldest.len();
            self.delivered.dropped += 1;
        }
        self.publish();
    }

    fn flush(&mut self) {
        let waiting = std::mem::take(&mut self.queue).into_iter().chain(std::mem::take(&mut self.own));
        for (arrived, frame) in waiting {
            self.hand_on(arrived, &frame);
        }
        self.queued_bytes = 0;
        self.publish();
    }

    fn hand_on(&mut self, arrived: Instant, frame: &[u8]) {
        let Some(out) = &self.out else { return };
        let waited = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.delivered.longest_wait_us = self.delivered.longest_wait_us.max(waited);
        match send(out, frame, SendFlags::empty()) {
            Ok(_) => {
                self.delivered.frames += 1;
                self.delivered.bytes += frame.len() as u64;
            }
            // The link went, or is out of memory: like a frame lost on the wire.
            Err(_) => self.delivered.dropped += 1,
        }
    }

    fn publish(&self) {
        self.counts.frames.store((self.queue.len() + self.own.len()) as u64, Ordering::Relaxed);
        self.counts.bytes.store(self.queued_bytes as u64, Ordering::Relaxed);
        self.counts.dropped.store(self.delivered.dropped, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn keeper() -> Keeper {
        let record = PortRecord {
            id: "0123456789ab".into(),
            vni: 1,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            address: Ipv4Addr::new(10, 0, 0, 1),
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Keeper::new(File::open("/dev/null").unwrap(), wake, &record, Peers::default())
    }

    #[test]
    fn a_full_parking_drops_the_oldest() {
        let mut keeper = keeper();
        let frames = 20_000_usize;
        for number in 0..frames {
            let mut frame = vec![0; 1400];
            frame[..8].copy_from_slice(&(number as u64).to_be_bytes());
            keeper.keep(frame, true);
        }
        assert!(keeper.queued_bytes <= MAX_PARKED_BYTES);
        assert_eq!(keeper.queue.len() + keeper.delivered.dropped as usize, frames);
        let last = keeper.queue.back().unwrap();
        assert_eq!(last.1[..8], (frames as u64 - 1).to_be_bytes());
        assert!(keeper.delivered.dropped > 0);
    }

    #[test]
    fn frames_are_told_apart_by_the_way_they_came() {
        let mut keeper = keeper();
        let frame = |to: Mac, mark: u8| [&to.0[..], &[mark; 30]].concat();
        let (direct, over) = (keeper.mac, keeper.parking_mac);
        for (to, mark) in [(direct, 1), (over, 2), (Mac([1; 6]), 3), (direct, 4), (over, 5)] {
            keeper.sort_in(frame(to, mark));
        }
        keeper.sort_in(vec![1, 2, 3]);
        let marks = |queue: &VecDeque<(Instant, Vec<u8>)>| queue.iter().map(|(_, frame)| frame[20]).collect::<Vec<_>>();
        assert_eq!((marks(&keeper.queue), marks(&keeper.own)), (vec![2, 5], vec![1, 4]));
        assert!(keeper.queue.iter().all(|(_, frame)| frame[..6] == direct.0), "they are for the container again");
    }
}
