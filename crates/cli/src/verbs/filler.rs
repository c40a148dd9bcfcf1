//! `godwit filler`: started by the agent for each container that arrives, never by people.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

#[derive(Debug, Args)]
pub struct FillerArgs {
    /// The directory where criu works
    #[arg(long, value_name = "DIRECTORY")]
    work: PathBuf,
}

/// Fills one restore. Nothing has opened a descriptor before.
pub fn run(args: &FillerArgs) -> Result<u8> {
    godwit_memory::serve_filler(godwit_memory::filler_control()?, &args.work)?;
    Ok(0)
}
