//! `godwit keeper`: the parent of one container's processes. Started by agents, not by people.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub struct KeeperArgs {
    /// The container's directory, with its launch record
    #[arg(long, value_name = "DIRECTORY")]
    dir: PathBuf,

    /// The file that says until when the container may run
    #[arg(long, value_name = "FILE")]
    lease: Option<PathBuf>,
}

/// To be called while this is the only thread. Returns the exit code.
pub fn run(args: &KeeperArgs) -> u8 {
    if godwit_container::keeper_main(&args.dir, args.lease.as_deref()) == 0 { 0 } else { 1 }
}
