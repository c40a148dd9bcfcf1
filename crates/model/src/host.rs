//! A host: what its agent reports, and what the controller thinks of it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::ids::HostName;
use crate::units::{Bytes, Cloudlets, MilliCpu};

/// What a host is and has; sent by its agent at every connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    pub name: HostName,
    pub godwit_version: String,
    pub kernel: String,
    pub architecture: String,
    /// Version of CRIU, for example `4.1.1`; `None` where there is none: its containers cannot move.
    pub criu: Option<String>,
    /// The processor's feature flags, sorted: a container that used one needs it on the other side too.
    pub cpu_features: Vec<String>,
    pub cpu_model: String,
    pub cpus: MilliCpu,
    pub cpu_mhz: u32,
    pub memory: Bytes,
    pub disk_free: Bytes,
    /// Address of this host in the tunnels between hosts.
    pub tunnel_address: Ipv4Addr,
    /// Where this agent receives moves.
    pub migration_address: SocketAddr,
    /// SHA-256 of the certificate that the agent shows there, hex.
    pub certificate_sha256: String,
    #[serde(default)]
    pub written_pages: WrittenPages,
    /// What its administrator says of it, for rules of placement; see [`crate::label`].
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// How a host learns which pages of a running program were written since it last looked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case", tag = "way")]
pub enum WrittenPages {
    /// Its agent is older than the question.
    #[default]
    Unknown,
    /// The kernel tells them.
    Tracked {
        /// What older agents say nothing of.
        #[serde(default)]
        by: ToldBy,
    },
    /// It does not: memory is copied while the container stands still, or after the hand-over where that is allowed.
    Untold { because: String },
}

/// What in the kernel tells written pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum ToldBy {
    /// userfaultfd with WP_ASYNC, and PAGEMAP_SCAN.
    #[default]
    Protection,
    /// Soft-dirty bits. The container stands still for a moment in each round.
    SoftDirty,
}

impl std::fmt::Display for WrittenPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown => f.write_str("not known: its agent is older than the question"),
            Self::Tracked { by: ToldBy::Protection } => {
                f.write_str("told by the kernel (userfaultfd WP_ASYNC, PAGEMAP_SCAN)")
            }
            Self::Tracked { by: ToldBy::SoftDirty } => {
                f.write_str("told by the kernel (soft-dirty bits: a container stands still for a moment in each round)")
            }
            Self::Untold { because } => {
                write!(
                    f,
                    "not told, memory is copied while the container stands still, or later if that is allowed: {because}"
                )
            }
        }
    }
}

impl HostFacts {
    pub fn cloudlets(&self) -> Cloudlets {
        let memory = self.memory.0 / Cloudlets::MEMORY_BYTES;
        let cpu = u64::from(self.cpus.0) * u64::from(self.cpu_mhz) / (u64::from(Cloudlets::CPU_MHZ) * 1000);
        Cloudlets(memory.min(cpu).min(u64::from(u32::MAX)) as u32)
    }
}

/// Whether a host takes containers, and what becomes of those it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    #[default]
    Active,
    /// Keeps what it has, takes nothing new.
    Cordoned,
    /// Its containers are being moved away; takes nothing new.
    Evacuating,
    /// It has no container any more and may be switched off.
    Evacuated,
    /// Some of its containers could not be moved away; takes nothing new.
    EvacuationFailed,
    /// It has not been heard of for a while; its containers may still run.
    Suspect,
    /// It is known to run nothing any more.
    Failed,
}

impl HostState {
    /// Only an active host takes new containers.
    pub fn takes_containers(self) -> bool {
        self == Self::Active
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Cordoned => "cordoned",
            Self::Evacuating => "evacuating",
            Self::Evacuated => "evacuated",
            Self::EvacuationFailed => "evacuation-failed",
            Self::Suspect => "suspect",
            Self::Failed => "failed",
        }
    }
}
