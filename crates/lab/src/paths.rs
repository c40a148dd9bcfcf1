//! Where the parts of a lab are. Every path follows from the lab's name alone.

use std::path::{Path, PathBuf};

use crate::spec::{LabName, Node};

/// Below it each lab has a directory with a private tmpfs: record, pinned namespaces, API socket.
pub(crate) const RUN_ROOT: &str = "/run/godwit-lab";
/// Below it each lab has a directory on disk: its hosts' state and its daemons' logs.
pub(crate) const STATE_ROOT: &str = "/var/lib/godwit-lab";
/// Where hosts keep state on a real server; in a lab host it is a bind mount of the host's own directory.
pub(crate) const HOST_STATE: &str = "/var/lib/godwit";
/// Prefix of a lab's cgroup at the root of each hierarchy.
pub(crate) const CGROUP_PREFIX: &str = "godwit-lab-";

/// The places of one lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabPaths {
    name: LabName,
}

impl LabPaths {
    pub fn new(name: LabName) -> Self {
        Self { name }
    }

    pub(crate) fn name(&self) -> &LabName {
        &self.name
    }

    /// The lab's tmpfs.
    pub fn run(&self) -> PathBuf {
        Path::new(RUN_ROOT).join(self.name.as_str())
    }

    /// The lab's directory on disk.
    pub fn state(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(self.name.as_str())
    }

    /// The state directory of one host; inside the host it is `/var/lib/godwit`.
    pub fn host_state(&self, node: Node) -> PathBuf {
        self.state().join(node.to_string())
    }

    /// The record of what this lab is.
    pub fn record(&self) -> PathBuf {
        self.run().join("lab.json")
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.run().join("ns")
    }

    /// The pinned network namespace of a host.
    pub fn net_namespace(&self, node: Node) -> PathBuf {
        self.pins().join(format!("{node}.net"))
    }

    /// The pinned mount namespace of a host.
    pub fn mount_namespace(&self, node: Node) -> PathBuf {
        self.pins().join(format!("{node}.mnt"))
    }

    /// The pinned network namespace that holds the switch.
    pub fn switch_namespace(&self) -> PathBuf {
        self.pins().join("switch.net")
    }

    /// The controller's API socket, reachable from the machine and from every lab host.
    pub fn api_socket(&self) -> PathBuf {
        self.run().join("api.sock")
    }

    /// Where the controller puts the token that lets an agent join.
    pub fn join_token(&self) -> PathBuf {
        self.host_state(Node::Controller).join("controller/join-token")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.state().join("log")
    }

    /// Standard output and error of the daemon on a host.
    pub fn log(&self, node: Node) -> PathBuf {
        self.logs().join(format!("{node}.log"))
    }

    /// Where a node's daemon looks for points at which it is to stand still.
    pub fn holds(&self, node: Node) -> PathBuf {
        self.run().join("hold").join(node.to_string())
    }

    pub(crate) fn daemon(&self, node: Node) -> PathBuf {
        self.run().join(format!("{node}.daemon.json"))
    }

    /// The lab's cgroup below the root of each hierarchy, with a leading slash.
    pub fn cgroup(&self) -> String {
        format!("/{CGROUP_PREFIX}{}", self.name)
    }

    /// A host's cgroup below the root of each hierarchy; limits are set here.
    pub fn host_cgroup(&self, node: Node) -> String {
        format!("{}/{node}", self.cgroup())
    }

    /// Where the agent (or the controller) of a host runs.
    pub fn daemon_cgroup(&self, node: Node) -> String {
        format!("{}/agent", self.host_cgroup(node))
    }

    /// Where commands started by `lab exec` run.
    pub fn exec_cgroup(&self, node: Node) -> String {
        format!("{}/exec", self.host_cgroup(node))
    }

    /// Below which a host's containers get their cgroups.
    pub fn containers_cgroup(&self, node: Node) -> String {
        format!("{}/containers", self.host_cgroup(node))
    }
}
