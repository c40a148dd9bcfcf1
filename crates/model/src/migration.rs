//! A move: its phases, in order, the same names in code, progress bars, traces and metrics.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerId, ContainerName, Generation, HostName, MoveId};
use crate::units::BitRate;

/// The phases of a move, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    Check,
    Prepare,
    Copy,
    Freeze,
    HandOver,
    Activate,
    Fill,
    Release,
}

impl Phase {
    pub const ALL: [Phase; 8] = [
        Phase::Check,
        Phase::Prepare,
        Phase::Copy,
        Phase::Freeze,
        Phase::HandOver,
        Phase::Activate,
        Phase::Fill,
        Phase::Release,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::Freeze => "freeze",
            Self::HandOver => "hand over",
            Self::Activate => "activate",
            Self::Fill => "fill",
            Self::Release => "release",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How a move ended, or that it has not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Outcome {
    /// Before the hand-over: the source owns the container.
    Moving,
    /// The store names the destination as owner; nothing may revive the source.
    HandedOver,
    /// The source is freed.
    Done,
    /// The source runs on; the sentence says what failed and in which phase.
    Failed { phase: Phase, reason: String },
}

impl Outcome {
    pub fn over(&self) -> bool {
        matches!(self, Self::Done | Self::Failed { .. })
    }
}

/// How memory is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// In rounds while the container runs, where that is possible; otherwise while it stands still. What writes faster
    /// than that can be sent is slowed down; if [`MoveOptions::max_downtime_ms`] cannot be kept even so, the rest follows
    /// as by [`CopyMode::PostCopy`].
    #[default]
    Auto,
    /// In rounds while the container runs, or not at all.
    PreCopy,
    /// Once while the container runs; what it has written since follows after the hand-over, when it runs on the other
    /// host. The shortest downtime, and if one of the hosts or the link dies before all is there, the container starts
    /// anew from its files.
    PostCopy,
    /// While it stands still: the shortest total time and the longest downtime.
    StopAndCopy,
}

impl CopyMode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::StopAndCopy => "stop-and-copy",
        }
    }
}

impl std::str::FromStr for CopyMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Auto, Self::PreCopy, Self::PostCopy, Self::StopAndCopy];
        let found = all.into_iter().find(|mode| mode.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is none of auto, pre-copy, post-copy, stop-and-copy"))
    }
}

/// What is asked of a move besides its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MoveOptions {
    #[serde(default)]
    pub mode: CopyMode,
    /// The move is given up rather than let the container stand still for longer than this is expected to, in
    /// milliseconds.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// The move is given up unless the container stands still for it by this time after the request, in milliseconds.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// What is copied while the container runs is sent no faster than this, [`MIN_BANDWIDTH`] at least. What it stands
    /// still for is not held back.
    #[serde(default)]
    pub bandwidth: Option<BitRate>,
    #[serde(default)]
    pub compression: Compression,
    /// Connections that carry memory, 1 to 8; `None`: as many as the source's processors can keep busy.
    #[serde(default)]
    pub connections: Option<u32>,
    /// The container may not be slowed down so that it writes no faster than that can be sent.
    #[serde(default)]
    pub never_slow: bool,
}

/// The slowest copy: a piece of 1 MiB takes 8 s, and a destination gives up after a silence of 60 s.
pub const MIN_BANDWIDTH: BitRate = BitRate(1_000_000);

/// Whether memory is compressed on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Where the link is slower than compressing, by measurement.
    #[default]
    Auto,
    Always,
    Never,
}

impl Compression {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Auto, Self::Always, Self::Never];
        let found = all.into_iter().find(|choice| choice.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is none of auto, always, never"))
    }
}

/// One move, as the store keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Move {
    pub id: MoveId,
    pub container: ContainerId,
    pub name: ContainerName,
    pub from: HostName,
    pub to: HostName,
    /// The generation the source holds; the destination will hold the next.
    pub generation: Generation,
    #[serde(default)]
    pub options: MoveOptions,
    pub requested_at_ms: u64,
    pub finished_at_ms: Option<u64>,
    pub phase: Phase,
    pub outcome: Outcome,
    pub progress: Progress,
    pub summary: Option<Summary>,
    /// `None`: a person asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
}

impl Move {
    /// The end of a sentence about it: `: it makes room for shop/db-1`; empty where a person asked for it.
    pub fn why(&self) -> String {
        self.cause.as_ref().map(|cause| format!(": {}", cause.told(&self.name))).unwrap_or_default()
    }
}

/// What a move is good for, where no person asked for this very move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "why")]
pub enum Cause {
    /// A host is being emptied.
    Evacuation { host: HostName },
    /// A host that was emptied is open again.
    Return { host: HostName },
    /// A container wants more than its host has: another one, or itself.
    Room { grower: ContainerName },
    /// Containers and load are spread over the hosts; the sentence says what this one brings.
    Balance { reason: String },
}

impl Cause {
    /// The reason in words, for the move of `container`.
    pub fn told(&self, container: &ContainerName) -> String {
        match self {
            Self::Evacuation { host } => format!("{host} is being emptied"),
            Self::Return { host } => format!("{host} takes containers again"),
            Self::Room { grower } if grower == container => "it needs more room than its host has".to_owned(),
            Self::Room { grower } => format!("it makes room for {grower}"),
            Self::Balance { reason } => format!("balance: {reason}"),
        }
    }
}

/// Where a move is, for the progress bar. Numbers never go backwards within a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Progress {
    pub bytes_sent: u64,
    /// The best guess of what there is to send.
    pub bytes_total: u64,
    pub rounds: u32,
}

/// What a move cost. Times in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Summary {
    /// Request until the source was free.
    pub total_ms: f64,
    /// Last instruction on the source to the first on the destination.
    pub downtime_ms: f64,
    /// What the downtime consists of, by part name; see [`DowntimePart`].
    pub downtime_parts: BTreeMap<DowntimePart, f64>,
    pub bytes_sent: u64,
    pub memory_bytes: u64,
    pub file_bytes: u64,
    pub rounds: u32,
    pub frames_parked: u64,
    /// The least share of its usual CPU time that the container was given while it was copied, in percent; `None` where
    /// it was not slowed down.
    #[serde(default)]
    pub slowed_to_percent: Option<u32>,
    /// Memory that followed when the container ran on the other host already, in bytes.
    #[serde(default)]
    pub late_bytes: u64,
    /// Why memory was not copied in rounds while the container ran, but while it stood still, or later (`late_bytes`).
    #[serde(default)]
    pub stood_still: Option<String>,
    /// For how long it stood still in all, in milliseconds, so that its memory could be looked at while it was copied:
    /// its host tells written pages by soft-dirty bits. `None`: they are told otherwise, or not.
    #[serde(default)]
    pub paused_ms: Option<f64>,
}

/// The named parts of the downtime, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DowntimePart {
    /// Until the cgroup reported frozen and the frames were diverted.
    Freeze,
    /// CRIU's dump on the source, with the memory that travels in it.
    Dump,
    /// What changes of files, and of memory past CRIU, since the last round took beyond the dump.
    Files,
    /// What was still on its way when the dump ended.
    Transfer,
    /// CRIU's restore on the destination.
    Restore,
    /// The generation moved in the store.
    HandOver,
    /// Processes let go, frames delivered.
    Activate,
}

impl DowntimePart {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Dump => "dump",
            Self::Files => "files",
            Self::Transfer => "transfer",
            Self::Restore => "restore",
            Self::HandOver => "hand-over",
            Self::Activate => "activate",
        }
    }
}
