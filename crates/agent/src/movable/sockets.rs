//! What sockets hold that is lost or in the way: datagrams begun and not sent (corked), netlink messages nobody reads.
//!
//! The kernel tells how many bytes wait in which socket, not why. What a busy program is just about to send or read looks
//! the same, for a moment: so it is a reason only when the same bytes wait in the same socket for a while.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use super::Reasons;

/// What waits as long as this is not on its way, in milliseconds.
const STUCK_MS: u64 = 1_000;
/// Read of one of the kernel's lists, at the most, in bytes: some 30,000 sockets.
const MAX_LIST_BYTES: u64 = 4 << 20;
const UDP_LISTS: [&str; 4] = ["udp", "udp6", "udplite", "udplite6"];

/// Which sockets held how many bytes, since when; by inode.
#[derive(Default)]
pub struct Waiting(HashMap<u64, (Held, Instant)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    bytes: u64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Local port of the socket.
    Datagrams(u16),
    Netlink,
}

impl Waiting {
    /// Looks at the sockets of the network namespace of process `init`; adds what was there before already.
    pub fn look(&mut self, init: u32, now: Instant, reasons: &mut Reasons) {
        let mut seen = HashMap::new();
        for list in UDP_LISTS {
            seen.extend(lines(init, list).filter_map(|line| datagrams(&line)));
        }
        seen.extend(lines(init, "netlink").filter_map(|line| netlink(&line)));
        let before = std::mem::take(&mut self.0);
        for (inode, held) in seen {
            let since = before.get(&inode).filter(|(old, _)| *old == held).map_or(now, |(_, since)| *since);
            if now.duration_since(since) >= Duration::from_millis(STUCK_MS) {
                reasons.container(held.sentence());
            }
            self.0.insert(inode, (held, since));
        }
    }
}

impl Held {
    fn sentence(self) -> String {
        match self.kind {
            Kind::Datagrams(port) => format!(
                "the UDP socket on port {port} has begun a datagram that it does not send (UDP_CORK, MSG_MORE); it would be \
                 lost"
            ),
            Kind::Netlink => "a netlink socket holds messages that nobody reads, which CRIU cannot carry".to_owned(),
        }
    }
}

fn lines(init: u32, list: &str) -> impl Iterator<Item = String> {
    let file = File::open(format!("/proc/{init}/net/{list}")).ok();
    let lines = file.map(|file| BufReader::new(file.take(MAX_LIST_BYTES)).lines().map_while(Result::ok));
    // The first is the head.
    lines.into_iter().flatten().skip(1)
}

/// `sl local_address rem_address st tx_queue:rx_queue tr:when retrnsmt uid timeout inode …`, numbers in hexadecimal but
/// for uid, timeout and inode.
fn datagrams(line: &str) -> Option<(u64, Held)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let port = u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()?;
    let bytes = u64::from_str_radix(fields.get(4)?.split_once(':')?.0, 16).ok()?;
    let inode = fields.get(9)?.parse().ok()?;
    (bytes > 0).then_some((inode, Held { bytes, kind: Kind::Datagrams(port) }))
}

/// `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`. Those of the kernel itself have the number 0.
fn netlink(line: &str) -> Option<(u64, Held)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    if *fields.get(2)? == "0" {
        return None;
    }
    let bytes = fields.get(4)?.parse().ok()?;
    let inode = fields.get(9)?.parse().ok()?;
    (bytes > 0).then_some((inode, Held { bytes, kind: Kind::Netlink }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    use rustix::net::{SendFlags, send};

    fn found(waiting: &mut Waiting, now: Instant) -> Vec<String> {
        let mut reasons = Reasons::default();
        waiting.look(std::process::id(), now, &mut reasons);
        reasons.sentences()
    }

    /// Other tests of this machine have sockets too: only this one's port is asked for.
    fn told(waiting: &mut Waiting, now: Instant, port: u16) -> bool {
        found(waiting, now).iter().any(|sentence| sentence.contains(&format!("port {port} ")))
    }

    #[test]
    fn a_datagram_that_is_begun_and_not_sent_is_told_after_a_while() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        let port = sender.local_addr().unwrap().port();
        let (start, while_ms) = (Instant::now(), Duration::from_millis(STUCK_MS));
        let mut waiting = Waiting::default();
        sender.send(b"whole").unwrap();
        assert!(!told(&mut waiting, start, port));
        assert!(!told(&mut waiting, start + while_ms, port), "it is sent");
        send(&sender, b"begun", SendFlags::MORE).unwrap();
        assert!(!told(&mut waiting, start + while_ms * 2, port), "it may be on its way");
        assert!(told(&mut waiting, start + while_ms * 3, port));
        sender.send(b" and ended").unwrap();
        assert!(!told(&mut waiting, start + while_ms * 4, port));
    }

    #[test]
    fn netlink_messages_that_nobody_reads_are_told_after_a_while() {
        use nix::sys::socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, sendto, socket,
        };
        use std::os::fd::AsRawFd;
        let flags = SockFlag::empty();
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute).unwrap();
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
        let (start, while_ms) = (Instant::now(), Duration::from_millis(STUCK_MS));
        let mut waiting = Waiting::default();
        found(&mut waiting, start);
        // RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP: a header and a generic family.
        let mut request = [0u8; 20];
        request[0..4].copy_from_slice(&20u32.to_ne_bytes());
        request[4..6].copy_from_slice(&18u16.to_ne_bytes());
        request[6..8].copy_from_slice(&0x301u16.to_ne_bytes());
        sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty()).unwrap();
        found(&mut waiting, start + while_ms);
        let said = found(&mut waiting, start + while_ms * 2);
        assert!(said.iter().any(|sentence| sentence.contains("netlink")), "{said:?}");
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        let udp =
            " 1203: 0100007F:D431 0100007F:1F90 01 00000300:00000000 00:00000000 00000000     0        0 77 2 0000 0";
        let held = Held { bytes: 0x300, kind: Kind::Datagrams(0xD431) };
        assert_eq!(datagrams(udp), Some((77, held)));
        assert_eq!(datagrams("  sl  local_address rem_address   st tx_queue"), None);
        let mine = "0000 0   4242 00000000 2304 0 0 2 0 99";
        assert_eq!(netlink(mine), Some((99, Held { bytes: 2304, kind: Kind::Netlink })));
        assert_eq!(netlink("0000 0   0 00000000 2304 0 0 2 0 99"), None);
    }
}
