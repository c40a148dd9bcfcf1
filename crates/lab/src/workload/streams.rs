//! Verified TCP streams: the protocol, and the server's side.
//!
//! ```text
//! client ──▶ server   hello: magic "GDWSTRM1", kind u8, 3 zero bytes, chunk bytes u32, interval µs u32, seed u64
//!
//! kind 1, stream:
//! client ──▶ server   the byte sequence of `seed`, until the client shuts its side down
//! client ◀── server   frames: length u32, so many bytes of the sequence of `!seed`; and in the end
//!                     length 0, bytes received u64. Or, when the server has found something wrong,
//!                     length 0xffff_ffff, message length u32, message
//! kind 2, status:
//! client ◀── server   one JSON object, end of stream
//! ```
//! Numbers are little endian. Both sides pace themselves: one chunk per interval.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::health::{Health, count};
use super::pattern;

const MAGIC: &[u8; 8] = b"GDWSTRM1";
const HELLO_BYTES: usize = 28;
pub(crate) const MAX_CHUNK_BYTES: u32 = 1 << 20;
const MAX_INTERVAL_US: u32 = 10_000_000;
pub(crate) const END: u32 = 0;
pub(crate) const VIOLATION: u32 = u32::MAX;
/// Streams served at once; a further one is closed at once.
const MAX_STREAMS: usize = 256;
/// A connection that does not say what it wants within this time is closed.
const HELLO_TIMEOUT_MS: u64 = 30_000;

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hello {
    Stream { chunk_bytes: u32, interval_us: u32, seed: u64 },
    Status,
}

impl Hello {
    pub fn encode(self) -> [u8; HELLO_BYTES] {
        let (kind, chunk, interval, seed) = match self {
            Hello::Stream { chunk_bytes, interval_us, seed } => (1, chunk_bytes, interval_us, seed),
            Hello::Status => (2, 0, 0, 0),
        };
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8] = kind;
        bytes[12..16].copy_from_slice(&chunk.to_le_bytes());
        bytes[16..20].copy_from_slice(&interval.to_le_bytes());
        bytes[20..].copy_from_slice(&seed.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let four = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (chunk_bytes, interval_us) = (four(12), four(16));
        let seed = u64::from(four(20)) | u64::from(four(24)) << 32;
        match bytes[8] {
            _ if bytes[..8] != MAGIC[..] => None,
            1 if (1..=MAX_CHUNK_BYTES).contains(&chunk_bytes) && interval_us <= MAX_INTERVAL_US => {
                Some(Hello::Stream { chunk_bytes, interval_us, seed })
            }
            2 => Some(Hello::Status),
            _ => None,
        }
    }
}

/// Paces a sender: one chunk per interval. Time that was lost (the program stood still) is not
/// made up for.
pub(crate) struct Pace {
    interval: Duration,
    next: Instant,
}

impl Pace {
    pub fn new(interval_us: u32) -> Self {
        Self { interval: Duration::from_micros(interval_us.into()), next: Instant::now() }
    }

    pub fn wait(&mut self) {
        let now = Instant::now();
        self.next = (self.next + self.interval).max(now);
        std::thread::sleep(self.next - now);
    }
}

/// Accepts streams for ever.
pub(crate) fn accept(listener: &TcpListener, health: &Arc<Health>) {
    let open = Arc::new(AtomicUsize::new(0));
    for connection in listener.incoming() {
        // A connection that is gone before it is accepted is the client's affair.
        let Ok(connection) = connection else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= MAX_STREAMS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (health, open) = (health.clone(), open.clone());
        std::thread::spawn(move || {
            if let Err(error) = serve(connection, &health) {
                eprintln!("stream: {error}");
                count(&health.streams_broken, 1);
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn serve(mut connection: TcpStream, health: &Arc<Health>) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(Duration::from_millis(HELLO_TIMEOUT_MS)))?;
    let mut hello = [0; HELLO_BYTES];
    connection.read_exact(&mut hello)?;
    connection.set_read_timeout(None)?;
    match Hello::decode(&hello) {
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "a connection that speaks another protocol")),
        Some(Hello::Status) => {
            serde_json::to_writer(&mut connection, &health.status())?;
            connection.shutdown(Shutdown::Write)
        }
        Some(Hello::Stream { chunk_bytes, interval_us, seed }) => {
            count(&health.streams_accepted, 1);
            let state = Arc::new(StreamState::default());
            let (sender, sending, sender_health) = (connection.try_clone()?, state.clone(), health.clone());
            let writer =
                std::thread::spawn(move || send(sender, &sending, &sender_health, chunk_bytes, interval_us, !seed));
            let received = receive(&mut connection, &state, health, seed);
            if received.is_err() {
                // The sender may be waiting for room.
                let _ = connection.shutdown(Shutdown::Both);
            }
            state.done.store(true, Ordering::Release);
            let sent = writer.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")));
            received.and(sent)
        }
    }
}

#[derive(Default)]
struct StreamState {
    received: AtomicU64,
    /// The client has ended its side, or something is wrong.
    done: AtomicBool,
    wrong_at: std::sync::OnceLock<u64>,
}

fn receive(connection: &mut TcpStream, state: &StreamState, health: &Health, seed: u64) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut position = 0;
    loop {
        let length = match connection.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if let Some(at) = pattern::first_difference(seed, position, &buffer[..length]) {
            let _ = state.wrong_at.set(at);
            health.violate(format!("stream: byte {at} from the client is wrong"));
            return Ok(());
        }
        position += length as u64;
        state.received.store(position, Ordering::Release);
        count(&health.stream_bytes_received, length as u64);
    }
}

fn send(
    mut connection: TcpStream,
    state: &StreamState,
    health: &Health,
    chunk_bytes: u32,
    interval_us: u32,
    seed: u64,
) -> io::Result<()> {
    let mut frame = vec![0; 4 + chunk_bytes as usize];
    frame[..4].copy_from_slice(&chunk_bytes.to_le_bytes());
    let mut position = 0;
    let mut pace = Pace::new(interval_us);
    while !state.done.load(Ordering::Acquire) {
        pattern::fill(seed, position, &mut frame[4..]);
        connection.write_all(&frame)?;
        position += u64::from(chunk_bytes);
        count(&health.stream_bytes_sent, u64::from(chunk_bytes));
        pace.wait();
    }
    let mut last = Vec::new();
    match state.wrong_at.get() {
        Some(at) => {
            let message = format!("the server found byte {at} to be wrong");
            last.extend_from_slice(&VIOLATION.to_le_bytes());
            last.extend_from_slice(&(message.len() as u32).to_le_bytes());
            last.extend_from_slice(message.as_bytes());
        }
        None => {
            last.extend_from_slice(&END.to_le_bytes());
            last.extend_from_slice(&state.received.load(Ordering::Acquire).to_le_bytes());
        }
    }
    connection.write_all(&last)?;
    connection.shutdown(Shutdown::Write)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hello_is_read_back_and_checked() {
        for hello in [Hello::Status, Hello::Stream { chunk_bytes: 7, interval_us: 9, seed: u64::MAX - 3 }] {
            assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        }
        for bad in [
            Hello::Stream { chunk_bytes: 0, interval_us: 1, seed: 0 },
            Hello::Stream { chunk_bytes: MAX_CHUNK_BYTES + 1, interval_us: 1, seed: 0 },
            Hello::Stream { chunk_bytes: 1, interval_us: u32::MAX, seed: 0 },
        ] {
            assert_eq!(Hello::decode(&bad.encode()), None);
        }
        let mut foreign = Hello::Status.encode();
        foreign[0] = b'H';
        assert_eq!(Hello::decode(&foreign), None);
    }
}
