//! Many hosts on one machine, and workloads that check themselves.
//!
//! A **lab** is a set of hosts made from kernel namespaces: each has its own network and mount
//! namespace, cgroup subtree, state directory and agent process, and all are joined by a switch
//! whose links have real rates. What runs on a lab host is the same binary with the same
//! arguments as on a server; only how the host came to be differs.
//!
//! ```text
//!            ctl (.2)   client (.3)   h1 (.11)   h2 (.12) …      network + mount namespace each
//!             eth0        eth0          eth0       eth0
//!              │            │            │          │            veth pairs, token bucket on both ends
//!            ┌─┴────────────┴────────────┴──────────┴─┐
//!            │                  sw0                   │          switch: network namespace, one bridge
//!            └────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! - Everything a lab makes carries the lab's name on disk or in the kernel and is found again by
//!   that name, so [`down`](Lab::down) works after `kill -9` of everything, on a half-made lab, and
//!   twice.
//! - No link leads from a lab into the machine's own network namespace.
//! - Nothing is deleted through a mount.
//! - Only processes inside the lab's cgroups or namespaces are ever signalled.
#![forbid(unsafe_code)]

mod cgroups;
mod daemons;
mod down;
mod lab;
mod links;
mod mounts;
mod namespaces;
mod paths;
mod processes;
mod record;
mod remove;
mod spec;
pub mod workload;

pub use cgroups::CgroupError;
pub use daemons::DaemonError;
pub use down::DownError;
pub use lab::{Lab, LabError, UpError, list};
pub use links::LinkError;
pub use namespaces::NamespaceError;
pub use paths::LabPaths;
pub use record::RecordError;
pub use spec::{BitsPerSecond, LabName, LabSpec, MAX_HOSTS, Node, SpecError};
