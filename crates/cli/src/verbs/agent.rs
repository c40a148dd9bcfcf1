//! `godwit agent`: makes this server a host.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use godwit_agent::{AgentConfig, DEFAULT_MIGRATION_PORT};
use godwit_model::HostName;
use godwit_model::label::{Label, MAX_LABELS};

use super::DONE;
use crate::failure::Failure;

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Where the controller listens for agents
    // The id of a global option on purpose: here it says where to dial, not whom to ask.
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    controller: String,
    /// This host's name
    #[arg(long, value_name = "HOST")]
    name: HostName,
    /// This host's address on the network that joins the hosts: tunnels and moves use it
    #[arg(long, value_name = "ADDRESS")]
    tunnel_address: Ipv4Addr,
    /// Containers, volumes, images; on a disk
    #[arg(long, default_value = "/var/lib/godwit/agent", value_name = "DIRECTORY")]
    state_dir: PathBuf,
    /// Sockets and working files; on a tmpfs
    #[arg(long, default_value = "/run/godwit/agent", value_name = "DIRECTORY")]
    run_dir: PathBuf,
    /// The cgroup below which containers are made
    #[arg(long, default_value = "/godwit", value_name = "CGROUP", value_parser = cgroup)]
    cgroup_parent: String,
    /// The file the controller wrote; needed for the first connection only
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// Where moves are received, on the tunnel address
    #[arg(long, default_value_t = DEFAULT_MIGRATION_PORT, value_name = "PORT")]
    migration_port: u16,
    /// The interface that leads to the world; without it the one of the default route
    #[arg(long, value_name = "INTERFACE")]
    uplink: Option<String>,
    /// Bytes of one packet between hosts; containers get 50 less, for the tunnel
    #[arg(long, default_value_t = 1500, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=65_535))]
    underlay_mtu: u32,
    /// Something that containers can require of their host, for example zone=east; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<Label>,
}

fn host_and_port(text: &str) -> Result<String, String> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    match port {
        Some(port) if port > 0 => Ok(text.to_owned()),
        _ => Err("write HOST:PORT, for example 10.0.0.2:7717".to_owned()),
    }
}

fn cgroup(text: &str) -> Result<String, String> {
    if text.starts_with('/') && text.len() > 1 { Ok(text.to_owned()) } else { Err("write /NAME".to_owned()) }
}

/// Each key once.
fn labels(given: Vec<Label>) -> Result<BTreeMap<String, String>> {
    if given.len() > MAX_LABELS {
        return Err(Failure::new(format!("{} labels are given; a host has {MAX_LABELS} at most", given.len())).into());
    }
    let mut labels = BTreeMap::new();
    for Label { key, value } in given {
        if let Some(first) = labels.insert(key.clone(), value.clone()) {
            let text = format!("the label {key} is given twice, with {first} and {value}");
            return Err(Failure::new(text).hint("keep one of them").into());
        }
    }
    Ok(labels)
}

/// Runs until a signal ends it. Containers go on.
pub async fn run(args: AgentArgs) -> Result<u8> {
    let binary = std::env::current_exe().context("cannot find this program's own file")?;
    let config = AgentConfig {
        controller: args.controller,
        name: args.name,
        tunnel_address: args.tunnel_address,
        migration_port: args.migration_port,
        state_dir: args.state_dir,
        run_dir: args.run_dir,
        cgroup_parent: args.cgroup_parent,
        join_token_file: args.join_token_file,
        binary,
        uplink: args.uplink,
        underlay_mtu: args.underlay_mtu,
        labels: labels(args.labels)?,
    };
    godwit_agent::run(config).await?;
    Ok(DONE)
}
