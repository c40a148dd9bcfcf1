//! Workloads that check themselves, and the clients that check them from outside.
//!
//! The server keeps memory, files, pipes, timers, a child process and TCP streams busy with content
//! that follows from seeds and positions, so it can verify all of it at any time without a copy.
//! What is lost, doubled, swapped or stale is a **violation**: it is named on standard error, told
//! to whoever asks for `status`, and ends the server with exit code 1.
//!
//! Clients print one JSON object ([`Report`]) on standard output, the line `connected` on standard
//! error once data flows both ways, and exit with 0 only if every byte was right and no connection
//! was lost. They use blocking sockets on threads of their own: gaps are measured where the data
//! arrives, not where a scheduler gets round to it.

mod blocks;
mod client;
mod files;
mod gap;
mod health;
mod http;
mod idle;
mod image;
mod memory;
mod pattern;
mod redis;
mod server;
mod stop;
mod streams;
mod wires;
mod writer;

use std::net::SocketAddr;
use std::process::ExitCode;

pub use client::{ClientArgs, run_client, status};
pub use gap::{Interval, IntervalArgs, Report};
pub use health::Status;
pub use http::{HttpArgs, run_http};
pub use idle::{IdleArgs, run_idle};
pub use image::{ImageArgs, ImageError, ImageSummary, write_image};
pub use redis::{RedisArgs, RedisDataArgs, check_redis, fill_redis, run_redis};
pub use server::{ServerArgs, serve};
pub use stop::Until;
pub use writer::{WriterArgs, write_memory};

/// A workload that could not do its work at all, as opposed to finding something wrong.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error("cannot {step}")]
    Io { step: String, source: std::io::Error },
    #[error("{from} answered something else than {protocol}: {what}")]
    Protocol { from: SocketAddr, protocol: &'static str, what: String },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot write the report")]
    Report(#[from] serde_json::Error),
}

impl WorkloadError {
    pub(crate) fn io(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let step = step.into();
        move |source| Self::Io { step, source }
    }
}

/// `godwit workload …`, which is also the whole of the small `godwit-workload` program.
#[derive(Debug, clap::Subcommand)]
pub enum WorkloadCommand {
    /// Keep memory, files, pipes, timers and TCP streams busy and verify all of it
    MemoryFilesStreams(ServerArgs),
    /// Rewrite memory at a given rate and verify it; with the streams of memory-files-streams
    MemoryWriter(WriterArgs),
    /// Exchange verified streams with memory-files-streams and measure the longest silence
    Client(ClientArgs),
    /// Ask memory-files-streams whether all is well
    Status {
        /// Where it listens
        #[arg(long)]
        address: SocketAddr,
    },
    /// Send INCR on one Redis connection and check each number
    RedisClient(RedisArgs),
    /// Fill Redis with values that redis-check can verify
    RedisFill(RedisDataArgs),
    /// Verify the values that redis-fill has written
    RedisCheck(RedisDataArgs),
    /// Hold many idle connections to Redis and ask each one again in the end
    RedisIdle(IdleArgs),
    /// Get one big file over one HTTP/1.1 connection and check its SHA-256
    HttpClient(HttpArgs),
    /// Write an OCI image layout that holds this program
    Image(ImageArgs),
    /// The child process of memory-files-streams
    #[command(hide = true)]
    Peer,
}

/// Runs a workload. `own_prefix` are the arguments that come before the subcommand in this
/// program: `["workload"]` for `godwit`, none for `godwit-workload`.
pub fn run(command: WorkloadCommand, own_prefix: &[&str]) -> Result<ExitCode, WorkloadError> {
    match command {
        WorkloadCommand::MemoryFilesStreams(args) => serve(&args, own_prefix),
        WorkloadCommand::MemoryWriter(args) => write_memory(&args),
        WorkloadCommand::Client(args) => finish(&run_client(&args)?),
        WorkloadCommand::Status { address } => {
            let status = status(address)?;
            println!("{}", serde_json::to_string(&status)?);
            Ok(exit_code(status.ok))
        }
        WorkloadCommand::RedisClient(args) => finish(&run_redis(&args)?),
        WorkloadCommand::RedisFill(args) => finish(&fill_redis(&args)?),
        WorkloadCommand::RedisCheck(args) => finish(&check_redis(&args)?),
        WorkloadCommand::RedisIdle(args) => finish(&run_idle(&args)?),
        WorkloadCommand::HttpClient(args) => finish(&run_http(&args)?),
        WorkloadCommand::Image(args) => {
            println!("{}", serde_json::to_string(&args.run(own_prefix)?)?);
            Ok(ExitCode::SUCCESS)
        }
        WorkloadCommand::Peer => {
            wires::peer().map_err(WorkloadError::io("echo on standard input and output"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn finish(report: &Report) -> Result<ExitCode, WorkloadError> {
    println!("{}", serde_json::to_string(report)?);
    for message in &report.messages {
        eprintln!("{message}");
    }
    Ok(exit_code(report.ok()))
}

fn exit_code(ok: bool) -> ExitCode {
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
