//! Compose files as environments: the typed value. Services are layers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::container::{HealthCheck, HostPathMount, RestartPolicy, TmpfsMount, VolumeMount};
use crate::ids::{EnvName, LayerName};
use crate::units::{Bytes, Cloudlets, MilliCpu};

/// One environment as a person wrote it, checked. Two equal manifests describe the same environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub name: EnvName,
    /// By name, so that the order in the file does not matter.
    pub layers: BTreeMap<LayerName, Layer>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub image: String,
    pub entrypoint: Option<Vec<String>>,
    pub command: Option<Vec<String>>,
    pub environment: BTreeMap<String, String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub replicas: u32,
    pub resources: LayerResources,
    pub volumes: Vec<VolumeMount>,
    pub tmpfs: Vec<TmpfsMount>,
    pub host_paths: Vec<HostPathMount>,
    pub ports: Vec<PublishedPort>,
    pub health: Option<HealthCheck>,
    pub depends_on: BTreeMap<LayerName, Dependency>,
    pub restart: RestartPolicy,
    pub stop_signal: Option<String>,
    pub stop_grace_ms: u64,
    pub read_only_root: bool,
    pub open_files: Option<u64>,
    /// Further names that lead to the layer inside its network.
    pub aliases: Vec<String>,
    pub spread: Spread,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct LayerResources {
    pub memory: Option<Bytes>,
    pub cpu: Option<MilliCpu>,
    pub pids: Option<u32>,
    pub reserved_memory: Option<Bytes>,
    pub reserved_cpu: Option<MilliCpu>,
    /// Both ways of saying it may not be mixed: cloudlets, or memory and CPUs.
    pub cloudlets: Option<CloudletRange>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudletRange {
    pub reserved: Cloudlets,
    pub limit: Cloudlets,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// The port on every host.
    pub host_port: u16,
    pub container_port: u16,
    pub udp: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dependency {
    Started,
    Healthy,
    CompletedSuccessfully,
}

/// How the containers of a layer are spread over hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Spread {
    /// Never two on one host; what does not fit waits.
    Strict,
    /// As evenly as possible.
    #[default]
    Preferred,
    None,
}
