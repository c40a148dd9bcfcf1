//! `memory-files-streams`: everything a move has to carry, in one program that checks itself.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use super::files::Files;
use super::health::Health;
use super::memory::Memory;
use super::{WorkloadError, streams, wires};

/// How long after a violation the server still answers `status`.
const STATUS_GRACE_MS: u64 = 2_000;

#[derive(Debug, Clone, clap::Args)]
pub struct ServerArgs {
    /// TCP port of the streams; 0 picks one. It is printed as `listening ADDRESS:PORT`
    #[arg(long)]
    pub port: u16,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub listen: IpAddr,
    /// Directory for files; made if it is missing
    #[arg(long)]
    pub dir: PathBuf,
    /// Memory to hold, in MiB; one page in 16 of it stays zero
    #[arg(long, default_value_t = 64)]
    pub memory_mib: u32,
    /// Pages of 4 KiB to rewrite per second
    #[arg(long, default_value_t = 2_000)]
    pub dirty_pages_per_second: u32,
    /// Memory to verify per second, in MiB
    #[arg(long, default_value_t = 128)]
    pub check_mib_per_second: u32,
    /// Seed of all content
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Runs until the first violation: names it on standard error and returns exit code 1.
pub fn serve(args: &ServerArgs, own_prefix: &[&str]) -> Result<ExitCode, WorkloadError> {
    let health = new_health()?;
    let files =
        Files::new(&args.dir, args.seed).map_err(WorkloadError::io(format!("make files in {}", args.dir.display())))?;
    let memory = Memory::new(args.seed, args.memory_mib);
    let (listener, address) = listen(args.listen, args.port)?;
    wires::start(&health, args.seed, own_prefix)
        .map_err(WorkloadError::io("start pipes, timers and the child process"))?;
    let (dirty, check) = (args.dirty_pages_per_second, args.check_mib_per_second);
    let (memory_health, files_health, streams_health) = (health.clone(), health.clone(), health.clone());
    work_until_violation(
        &health,
        address,
        vec![
            ("memory", Box::new(move || memory.run(&memory_health, dirty, check))),
            ("files", Box::new(move || files.run(&files_health))),
            ("accept", Box::new(move || streams::accept(&listener, &streams_health))),
        ],
    )
}

/// Work of one thread: it ends at the first violation, or never.
pub(crate) type Work = Box<dyn FnOnce() + Send>;

/// Starts a thread for each work, says where it listens, and waits for the first violation.
pub(crate) fn work_until_violation(
    health: &Health,
    address: SocketAddr,
    threads: Vec<(&str, Work)>,
) -> Result<ExitCode, WorkloadError> {
    for (name, work) in threads {
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(WorkloadError::io(format!("start the thread {name}")))?;
    }
    println!("listening {address}");

    health.wait_violation();
    // Whoever asks now is told; then the exit code tells everyone else.
    std::thread::sleep(Duration::from_millis(STATUS_GRACE_MS));
    Ok(ExitCode::FAILURE)
}

pub(crate) fn listen(address: IpAddr, port: u16) -> Result<(TcpListener, SocketAddr), WorkloadError> {
    let listener =
        TcpListener::bind((address, port)).map_err(WorkloadError::io(format!("listen on {address}:{port}")))?;
    let address = listener.local_addr().map_err(WorkloadError::io("ask for the port"))?;
    Ok((listener, address))
}

/// With a number of its own for this start.
pub(crate) fn new_health() -> Result<Arc<Health>, WorkloadError> {
    Ok(Arc::new(Health::new(random().map_err(WorkloadError::io("read /dev/urandom"))?)))
}

fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    // 53 bits, so that every JSON reader keeps the number.
    Ok(u64::from_le_bytes(bytes) >> 11)
}
