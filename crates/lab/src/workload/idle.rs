//! Many connections to Redis that do nothing, and must all still be there afterwards.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::WorkloadError;
use super::gap::{GapMeter, Report};
use super::stop::Until;

const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// A connection that does not answer within this time is taken for dead.
const ANSWER_TIMEOUT_MS: u64 = 10_000;
/// Between two looks at whether it is over.
const LOOK_EVERY_MS: u64 = 20;
/// Descriptors beside those of the connections.
const OTHER_DESCRIPTORS: u64 = 64;
/// Connections that did not answer, after which no further one is asked: each takes its timeout.
const MAX_SILENT: u64 = 5;
const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
const PONG: &[u8] = b"+PONG\r\n";

#[derive(Debug, Clone, clap::Args)]
pub struct IdleArgs {
    /// Where Redis listens
    #[arg(long)]
    pub address: SocketAddr,
    /// Connections to hold open; one address of a client has about 28,000 ports
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=28_000))]
    pub connections: u32,
    #[command(flatten)]
    pub until: Until,
}

/// Opens the connections, each answered once; says `connected`, waits, and asks every one again. The gap is the
/// longest that one of them took to answer in the end. There is no reconnection: a lost connection is an error.
pub fn run_idle(args: &IdleArgs) -> Result<Report, WorkloadError> {
    let stop = args.until.start();
    let start = Instant::now();
    allow_descriptors(u64::from(args.connections) + OTHER_DESCRIPTORS)
        .map_err(WorkloadError::io(format!("have {} connections open", args.connections)))?;
    let mut report = Report { connections: args.connections, ..Report::new("redis-idle") };
    let mut connections = Vec::with_capacity(args.connections as usize);
    for number in 0..args.connections {
        let step = || WorkloadError::io(format!("open connection {number} to {}", args.address));
        let mut connection = connect(args.address).map_err(step())?;
        ask(&mut connection, &mut report).map_err(step())?;
        connections.push(connection);
    }
    eprintln!("connected");
    while !stop.now() {
        std::thread::sleep(Duration::from_millis(LOOK_EVERY_MS));
    }
    let mut meter = GapMeter::start();
    let mut silent = 0;
    for (number, connection) in connections.iter_mut().enumerate() {
        if silent >= MAX_SILENT {
            report.error(format!("connection {number} and those behind it were not asked"));
            break;
        }
        let asked = Instant::now();
        match ask(connection, &mut report) {
            Ok(()) => meter.note(asked.elapsed()),
            Err(error) => {
                silent += u64::from(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
                report.error(format!("connection {number}: {error}"));
            }
        }
    }
    report.gap(&meter);
    report.elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_millis(CONNECT_TIMEOUT_MS))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(ANSWER_TIMEOUT_MS)))?;
    stream.set_write_timeout(Some(Duration::from_millis(ANSWER_TIMEOUT_MS)))?;
    Ok(stream)
}

fn ask(connection: &mut TcpStream, report: &mut Report) -> io::Result<()> {
    connection.write_all(PING)?;
    let mut answer = [0; PONG.len()];
    connection.read_exact(&mut answer)?;
    if answer != PONG {
        return Err(io::Error::other(format!("{:?} is no answer to PING", String::from_utf8_lossy(&answer))));
    }
    report.requests += 1;
    report.bytes_sent += PING.len() as u64;
    report.bytes_received += answer.len() as u64;
    Ok(())
}

/// Raises the soft limit of open files where it is lower.
fn allow_descriptors(wanted: u64) -> io::Result<()> {
    let have = getrlimit(Resource::Nofile);
    if have.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = have.maximum.map(|maximum| maximum.max(wanted));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })?;
    Ok(())
}
