//! What happened, for people and for programs that watch.

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerName, EnvName, HostName};

/// One thing that happened. Events are kept in order of `number`, which is the store's revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub number: u64,
    /// Milliseconds since the epoch, by the controller's clock.
    pub at_ms: u64,
    pub kind: EventKind,
    pub env: Option<EnvName>,
    pub container: Option<ContainerName>,
    pub host: Option<HostName>,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    EnvApplied,
    EnvDeleted,
    ContainerPlaced,
    ContainerNotPlaced,
    ContainerStarted,
    ContainerExited,
    ContainerStopped,
    ContainerFailed,
    ContainerRemoved,
    ContainerOutOfMemory,
    /// It wants more than its host has, and there is a way; the message says which.
    ContainerGrowing,
    ContainerGrown,
    /// It wants more than its host has, and there is no way yet; the message says why.
    ContainerNotGrown,
    HealthChanged,
    MoveStarted,
    MoveDone,
    MoveFailed,
    BalanceChanged,
    /// Moves are advised, and nobody carries them out.
    BalanceAdvised,
    /// Moves were made, and nothing more is advised.
    BalanceDone,
    HostConnected,
    HostDisconnected,
    HostCordoned,
    HostEvacuating,
    HostEvacuated,
    HostEvacuationFailed,
    HostActivated,
    HostFailed,
    ContainerRecovered,
}

impl EventKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EnvApplied => "env-applied",
            Self::EnvDeleted => "env-deleted",
            Self::ContainerPlaced => "container-placed",
            Self::ContainerNotPlaced => "container-not-placed",
            Self::ContainerStarted => "container-started",
            Self::ContainerExited => "container-exited",
            Self::ContainerStopped => "container-stopped",
            Self::ContainerFailed => "container-failed",
            Self::ContainerRemoved => "container-removed",
            Self::ContainerOutOfMemory => "container-out-of-memory",
            Self::ContainerGrowing => "container-growing",
            Self::ContainerGrown => "container-grown",
            Self::ContainerNotGrown => "container-not-grown",
            Self::HealthChanged => "health-changed",
            Self::MoveStarted => "move-started",
            Self::MoveDone => "move-done",
            Self::MoveFailed => "move-failed",
            Self::BalanceChanged => "balance-changed",
            Self::BalanceAdvised => "balance-advised",
            Self::BalanceDone => "balance-done",
            Self::HostConnected => "host-connected",
            Self::HostDisconnected => "host-disconnected",
            Self::HostCordoned => "host-cordoned",
            Self::HostEvacuating => "host-evacuating",
            Self::HostEvacuated => "host-evacuated",
            Self::HostEvacuationFailed => "host-evacuation-failed",
            Self::HostActivated => "host-activated",
            Self::HostFailed => "host-failed",
            Self::ContainerRecovered => "container-recovered",
        }
    }
}
