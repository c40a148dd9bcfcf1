//! Clients of Redis, speaking RESP version 2 by hand (redis.io, "Redis serialization protocol
//! specification"): what arrives on the connection is seen as it is.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::WorkloadError;
use super::gap::{GapMeter, IntervalArgs, Report};
use super::pattern;
use super::stop::{Stop, Until};
use super::streams::Pace;

const CONNECT_TIMEOUT_MS: u64 = 10_000;
const SILENCE_TIMEOUT_MS: u64 = 60_000;
const RECONNECT_MS: u64 = 100;
const MAX_RECONNECTS: u64 = 1_000;
/// Commands sent before their answers are read.
const PIPELINE: u64 = 16;
/// Longest reply line; Redis errors are far shorter.
const MAX_LINE_BYTES: u64 = 4_096;

#[derive(Debug, Clone, clap::Args)]
pub struct RedisArgs {
    /// Where Redis listens
    #[arg(long)]
    pub address: SocketAddr,
    /// Key to increment
    #[arg(long, default_value = "godwit")]
    pub key: String,
    /// Microseconds between two requests
    #[arg(long, default_value_t = 500)]
    pub interval_us: u32,
    #[command(flatten)]
    pub intervals: IntervalArgs,
    #[command(flatten)]
    pub until: Until,
}

#[derive(Debug, Clone, clap::Args)]
pub struct RedisDataArgs {
    /// Where Redis listens
    #[arg(long)]
    pub address: SocketAddr,
    /// Size of all values together, in MiB
    #[arg(long)]
    pub mib: u32,
    /// Bytes in one value
    #[arg(long, default_value_t = 64 << 10, value_parser = clap::value_parser!(u32).range(1..=(16 << 20)))]
    pub value_bytes: u32,
    /// Seed of the values' content
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_millis(CONNECT_TIMEOUT_MS))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(SILENCE_TIMEOUT_MS)))?;
        stream.set_write_timeout(Some(Duration::from_millis(SILENCE_TIMEOUT_MS)))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    fn send(&mut self, parts: &[&[u8]]) -> io::Result<u64> {
        let mut text = format!("*{}\r\n", parts.len()).into_bytes();
        for part in parts {
            text.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
            text.extend_from_slice(part);
            text.extend_from_slice(b"\r\n");
        }
        self.reader.get_mut().write_all(&text)?;
        Ok(text.len() as u64)
    }

    /// One line without its end; an error reply is an error.
    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        let Some(text) = line.strip_suffix(b"\r\n") else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "Redis closed the connection"));
        };
        let text = String::from_utf8_lossy(text).into_owned();
        if text.starts_with('-') { Err(io::Error::other(format!("Redis says: {text}"))) } else { Ok(text) }
    }

    fn number(&mut self) -> io::Result<i64> {
        let line = self.line()?;
        line.strip_prefix(':')
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| io::Error::other(format!("{line:?} is not a number")))
    }

    /// A bulk string into `buffer`; false if there is none.
    fn bulk(&mut self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        let line = self.line()?;
        if line == "$-1" {
            return Ok(false);
        }
        let length: usize = line
            .strip_prefix('$')
            .and_then(|n| n.parse().ok())
            .filter(|n| *n <= 512 << 20)
            .ok_or_else(|| io::Error::other(format!("{line:?} is not the beginning of a string")))?;
        buffer.resize(length + 2, 0);
        self.reader.read_exact(buffer)?;
        buffer.truncate(length);
        Ok(true)
    }
}

/// Increments one key on one connection: each answer must be the next number.
pub fn run_redis(args: &RedisArgs) -> Result<Report, WorkloadError> {
    let stop = args.until.start();
    let start = Instant::now();
    let mut report = Report { connections: 1, ..Report::new("redis") };
    let mut meter = GapMeter::with_intervals(args.intervals);
    let mut last = None;
    for _ in 0..=MAX_RECONNECTS {
        match increment(args, &stop, &mut last, &mut meter, &mut report) {
            Ok(()) => break,
            Err(error) => report.error(format!("{}: {error}", args.address)),
        }
        if stop.now() {
            break;
        }
        std::thread::sleep(Duration::from_millis(RECONNECT_MS));
        report.reconnects += 1;
    }
    report.gap(&meter);
    report.elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

fn increment(
    args: &RedisArgs,
    stop: &Stop,
    last: &mut Option<i64>,
    meter: &mut GapMeter,
    report: &mut Report,
) -> io::Result<()> {
    let mut connection = Connection::open(args.address)?;
    if report.errors == 0 {
        // The time to connect is no silence of a connection.
        meter.restart();
    }
    let mut pace = Pace::new(args.interval_us);
    while !stop.now() {
        report.bytes_sent += connection.send(&[b"INCR", args.key.as_bytes()])?;
        let number = connection.number()?;
        meter.arrived();
        report.requests += 1;
        report.bytes_received += 3 + number.to_string().len() as u64;
        match *last {
            None => eprintln!("connected"),
            Some(before) if number == before + 1 => {}
            Some(before) => report.error(format!("{number} came after {before}")),
        }
        *last = Some(number);
        pace.wait();
    }
    Ok(())
}

/// Writes values whose content follows from seed and number.
pub fn fill_redis(args: &RedisDataArgs) -> Result<Report, WorkloadError> {
    data(
        "redis-fill",
        args,
        |connection, index, value, report| {
            pattern::fill(args.seed ^ index, 0, value);
            let key = format!("godwit:{index}");
            report.bytes_sent += connection.send(&[b"SET", key.as_bytes(), value])?;
            Ok(())
        },
        |connection, _, _, report| {
            report.bytes_received += connection.line()?.len() as u64 + 2;
            Ok(())
        },
    )
}

/// Reads the values that `fill_redis` has written and verifies each byte.
pub fn check_redis(args: &RedisDataArgs) -> Result<Report, WorkloadError> {
    data(
        "redis-check",
        args,
        |connection, index, _, report| {
            report.bytes_sent += connection.send(&[b"GET", format!("godwit:{index}").as_bytes()])?;
            Ok(())
        },
        |connection, index, value, report| {
            let expected = args.value_bytes as usize;
            if !connection.bulk(value)? {
                report.error(format!("value {index} is gone"));
            } else if value.len() != expected {
                report.error(format!("value {index} has {} bytes instead of {expected}", value.len()));
            } else if let Some(at) = pattern::first_difference(args.seed ^ index, 0, value) {
                report.error(format!("value {index} is wrong at byte {at}"));
            }
            report.bytes_received += value.len() as u64;
            value.resize(expected, 0);
            Ok(())
        },
    )
}

type Step<'a> = &'a dyn Fn(&mut Connection, u64, &mut Vec<u8>, &mut Report) -> io::Result<()>;

fn data(
    program: &str,
    args: &RedisDataArgs,
    ask: impl Fn(&mut Connection, u64, &mut Vec<u8>, &mut Report) -> io::Result<()>,
    take: impl Fn(&mut Connection, u64, &mut Vec<u8>, &mut Report) -> io::Result<()>,
) -> Result<Report, WorkloadError> {
    let (ask, take): (Step<'_>, Step<'_>) = (&ask, &take);
    let start = Instant::now();
    let mut report = Report { connections: 1, ..Report::new(program) };
    let values = (u64::from(args.mib) << 20).div_ceil(args.value_bytes.into());
    let mut value = vec![0; args.value_bytes as usize];
    let mut work = || -> io::Result<()> {
        let mut connection = Connection::open(args.address)?;
        let mut next = 0;
        while next < values {
            let batch = next..(next + PIPELINE).min(values);
            for index in batch.clone() {
                ask(&mut connection, index, &mut value, &mut report)?;
            }
            for index in batch.clone() {
                take(&mut connection, index, &mut value, &mut report)?;
                report.requests += 1;
            }
            next = batch.end;
        }
        Ok(())
    };
    work().map_err(WorkloadError::io(format!("talk to Redis at {}", args.address)))?;
    report.elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}
