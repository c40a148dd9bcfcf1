//! Waiting for frames that a CPU has taken over but not looked at yet.
//!
//! What a container sends goes into the receive queue of the CPU it ran on, and is handled at once or, on a busy
//! machine, a little later. A port that leaves its bridge before that takes the frame along, and whoever it was for
//! waits for a retransmission. The queues are first in, first out: a frame of our own, sent by the same CPU on the
//! loopback link, comes back behind all that was there.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::tap;

/// IEEE 802's Ethernet type for private experiments: nobody else listens to it.
const MARKER_TYPE: u16 = 0x88b5;
/// How long all queues may take, in milliseconds. It is part of a downtime.
const LIMIT_MS: u64 = 20;

/// Returns when what is in the receive queues of this process's CPUs now has been handled, or after [`LIMIT_MS`].
pub(crate) async fn receive_queues() {
    let (done, result) = oneshot::channel();
    // A thread of its own: it changes its CPU and its priority.
    let body = move || {
        // Nobody waits any more: the caller was cancelled.
        let _ = done.send(pass_through_all());
    };
    if let Err(error) = thread::Builder::new().name("gw-drain".into()).spawn(body) {
        tracing::debug!(%error, "receive queues were not waited for");
        return;
    }
    if let Ok(Err(error)) = result.await {
        tracing::debug!(%error, "receive queues were not waited for");
    }
}

fn pass_through_all() -> io::Result<()> {
    let end = Instant::now() + Duration::from_millis(LIMIT_MS);
    let loopback = nix::net::if_::if_nametoindex("lo")?;
    let socket = tap::packet_socket_for(loopback, MARKER_TYPE)?;
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    // Without it the thread waits for its turn on each CPU: slower, not wrong.
    let _ = tap::run_first();
    for cpu in 0..CpuSet::count() {
        if !allowed.is_set(cpu)? {
            continue;
        }
        let mut only = CpuSet::new();
        only.set(cpu)?;
        // It may have gone offline; its queue went with it.
        if sched_setaffinity(this, &only).is_err() {
            continue;
        }
        let mut marker = [0; 20];
        marker[12..14].copy_from_slice(&MARKER_TYPE.to_be_bytes());
        marker[14..18].copy_from_slice(&u32::try_from(cpu).unwrap_or(u32::MAX).to_be_bytes());
        send(socket.as_raw_fd(), &marker, MsgFlags::empty())?;
        wait_for(&socket, &marker[..18], end)?;
    }
    Ok(())
}

/// Another unplug's marker may come first.
fn wait_for(socket: &OwnedFd, marker: &[u8], end: Instant) -> io::Result<()> {
    let mut buffer = [0; 64];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        let limit = TimeVal::new(0, i64::try_from(left.as_micros()).unwrap_or(1).max(1));
        setsockopt(socket, ReceiveTimeout, &limit)?;
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) if buffer[..length].starts_with(marker) => return Ok(()),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
