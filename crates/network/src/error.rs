//! One error for every operation on the host's network: the thing, the cause, the way out.

use std::io;
use std::net::Ipv4Addr;

use thiserror::Error;

use crate::types::{InvalidNetwork, Mac};

#[derive(Debug, Error)]
pub enum NetworkError {
    #[error("the network description was refused")]
    Invalid(#[from] InvalidNetwork),
    #[error("no netlink connection to the kernel: run as root")]
    Connect(#[source] io::Error),
    #[error("the kernel refused to {action} {link}")]
    Link {
        action: &'static str,
        link: String,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("the kernel's list of {what} could not be read")]
    List {
        what: &'static str,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("the forwarding entry for {mac} on {link} could not be {action}")]
    Forwarding {
        action: &'static str,
        mac: Mac,
        link: String,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("the neighbour entry for {address} on {link} could not be written")]
    Neighbour {
        address: Ipv4Addr,
        link: String,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("interface {link} does not exist: apply the environment's network first")]
    NoLink { link: String },
    #[error("port {id} is not attached on this host: attach it first")]
    NoPort { id: String },
    #[error("port {id} is parked already: deliver or cancel that parking first")]
    AlreadyParked { id: String },
    #[error("the network namespace of process {pid} cannot be entered: is the process still there?")]
    Namespace {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("a thread for {what} could not be started: is the limit of tasks reached?")]
    Thread {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{path} could not be set to `{value}`")]
    Sysctl {
        path: String,
        value: String,
        #[source]
        source: io::Error,
    },
    #[error("`nft` could not be run: install nftables 1.0 or newer")]
    NftMissing(#[source] io::Error),
    #[error("nft refused the rules ({action}): {message}")]
    Nft { action: &'static str, message: String },
    #[error("nft did not answer within {seconds} s ({action}): look for a hanging `nft` process")]
    NftTimeout { action: &'static str, seconds: u64 },
    #[error("tap {link} for parked frames could not be opened: is /dev/net/tun there?")]
    Tap {
        link: String,
        #[source]
        source: io::Error,
    },
    #[error("a raw socket on {link} could not be opened: run as root")]
    RawSocket {
        link: String,
        #[source]
        source: io::Error,
    },
    #[error("the parking of port {id} ended before it was asked to: its frames are lost, clients will send them again")]
    ParkingGone { id: String },
    #[error("names of network {vni} cannot be answered on {address}:53: does another program hold that address?")]
    Names {
        vni: u32,
        address: Ipv4Addr,
        #[source]
        source: io::Error,
    },
}

/// The kernel's errno of a refused request, if it is one.
pub(crate) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}
