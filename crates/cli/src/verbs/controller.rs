//! `godwit controller`: makes this server the one that decides.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use godwit_controller::ControllerConfig;

use super::DONE;
use crate::connect::SYSTEM_SOCKET;

#[derive(Debug, Args)]
pub struct ControllerArgs {
    /// The store, keys, and the join token for new hosts; on a disk
    #[arg(long, default_value = "/var/lib/godwit/controller", value_name = "DIRECTORY")]
    state_dir: PathBuf,
    /// Where people on this machine reach the API; only root may open it
    #[arg(long, default_value = SYSTEM_SOCKET, value_name = "PATH")]
    api_socket: PathBuf,
    /// Where agents, and people elsewhere, reach it over TLS
    #[arg(long, default_value = "0.0.0.0:7717", value_name = "HOST:PORT")]
    listen: String,
    /// Never start elsewhere what a silent host has, except by `godwit host declare-dead`
    #[arg(long)]
    no_recovery: bool,
}

/// Runs until a signal ends it. Hosts and containers go on.
pub async fn run(args: ControllerArgs) -> Result<u8> {
    let config = ControllerConfig::new(args.state_dir, args.api_socket, args.listen);
    godwit_controller::run(ControllerConfig { recovery: !args.no_recovery, ..config }).await?;
    Ok(DONE)
}
