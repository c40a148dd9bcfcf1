//! Raw frames, for tests that must send what no honest stack sends.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use godwit_network::Mac;
use nix::libc;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, send, sendto, setsockopt, socket,
};
use nix::sys::time::TimeVal;

/// How long something that must happen may take on a machine that others load. Nothing waits as long as that: it waits
/// for the event.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Sends frames on `eth0` of the calling thread's namespace.
pub fn send_frames(frames: &[Vec<u8>]) {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None::<SockProtocol>).unwrap();
    let index = nix::net::if_::if_nametoindex("eth0").unwrap();
    // SAFETY: all zeroes is a valid `sockaddr_ll`, and the pointer and length passed to bind describe it.
    let result = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    for frame in frames {
        send(socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
    }
}

/// Everything that arrives in the namespace of the thread that opened it.
pub struct Listener(OwnedFd);

impl Listener {
    pub fn open() -> Self {
        let all = Some(SockProtocol::EthAll);
        Self(socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), all).unwrap())
    }

    /// Whether a frame that contains `mark` arrives within [`PATIENCE`].
    pub fn hears(&self, mark: &[u8]) -> bool {
        self.first_of(&[mark]).is_some()
    }

    /// Which of the marks is in the first frame that has one, within [`PATIENCE`]. A frame that must not arrive is told
    /// from one that is late by an honest one sent behind it.
    pub fn first_of(&self, marks: &[&[u8]]) -> Option<usize> {
        let end = Instant::now() + PATIENCE;
        setsockopt(&self.0, ReceiveTimeout, &TimeVal::new(0, 20_000)).unwrap();
        let mut buffer = [0; 2048];
        while Instant::now() < end {
            let Ok(length) = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
            let has = |mark: &[u8]| buffer[..length].windows(mark.len()).any(|window| window == mark);
            if let Some(found) = marks.iter().position(|mark| has(mark)) {
                return Some(found);
            }
        }
        None
    }
}

pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0, &from.0, &kind.to_be_bytes()[..], payload].concat()
}

/// A UDP packet in IPv4, without UDP checksum (allowed by RFC 768).
pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let length = |extra: usize| u16::try_from(payload.len() + extra).unwrap().to_be_bytes();
    let mut header = vec![0x45, 0];
    header.extend(length(28));
    header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    header.extend(from.0.octets());
    header.extend(to.0.octets());
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = !(((sum & 0xffff) + (sum >> 16)) as u16);
    header[10..12].copy_from_slice(&folded.to_be_bytes());
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes(), length(8), [0, 0]].concat();
    [header, ports, payload.to_vec()].concat()
}

/// An ARP packet with a mark behind it (padding is carried along).
pub fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr), mark: &[u8]) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(sender.0.0);
    packet.extend(sender.1.octets());
    packet.extend(target.0.0);
    packet.extend(target.1.octets());
    packet.extend(mark);
    packet
}

/// Whether `address` answers an echo request with `payload_bytes` of payload within `patience`, asked from the
/// calling thread's namespace.
pub fn ping(address: Ipv4Addr, payload_bytes: usize, patience: Duration) -> bool {
    let icmp = Some(SockProtocol::Icmp);
    let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), icmp).unwrap();
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 20_000)).unwrap();
    let identifier = (std::process::id() as u16).to_be_bytes();
    let mut packet = [&[8, 0, 0, 0][..], &identifier, &[0, 1], &vec![0; payload_bytes]].concat();
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    packet[2..4].copy_from_slice(&(!(((sum & 0xffff) + (sum >> 16)) as u16)).to_be_bytes());
    let to = SockaddrIn::from(SocketAddrV4::new(address, 0));
    if sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty()).is_err() {
        return false;
    }
    let end = Instant::now() + patience;
    let mut buffer = vec![0; 4096];
    while Instant::now() < end {
        let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
        // Behind the IPv4 header: type 0 is the echo reply (RFC 792).
        if length >= 28 && buffer[12..16] == address.octets() && buffer[20] == 0 && buffer[24..26] == identifier {
            return true;
        }
    }
    false
}
