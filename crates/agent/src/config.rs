//! What an agent is told when it starts.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use godwit_model::HostName;

/// The port on which an agent receives moves, where nothing else is said.
pub const DEFAULT_MIGRATION_PORT: u16 = 7718;

#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Host and port of the controller.
    pub controller: String,
    pub name: HostName,
    /// This host's address on the network that joins the hosts: tunnels and moves use it.
    pub tunnel_address: Ipv4Addr,
    pub migration_port: u16,
    /// Containers, volumes, images, ledger; on a disk file system.
    pub state_dir: PathBuf,
    /// Sockets and CRIU's working files; on a tmpfs, gone after a reboot as the containers are.
    pub run_dir: PathBuf,
    /// cgroup below which containers are made, starting with `/`.
    pub cgroup_parent: String,
    /// Written by the controller; needed for the first connection only.
    pub join_token_file: Option<PathBuf>,
    /// The `godwit` binary itself, started again as keepers.
    pub binary: PathBuf,
    /// Interface that leads to the world; `None`: wherever the default route points.
    pub uplink: Option<String>,
    /// Bytes of one packet between hosts; containers get 50 less, for the tunnel.
    pub underlay_mtu: u32,
    /// What this host is called by rules of placement; see [`godwit_model::label`].
    pub labels: BTreeMap<String, String>,
}

impl AgentConfig {
    pub fn migration_address(&self) -> SocketAddr {
        SocketAddr::from((self.tunnel_address, self.migration_port))
    }

    pub fn containers_dir(&self) -> PathBuf {
        self.state_dir.join("containers")
    }

    pub fn volumes_dir(&self) -> PathBuf {
        self.state_dir.join("volumes")
    }

    pub fn moves_dir(&self) -> PathBuf {
        self.run_dir.join("moves")
    }
}
