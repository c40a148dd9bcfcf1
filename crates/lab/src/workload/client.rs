//! The client of `memory-files-streams`.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::WorkloadError;
use super::gap::{GapMeter, IntervalArgs, Report};
use super::health::Status;
use super::pattern::{self, mix};
use super::stop::{Stop, Until};
use super::streams::{END, Hello, MAX_CHUNK_BYTES, Pace, VIOLATION};

const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// A connection that is silent for this long is taken for dead.
const SILENCE_TIMEOUT_MS: u64 = 60_000;
/// Between two tries to connect again.
const RECONNECT_MS: u64 = 100;
const MAX_RECONNECTS: u64 = 1_000;
const MAX_MESSAGE_BYTES: u32 = 4_096;
const MAX_STATUS_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone, clap::Args)]
pub struct ClientArgs {
    /// Where memory-files-streams listens
    #[arg(long)]
    pub address: SocketAddr,
    /// Connections at the same time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub connections: u32,
    /// Bytes in one chunk, in each direction
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=MAX_CHUNK_BYTES as i64))]
    pub chunk_bytes: u32,
    /// Microseconds between two chunks; 0 sends as fast as the link takes it
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    pub interval_us: u32,
    /// Seed of the streams' content
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    pub intervals: IntervalArgs,
    #[command(flatten)]
    pub until: Until,
}

/// Works until it shall stop; a lost connection is an error and is made again.
pub fn run_client(args: &ClientArgs) -> Result<Report, WorkloadError> {
    let stop = args.until.start();
    let start = Instant::now();
    let flowing = Arc::new(AtomicUsize::new(args.connections as usize));
    let threads: Vec<_> = (0..args.connections)
        .map(|number| {
            let (args, stop, flowing) = (args.clone(), stop.clone(), flowing.clone());
            std::thread::spawn(move || one_connection(&args, number, &stop, &flowing))
        })
        .collect();
    let mut report = Report::new("memory-files-streams");
    for thread in threads {
        match thread.join() {
            Ok(one) => report.add(one),
            Err(_) => report.error("a client thread panicked"),
        }
    }
    report.elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

fn one_connection(args: &ClientArgs, number: u32, stop: &Stop, flowing: &AtomicUsize) -> Report {
    let mut report = Report { connections: 1, ..Report::default() };
    // One meter over reconnections: the time without a connection is silence too.
    let mut meter = GapMeter::with_intervals(args.intervals);
    for attempt in 0..=MAX_RECONNECTS {
        let seed = mix(args.seed ^ (u64::from(number) << 32) ^ attempt);
        match one_stream(args, seed, stop, flowing, &mut meter, &mut report) {
            Ok(()) => break,
            Err(error) => report.error(format!("connection {number}: {error}")),
        }
        if stop.now() {
            break;
        }
        std::thread::sleep(Duration::from_millis(RECONNECT_MS));
        report.reconnects += 1;
    }
    report.gap(&meter);
    report
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_millis(CONNECT_TIMEOUT_MS))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(SILENCE_TIMEOUT_MS)))?;
    stream.set_write_timeout(Some(Duration::from_millis(SILENCE_TIMEOUT_MS)))?;
    Ok(stream)
}

fn one_stream(
    args: &ClientArgs,
    seed: u64,
    stop: &Stop,
    flowing: &AtomicUsize,
    meter: &mut GapMeter,
    report: &mut Report,
) -> io::Result<()> {
    let mut stream = connect(args.address)?;
    stream.write_all(&Hello::Stream { chunk_bytes: args.chunk_bytes, interval_us: args.interval_us, seed }.encode())?;
    if report.errors == 0 {
        // The time to connect is no silence of a connection.
        meter.restart();
    }
    let sent = AtomicU64::new(0);
    let broken = AtomicBool::new(false);
    let sender = stream.try_clone()?;
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let result = send(sender, args, seed, stop, &sent, &broken);
            if result.is_err() {
                // The receiver must not wait for an answer to what was never sent.
                let _ = stream.shutdown(Shutdown::Both);
            }
            result
        });
        let received = receive(&stream, !seed, flowing, meter, report);
        broken.store(true, Ordering::Relaxed);
        if received.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sending = sending.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")));
        let sent = sent.load(Ordering::Relaxed);
        report.bytes_sent += sent;
        // What the server says is the better reason.
        match received? {
            confirmed if sending.is_ok() && confirmed != sent => {
                Err(io::Error::other(format!("the server has {confirmed} bytes, {sent} were sent")))
            }
            _ => sending,
        }
    })
}

fn send(
    mut stream: TcpStream,
    args: &ClientArgs,
    seed: u64,
    stop: &Stop,
    sent: &AtomicU64,
    broken: &AtomicBool,
) -> io::Result<()> {
    let mut chunk = vec![0; args.chunk_bytes as usize];
    let mut pace = Pace::new(args.interval_us);
    let mut position = 0;
    while !stop.now() {
        if broken.load(Ordering::Relaxed) {
            return Ok(());
        }
        pattern::fill(seed, position, &mut chunk);
        stream.write_all(&chunk)?;
        position += chunk.len() as u64;
        sent.store(position, Ordering::Relaxed);
        pace.wait();
    }
    stream.shutdown(Shutdown::Write)
}

/// Verifies frames until the server's last one; returns how many bytes it says it has received.
fn receive(
    stream: &TcpStream,
    seed: u64,
    flowing: &AtomicUsize,
    meter: &mut GapMeter,
    report: &mut Report,
) -> io::Result<u64> {
    // One read per arrival: a small buffer would hide when data came.
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    let mut data = vec![0; MAX_CHUNK_BYTES as usize];
    let mut position = 0;
    loop {
        let length = number(&mut stream)?;
        match length {
            END => {
                let mut count = [0; 8];
                stream.read_exact(&mut count)?;
                let mut rest = [0];
                return match stream.read(&mut rest)? {
                    0 => Ok(u64::from_le_bytes(count)),
                    _ => Err(io::Error::other("the server sent more after its last frame")),
                };
            }
            VIOLATION => {
                let length = number(&mut stream)?.min(MAX_MESSAGE_BYTES) as usize;
                stream.read_exact(&mut data[..length])?;
                return Err(io::Error::other(String::from_utf8_lossy(&data[..length]).into_owned()));
            }
            length if length > MAX_CHUNK_BYTES => {
                return Err(io::Error::other(format!("byte {position}: a frame of {length} bytes")));
            }
            length => {
                let part = &mut data[..length as usize];
                stream.read_exact(part)?;
                meter.arrived();
                if let Some(at) = pattern::first_difference(seed, position, part) {
                    return Err(io::Error::other(format!("byte {at} from the server is wrong")));
                }
                if position == 0 && flowing.fetch_sub(1, Ordering::AcqRel) == 1 {
                    eprintln!("connected");
                }
                position += u64::from(length);
                report.bytes_received += u64::from(length);
                report.requests += 1;
            }
        }
    }
}

fn number(stream: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Asks a server how it is.
pub fn status(address: SocketAddr) -> Result<Status, WorkloadError> {
    let step = || WorkloadError::io(format!("ask {address} for its status"));
    let mut stream = connect(address).map_err(step())?;
    stream.write_all(&Hello::Status.encode()).map_err(step())?;
    let mut text = Vec::new();
    stream.take(MAX_STATUS_BYTES).read_to_end(&mut text).map_err(step())?;
    serde_json::from_slice(&text).map_err(|e| WorkloadError::Protocol {
        from: address,
        protocol: "a status",
        what: e.to_string(),
    })
}
