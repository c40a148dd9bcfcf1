//! The system calls no safe wrapper covers: making a tap interface, binding a raw packet socket to a link, and a
//! thread's scheduling class.
//! All `unsafe` of this crate is in this file.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

/// Opens a tap interface `name` (created, down, gone when the returned file closes) in the calling thread's network
/// namespace. Each read returns one Ethernet frame, segmented and with checksums filled in; reads do not block.
pub(crate) fn open(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes exactly one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// A raw packet socket that sends on link `index` and receives nothing (protocol 0), in the calling thread's network
/// namespace. What is sent on a veth end arrives at its peer, whether or not the end is in a bridge.
pub(crate) fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    packet_socket_for(index, 0)
}

/// Like [`packet_socket`], but it receives frames of this Ethernet type that arrive on the link.
pub(crate) fn packet_socket_for(index: u32, ethernet_type: u16) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)?;
    // SAFETY: `sockaddr_ll` is plain data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = ethernet_type.to_be();
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the pointer and length describe `address`, which outlives the call; the kernel copies it.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast::<libc::sockaddr>(),
            mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// The calling thread runs before all threads of ordinary priority from now on (`SCHED_FIFO`). It must sleep most of
/// the time.
pub(crate) fn run_first() -> io::Result<()> {
    let lowest_of_its_class = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread, and the pointer is to a parameter that outlives the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest_of_its_class) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
