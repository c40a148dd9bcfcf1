//! One big file over one HTTP/1.1 connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use sha2::{Digest, Sha256};

use super::WorkloadError;
use super::gap::{GapMeter, IntervalArgs, Report};
use super::image::hex;
use super::stop::{Stop, Until};

const CONNECT_TIMEOUT_MS: u64 = 10_000;
const SILENCE_TIMEOUT_MS: u64 = 60_000;
const MAX_HEADER_BYTES: u64 = 64 << 10;
const READ_BYTES: usize = 64 << 10;
/// Receive buffer of a slow reader: what is stored here hides as much silence as it takes to read it.
const SLOW_BUFFER_BYTES: usize = 64 << 10;
/// Receive buffer of a slow reader that need not be slow any longer.
const FAST_BUFFER_BYTES: usize = 4 << 20;

#[derive(Debug, Clone, clap::Args)]
pub struct HttpArgs {
    /// Where the server listens
    #[arg(long)]
    pub address: SocketAddr,
    /// Path of the file, beginning with a slash
    #[arg(long)]
    pub path: String,
    /// Name in the Host header; the address if it is not given
    #[arg(long)]
    pub host: Option<String>,
    /// Read slowly, so that the file takes this many seconds
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Read slowly only until standard input is closed, then as fast as data comes
    #[arg(long, requires = "seconds")]
    pub until_stdin_closes: bool,
    #[command(flatten)]
    pub intervals: IntervalArgs,
    /// The SHA-256 that the body must have, in hexadecimal
    #[arg(long)]
    pub sha256: Option<String>,
}

/// Gets the file once. The gap is the longest time that one read had to wait for data: pauses made
/// to read slowly do not count. There is no reconnection: a lost connection is an error.
pub fn run_http(args: &HttpArgs) -> Result<Report, WorkloadError> {
    let start = Instant::now();
    let mut report = Report { connections: 1, ..Report::new("http") };
    let mut meter = GapMeter::with_intervals(args.intervals);
    match get(args, &mut meter, &mut report) {
        Ok(found) => {
            let wanted = args.sha256.as_ref().map(|w| w.to_ascii_lowercase());
            if let Some(wanted) = wanted.filter(|w| *w != found) {
                report.error(format!("the body has SHA-256 {found} instead of {wanted}"));
            }
            report.sha256 = Some(found);
            report.requests = 1;
        }
        Err(error) => {
            report.error(format!("{}{}: after {} bytes: {error}", args.address, args.path, report.bytes_received))
        }
    }
    report.gap(&meter);
    report.elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

fn get(args: &HttpArgs, meter: &mut GapMeter, report: &mut Report) -> io::Result<String> {
    let mut stream = open(args)?;
    stream.set_read_timeout(Some(Duration::from_millis(SILENCE_TIMEOUT_MS)))?;
    let host = args.host.clone().unwrap_or_else(|| args.address.to_string());
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: godwit-workload\r\nAccept-Encoding: identity\r\n\r\n",
        args.path
    );
    stream.write_all(request.as_bytes())?;
    report.bytes_sent = request.len() as u64;

    let mut reader = BufReader::with_capacity(READ_BYTES, stream);
    let length = header(&mut reader)?;
    eprintln!("connected");
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    let begin = Instant::now();
    let mut slow = args.seconds.map(|seconds| (seconds, stop(args)));
    while report.bytes_received < length {
        if let Some((_, Some(stop))) = &slow
            && stop.now()
        {
            slow = None;
            sockopt::set_socket_recv_buffer_size(reader.get_ref(), FAST_BUFFER_BYTES)?;
        }
        if let Some((seconds, _)) = &slow {
            let due = Duration::from_secs_f64(seconds.max(0.0) * (report.bytes_received as f64 / length as f64));
            std::thread::sleep(due.saturating_sub(begin.elapsed()));
        }
        let want = usize::try_from(length - report.bytes_received).unwrap_or(READ_BYTES).min(READ_BYTES);
        let before = Instant::now();
        let got = match reader.read(&mut buffer[..want]) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("the body ended before its {length} bytes"),
                ));
            }
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        meter.note(before.elapsed());
        hash.update(&buffer[..got]);
        report.bytes_received += got as u64;
    }
    Ok(hex(&hash.finalize()))
}

fn stop(args: &HttpArgs) -> Option<Stop> {
    args.until_stdin_closes.then(|| Until { seconds: None, until_stdin_closes: true }.start())
}

fn open(args: &HttpArgs) -> io::Result<TcpStream> {
    let timeout = Duration::from_millis(CONNECT_TIMEOUT_MS);
    if args.seconds.is_none() {
        return TcpStream::connect_timeout(&args.address, timeout);
    }
    // Set before connecting, as it decides about the window that both sides agree on.
    let family = if args.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_recv_buffer_size(&socket, SLOW_BUFFER_BYTES)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    connect(&socket, &args.address)?;
    Ok(socket.into())
}

/// Reads the header of a response (RFC 9112); returns the length of the body.
fn header(reader: &mut impl BufRead) -> io::Result<u64> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut limited = reader.take(MAX_HEADER_BYTES);
    let mut line = String::new();
    limited.read_line(&mut line)?;
    if line.split(' ').nth(1) != Some("200") {
        return Err(wrong(format!("the server answered {:?}", line.trim_end())));
    }
    let mut length = None;
    loop {
        line.clear();
        if limited.read_line(&mut line)? == 0 {
            return Err(wrong("the header does not end".to_owned()));
        }
        let text = line.trim_end();
        if text.is_empty() {
            return length.ok_or_else(|| wrong("the answer has no Content-Length".to_owned()));
        }
        if let Some((name, value)) = text.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        let length = |text: &str| header(&mut text.as_bytes());
        assert_eq!(length("HTTP/1.1 200 OK\r\nX: y\r\ncontent-LENGTH: 12\r\n\r\nbody").unwrap(), 12);
        for bad in [
            "",
            "HTTP/1.1 404 Not Found\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        ] {
            assert!(length(bad).is_err(), "{bad:?}");
        }
    }
}
