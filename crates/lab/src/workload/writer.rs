//! `memory-writer`: nothing but memory that is rewritten at a given rate, and streams that tell when it stands still.

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;

use super::memory::Memory;
use super::server::{listen, new_health, work_until_violation};
use super::{WorkloadError, streams};

/// As disks and links are: a megabyte is a million bytes.
const BYTES_PER_MB: u64 = 1_000_000;
const PAGE_BYTES: u64 = 4_096;

#[derive(Debug, Clone, clap::Args)]
pub struct WriterArgs {
    /// TCP port of the streams, as of memory-files-streams; 0 picks one. It is printed as `listening ADDRESS:PORT`
    #[arg(long)]
    pub port: u16,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub listen: IpAddr,
    /// Memory to hold, in MiB; one page in 16 of it stays zero
    #[arg(long, default_value_t = 1_024)]
    pub memory_mib: u32,
    /// Megabytes to write per second, a page at a time, the pages picked at random and verified before
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub mb_per_second: u32,
    /// Memory to verify per second, in MiB
    #[arg(long, default_value_t = 128)]
    pub check_mib_per_second: u32,
    /// Seed of all content
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Runs until the first violation: names it on standard error and returns exit code 1.
pub fn write_memory(args: &WriterArgs) -> Result<ExitCode, WorkloadError> {
    let health = new_health()?;
    let memory = Memory::new(args.seed, args.memory_mib);
    let (listener, address) = listen(args.listen, args.port)?;
    // At most 2.4 million.
    let pages_per_second = (u64::from(args.mb_per_second) * BYTES_PER_MB).div_ceil(PAGE_BYTES) as u32;
    let check = args.check_mib_per_second;
    let (memory_health, streams_health) = (health.clone(), health.clone());
    work_until_violation(
        &health,
        address,
        vec![
            ("memory", Box::new(move || memory.run(&memory_health, pages_per_second, check))),
            ("accept", Box::new(move || streams::accept(&listener, &streams_health))),
        ],
    )
}
