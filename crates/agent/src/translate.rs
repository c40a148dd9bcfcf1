//! From what the controller says to what the crates below take.

use std::net::Ipv4Addr;
use std::path::Path;

use godwit_api::link::{EndpointSpec, NetworkSpec, PortSpec};
use godwit_container::spec::{
    BindMount, EtcFile, LaunchSpec, LogLimits, Masks, Resources as Limits, Rlimits, Tmpfs, User,
};
use godwit_image::ImageConfig;
use godwit_model::container::{ContainerSpec, Resources};
use godwit_network::{
    Endpoint, EnvironmentNetwork, InvalidNetwork, Location, Mac, Port, Protocol, PublishedPort, Subnet,
};
use thiserror::Error;

use crate::config::AgentConfig;

/// VXLAN over IPv4 takes this much of every packet, in bytes (RFC 7348).
const TUNNEL_OVERHEAD_BYTES: u32 = 50;
/// A tmpfs without a size of its own, in bytes.
const DEFAULT_TMPFS_BYTES: u64 = 64 << 20;

#[derive(Debug, Error)]
pub enum LaunchError {
    #[error("neither the manifest nor the image {image} names a program; set command: in the manifest")]
    NoProgram { image: String },
    #[error("the stop signal {signal:?} is not one; write for example SIGTERM or 15")]
    StopSignal { signal: String },
}

pub fn limits(resources: &Resources) -> Limits {
    Limits {
        memory_bytes: resources.memory.map(|b| b.0),
        cpu_millis: resources.cpu.map(|c| u64::from(c.0)),
        pids_max: resources.pids.map(u64::from),
    }
}

/// What runs, from the image's own values and the manifest's. As Compose has it: an entrypoint of the manifest also
/// drops the image's command.
fn argv(spec: &ContainerSpec, image: &ImageConfig) -> Result<Vec<String>, LaunchError> {
    let (entrypoint, image_command) = match &spec.entrypoint {
        Some(entrypoint) => (entrypoint, &Vec::new()),
        None => (&image.entrypoint, &image.cmd),
    };
    let command = spec.command.as_ref().unwrap_or(image_command);
    let argv: Vec<String> = entrypoint.iter().chain(command).cloned().collect();
    if argv.is_empty() { Err(LaunchError::NoProgram { image: spec.image.clone() }) } else { Ok(argv) }
}

fn environment(spec: &ContainerSpec, image: &ImageConfig) -> Vec<String> {
    let mut values = std::collections::BTreeMap::new();
    values.insert("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in image.env.iter().filter_map(|e| e.split_once('=')) {
        values.insert(name, value);
    }
    for (name, value) in &spec.environment {
        values.insert(name, value);
    }
    let hostname = spec.name.local();
    values.entry("HOSTNAME").or_insert(&hostname);
    values.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

/// Volumes, then paths of the host.
fn mounts(spec: &ContainerSpec, volumes_dir: &Path) -> Vec<BindMount> {
    let volumes = spec.volumes.iter().map(|v| BindMount {
        source: volumes_dir.join(&v.volume),
        target: v.target.clone(),
        read_only: v.read_only,
    });
    let host = spec.host_paths.iter().map(|h| BindMount {
        source: h.source.clone().into(),
        target: h.target.clone(),
        read_only: h.read_only,
    });
    volumes.chain(host).collect()
}

fn etc_files(spec: &ContainerSpec) -> Vec<EtcFile> {
    let local = spec.name.local();
    let hosts = format!("127.0.0.1 localhost\n{} {local}\n", spec.network.address);
    let resolv = format!("nameserver {}\noptions timeout:2 attempts:3\n", spec.network.gateway);
    [("hostname", format!("{local}\n")), ("hosts", hosts), ("resolv.conf", resolv)]
        .map(|(name, content)| EtcFile { name: name.to_owned(), content })
        .into()
}

/// The number of a signal by name or number.
fn signal_number(text: &str) -> Result<i32, LaunchError> {
    let bad = || LaunchError::StopSignal { signal: text.to_owned() };
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(bad()) };
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<nix::sys::signal::Signal>().map(|s| s as i32).map_err(|_| bad())
}

/// Where keepers are: outside of every container's limits.
pub fn keeper_cgroup(config: &AgentConfig) -> String {
    format!("{}/keepers", config.cgroup_parent.trim_end_matches('/'))
}

/// Everything the keeper has to know. `rootfs` is mounted when the keeper starts.
pub fn launch_spec(
    config: &AgentConfig,
    spec: &ContainerSpec,
    image: &ImageConfig,
    user: User,
    rootfs: &Path,
    volumes_dir: &Path,
) -> Result<LaunchSpec, LaunchError> {
    let signal = spec.stop_signal.clone().or_else(|| image.stop_signal.clone());
    let cwd = spec.working_dir.clone().or_else(|| Some(image.working_dir.clone()).filter(|d| !d.is_empty()));
    let tmpfs = spec.tmpfs.iter().map(|t| Tmpfs {
        target: t.target.clone(),
        size_bytes: t.size.map_or(DEFAULT_TMPFS_BYTES, |b| b.0),
        mode: 0o1777,
    });
    Ok(LaunchSpec {
        id: spec.id.to_string(),
        hostname: spec.name.local(),
        argv: argv(spec, image)?,
        env: environment(spec, image),
        cwd: cwd.unwrap_or_else(|| "/".to_owned()),
        user,
        rootfs: rootfs.to_owned(),
        id_base: spec.id_base,
        id_count: godwit_model::container::ID_RANGE,
        cgroup_parent: config.cgroup_parent.clone(),
        keeper_cgroup: Some(keeper_cgroup(config)),
        resources: limits(&spec.resources),
        mounts: mounts(spec, volumes_dir),
        tmpfs: tmpfs.collect(),
        read_only_rootfs: spec.read_only_root,
        etc_files: etc_files(spec),
        masks: Masks::of_this_host(),
        stop_signal: signal.as_deref().map_or(Ok(nix::libc::SIGTERM), signal_number)?,
        log: LogLimits::default(),
        rlimits: spec.open_files.map_or_else(Rlimits::default, |nofile| Rlimits { nofile }),
    })
}

pub fn port(config: &AgentConfig, spec: &ContainerSpec) -> Port {
    let net = &spec.network;
    Port {
        id: spec.id.to_string(),
        vni: net.vni,
        mac: Mac(net.mac.0),
        address: net.address,
        prefix_len: net.prefix_len,
        gateway: net.gateway,
        mtu: config.underlay_mtu.saturating_sub(TUNNEL_OVERHEAD_BYTES),
        neighbours: Vec::new(),
    }
}

pub fn networks(config: &AgentConfig, specs: &[NetworkSpec]) -> Result<Vec<EnvironmentNetwork>, InvalidNetwork> {
    let mtu = config.underlay_mtu.saturating_sub(TUNNEL_OVERHEAD_BYTES);
    let endpoint = |e: &EndpointSpec| Endpoint {
        mac: Mac(e.mac.0),
        address: e.address,
        at: e.remote.map_or(Location::Local, Location::Remote),
        names: e.names.clone(),
    };
    let published = |p: &PortSpec| PublishedPort {
        host_port: p.host_port,
        protocol: if p.udp { Protocol::Udp } else { Protocol::Tcp },
        targets: p.targets.clone(),
    };
    specs
        .iter()
        .map(|n| {
            Ok(EnvironmentNetwork {
                vni: n.vni,
                subnet: Subnet::new(n.subnet, n.prefix_len)?,
                gateway: n.gateway,
                host_address: n.host_address,
                mtu,
                domain: n.env.clone(),
                remotes: n.remotes.clone(),
                endpoints: n.endpoints.iter().map(endpoint).collect(),
                ports: n.ports.iter().map(published).collect(),
            })
        })
        .collect()
}

/// The same networks with one container's address leading to another host: what a redirect does until the controller's
/// next word says the same.
pub fn redirected(mut networks: Vec<EnvironmentNetwork>, vni: u32, mac: Mac, to: Ipv4Addr) -> Vec<EnvironmentNetwork> {
    for network in networks.iter_mut().filter(|n| n.vni == vni) {
        for endpoint in network.endpoints.iter_mut().filter(|e| e.mac == mac) {
            endpoint.at = Location::Remote(to);
        }
    }
    networks
}
