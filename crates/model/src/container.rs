//! A container: what it shall be (its spec) and what it is (its status).

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerId, ContainerName, Generation};
use crate::network::MacAddress;
use crate::units::{Bytes, MilliCpu};

/// How many user ids each container owns. Its root is `id_base` on the host and maps no id of anyone else.
pub const ID_RANGE: u32 = 65_536;

/// Everything an agent needs to run one container. Made by the controller from the manifest; never changed in
/// place except for resources: another spec is another container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub id: ContainerId,
    pub name: ContainerName,
    /// Image source as the manifest names it, for example `oci:/srv/images/redis:latest`.
    pub image: String,
    /// Overrides of the image's own values.
    pub entrypoint: Option<Vec<String>>,
    pub command: Option<Vec<String>>,
    pub environment: BTreeMap<String, String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    pub read_only_root: bool,
    /// First host user id of this container's range; the same on every host, for life.
    pub id_base: u32,
    pub resources: Resources,
    pub network: NetworkIdentity,
    pub volumes: Vec<VolumeMount>,
    pub tmpfs: Vec<TmpfsMount>,
    /// Paths of the host inside the container. They stay where they are, so they make it not movable.
    pub host_paths: Vec<HostPathMount>,
    pub restart: RestartPolicy,
    pub stop_signal: Option<String>,
    pub stop_grace_ms: u64,
    pub open_files: Option<u64>,
    pub health: Option<HealthCheck>,
    /// What has to be true of other layers before the first start.
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Resources {
    /// The ceiling; `None` is no limit but the host's.
    pub memory: Option<Bytes>,
    pub cpu: Option<MilliCpu>,
    pub pids: Option<u32>,
    /// What is guaranteed, and counted by placement.
    pub reserved_memory: Bytes,
    pub reserved_cpu: MilliCpu,
}

/// What a container keeps for life, wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkIdentity {
    pub vni: u32,
    pub address: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    pub mac: MacAddress,
}

/// A named volume on the host's disk; each container of a layer has its own instance, which moves with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    pub volume: String,
    pub target: String,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsMount {
    pub target: String,
    pub size: Option<Bytes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPathMount {
    pub source: String,
    pub target: String,
    pub read_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    No,
    OnFailure {
        /// How often at the most; `None` is without end.
        max_retries: Option<u32>,
    },
    #[default]
    Always,
    UnlessStopped,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Run inside the container; exit code 0 is healthy.
    pub argv: Vec<String>,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    pub start_period_ms: u64,
    pub retries: u32,
}

/// What a container is doing on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContainerState {
    /// Assigned to a host; image, volumes or namespaces are being made.
    Preparing,
    Running,
    /// Held still in the last part of a move.
    Frozen,
    /// Ended; waits before the next start.
    Restarting,
    /// Ended, or stopped by a person; will not start by itself.
    Stopped,
    /// Could not be started; the message says why.
    Failed,
}

impl ContainerState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Frozen => "frozen",
            Self::Restarting => "restarting",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    Starting,
    Healthy,
    Unhealthy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// The exit code, or 128 + the signal's number as shells count it.
    pub code: i32,
    pub signal: Option<i32>,
    pub oom_killed: bool,
    pub finished_at_ms: u64,
}

/// Can this container be moved live, and if not, why not, as sentences for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Movable {
    pub because: Vec<String>,
}

impl Movable {
    pub fn yes(&self) -> bool {
        self.because.is_empty()
    }
}

/// What an agent reports of one container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    pub id: ContainerId,
    pub name: ContainerName,
    pub generation: Generation,
    pub state: ContainerState,
    pub message: Option<String>,
    pub health: Option<Health>,
    /// Process id of the container's first process, in the host's own numbering.
    pub pid: Option<u32>,
    /// Milliseconds since the epoch.
    pub started_at_ms: Option<u64>,
    pub restarts: u32,
    pub exit: Option<ExitStatus>,
    pub memory: Option<Bytes>,
    /// Of `memory`, what the kernel cannot simply give back: without file pages that have not been used for a while.
    #[serde(default)]
    pub working_set: Option<Bytes>,
    pub cpu_usec: Option<u64>,
    pub movable: Movable,
    /// Manifest digest of the image it was made from.
    pub image_digest: Option<String>,
}
