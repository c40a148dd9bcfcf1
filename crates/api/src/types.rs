//! What the API answers and takes.

mod balance;

use std::collections::BTreeMap;

use godwit_model::container::{ContainerStatus, Health, Resources};
use godwit_model::host::{HostFacts, HostState};
use godwit_model::manifest::Manifest;
use godwit_model::migration::MoveOptions;
use godwit_model::{Bytes, Cloudlets, ContainerId, ContainerName, EnvName, Generation, HostName, LayerName, MilliCpu};
use godwit_plan::{EvacuateOptions, EvacuationPlan, Explanation, Here, Score};
use serde::{Deserialize, Serialize};

pub use balance::{BalanceAnswer, BalanceChange, BalanceMode, BalanceView, LoadView};

/// An error as sent over HTTP: the sentence, what caused it, and the way out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct ErrorBody {
    pub error: String,
    /// The chain below it, outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ErrorBody {
    pub fn new(error: impl Into<String>) -> Self {
        Self { error: error.into(), causes: Vec::new(), hint: None }
    }

    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The message of `error` and of everything below it.
    pub fn from_chain(error: &(dyn std::error::Error + 'static)) -> Self {
        let causes = std::iter::successors(error.source(), |e| e.source()).map(ToString::to_string).collect();
        Self { error: error.to_string(), causes, hint: None }
    }

    /// One line: the sentence and its causes, joined by colons.
    pub fn one_line(&self) -> String {
        std::iter::once(&self.error).chain(&self.causes).map(String::as_str).collect::<Vec<_>>().join(": ")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionView {
    pub version: String,
    pub store_id: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    pub name: HostName,
    pub state: HostState,
    pub connected: bool,
    /// Milliseconds since the epoch of the last word from its agent.
    pub last_seen_ms: Option<u64>,
    pub facts: HostFacts,
    pub containers: u32,
    pub reserved_memory: Bytes,
    pub reserved_cpu: MilliCpu,
    pub cloudlets: Cloudlets,
    #[serde(default)]
    pub evacuation: Option<EvacuationView>,
    /// Of a silent host: why it does not count as lost yet.
    #[serde(default)]
    pub may_run: Option<String>,
}

/// How far a host is emptied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvacuationView {
    /// Milliseconds since the epoch.
    pub requested_at_ms: u64,
    /// Containers that were there then.
    pub total: u32,
    pub left: u32,
    /// What could not be moved away in the end, and why.
    pub stays: BTreeMap<ContainerName, Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct EvacuateRequest {
    #[serde(default)]
    pub options: EvacuateOptions,
    /// Say how it would go, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvacuateAnswer {
    pub plan: EvacuationPlan,
    /// Events with a greater number tell how it goes on.
    pub since: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ActivateRequest {
    /// Move here again what the last evacuation moved away.
    #[serde(default)]
    pub bring_back: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApplyRequest {
    pub manifest: Manifest,
    /// Say what would change, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyAnswer {
    /// What changed (or would), a sentence each; empty when nothing did.
    pub changes: Vec<String>,
    pub revision: u64,
    /// What was accepted and cannot be carried out in full by the hosts that take containers now, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Of a dry run: where containers that are new, or made anew, would go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<Foreseen>,
}

/// Where a container would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreseen {
    pub container: ContainerName,
    /// `None`: it would wait.
    pub host: Option<HostName>,
    /// Why there, or why it would wait.
    pub reasons: Vec<String>,
}

/// Every host as a place for a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementView {
    /// As a live move would see them, so that its own host is out; as its start would, while it is on none.
    pub hosts: Explanation,
    /// Its own host; `None` while it is on none.
    pub here: Option<Here>,
}

/// Where a move would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovePlan {
    pub container: ContainerName,
    pub from: HostName,
    pub to: HostName,
    pub score: Score,
    /// Sentences for a person.
    pub reasons: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentView {
    pub name: EnvName,
    pub manifest: Manifest,
    pub vni: u32,
    /// The private network, for example `10.64.16.0/20`.
    pub subnet: String,
    pub layers: Vec<LayerView>,
    pub containers: Vec<ContainerView>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerView {
    pub name: LayerName,
    pub image: String,
    pub wanted: u32,
    pub running: u32,
    pub ports: Vec<String>,
}

/// One container, as wanted and as reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerView {
    pub id: ContainerId,
    pub name: ContainerName,
    pub image: String,
    pub address: std::net::Ipv4Addr,
    /// `None` while no host has been found for it; the message says why.
    pub host: Option<HostName>,
    pub generation: Generation,
    /// For people: `running`, `preparing`, `moving`, `stopped`, `failed`, `waiting`, `unknown` (its host is silent).
    pub state: String,
    pub message: Option<String>,
    pub health: Option<Health>,
    pub wanted_running: bool,
    pub resources: Resources,
    /// The agent's last report; `None` before the first.
    pub status: Option<ContainerStatus>,
    /// Set while it is being moved.
    pub moving: Option<godwit_model::MoveId>,
    /// What it shall have and does not have yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthView>,
}

/// Resources that a container gets when its host has the room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowthView {
    pub resources: Resources,
    /// Milliseconds since the epoch.
    pub requested_at_ms: u64,
    /// Where it will have them; `None`: there is no plan.
    pub host: Option<HostName>,
    /// Why there is no way, if there is none.
    pub refused: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MigrateRequest {
    /// `None`: the scheduler picks the host.
    pub to: Option<HostName>,
    #[serde(default)]
    pub options: MoveOptions,
}

/// What an agent sends to become a member; the token comes from the controller's state directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub name: HostName,
    pub token: String,
    /// PKCS#10 certificate signing request, PEM.
    pub csr_pem: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinAnswer {
    pub certificate_pem: String,
    pub ca_pem: String,
}
