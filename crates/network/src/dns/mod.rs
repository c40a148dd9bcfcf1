//! Names inside an environment: a responder on the environment's gateway address, port 53, UDP and TCP (RFC 1035).
//!
//! It answers the environment's own names from a table and passes every other question on as it came. It binds the
//! gateway address on the environment's own bridge, so only containers of this environment on this host reach it.

mod forward;
mod table;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hickory_proto::op::{Message, OpCode, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::error::NetworkError;
use crate::link_name;
use crate::types::EnvironmentNetwork;
use forward::Transport;
use table::{NameTable, Verdict, failure, to_udp};

const PORT: u16 = 53;
/// Questions of one environment that may wait for a resolver at the same time; more get SERVFAIL at once.
const MAX_FORWARDED: usize = 256;
/// TCP connections of one environment at the same time; more wait in the listen queue.
const MAX_CONNECTIONS: usize = 64;
const LISTEN_QUEUE: u32 = 64;
/// How long a TCP connection may be silent, in seconds.
const IDLE_TIMEOUT_S: u64 = 10;
/// Largest message over UDP we read, in bytes.
const MAX_UDP_BYTES: usize = 4096;
/// Pause after a failed accept or receive, in milliseconds, so that a lasting error does not take a whole core.
const ERROR_PAUSE_MS: u64 = 100;

/// Answers names of one environment until it is dropped.
pub(crate) struct Responder {
    shared: Arc<Shared>,
    gateway: Ipv4Addr,
    tasks: [JoinHandle<()>; 2],
}

struct Shared {
    table: RwLock<Arc<NameTable>>,
    turn: AtomicUsize,
    resolvers: Vec<SocketAddr>,
    forwarded: Semaphore,
}

impl Drop for Responder {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Responder {
    /// Binds the gateway address, which must be on the environment's bridge already, and starts answering.
    pub(crate) fn start(environment: &EnvironmentNetwork, resolvers: &[SocketAddr]) -> Result<Self, NetworkError> {
        let (vni, gateway) = (environment.vni, environment.gateway);
        let failed = |source| NetworkError::Names { vni, address: gateway, source };
        let device = link_name::bridge(vni);
        let (udp, tcp) = bind(gateway, &device).map_err(failed)?;
        let shared = Arc::new(Shared {
            table: RwLock::new(Arc::new(NameTable::new(environment))),
            turn: AtomicUsize::new(0),
            resolvers: resolvers.to_vec(),
            forwarded: Semaphore::new(MAX_FORWARDED),
        });
        let tasks = [tokio::spawn(serve_udp(udp, shared.clone())), tokio::spawn(serve_tcp(tcp, shared.clone()))];
        Ok(Self { shared, gateway, tasks })
    }

    /// Whether it still serves this environment's gateway address.
    pub(crate) fn serves(&self, environment: &EnvironmentNetwork) -> bool {
        self.gateway == environment.gateway && self.tasks.iter().all(|task| !task.is_finished())
    }

    /// From now on these names are answered.
    pub(crate) fn update(&self, environment: &EnvironmentNetwork) {
        let table = Arc::new(NameTable::new(environment));
        *self.shared.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }
}

fn bind(gateway: Ipv4Addr, device: &str) -> io::Result<(UdpSocket, TcpListener)> {
    let address = SocketAddr::V4(SocketAddrV4::new(gateway, PORT));
    let udp = std::net::UdpSocket::bind(address)?;
    udp.set_nonblocking(true)?;
    let udp = UdpSocket::from_std(udp)?;
    udp.bind_device(Some(device.as_bytes()))?;
    let tcp = TcpSocket::new_v4()?;
    tcp.set_reuseaddr(true)?;
    tcp.bind_device(Some(device.as_bytes()))?;
    tcp.bind(address)?;
    Ok((udp, tcp.listen(LISTEN_QUEUE)?))
}

impl Shared {
    /// The answer from the table, or what to ask a resolver. `Err` is the reply to a message that is none.
    fn decide(&self, bytes: &[u8]) -> Result<(Message, Verdict), Option<Vec<u8>>> {
        let Ok(request) = Message::from_vec(bytes) else {
            let id = bytes.first_chunk::<2>().map(|id| u16::from_be_bytes(*id));
            let error = id.map(|id| Message::error_msg(id, OpCode::Query, ResponseCode::FormErr));
            return Err(error.and_then(|error| error.to_vec().ok()));
        };
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner).clone();
        let verdict = table.answer(&request, self.turn.fetch_add(1, Ordering::Relaxed));
        Ok((request, verdict))
    }

    /// A resolver's answer as it came, or our own SERVFAIL.
    async fn elsewhere(&self, request: &Message, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let answer = match self.forwarded.try_acquire() {
            Ok(_permit) => forward::ask(&self.resolvers, bytes, transport).await,
            Err(_) => None,
        };
        answer.or_else(|| failure(request).to_vec().ok())
    }
}

async fn serve_udp(socket: UdpSocket, shared: Arc<Shared>) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; MAX_UDP_BYTES];
    loop {
        let (length, asker) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::warn!(%error, "names over UDP");
                tokio::time::sleep(Duration::from_millis(ERROR_PAUSE_MS)).await;
                continue;
            }
        };
        let bytes = &buffer[..length];
        // A reply that cannot be sent is like one that got lost: the asker asks again.
        match shared.decide(bytes) {
            Err(None) => {}
            Err(Some(reply)) => drop(socket.send_to(&reply, asker).await),
            Ok((request, Verdict::Answer(reply))) => {
                if let Some(reply) = to_udp(&request, &reply) {
                    let _ = socket.send_to(&reply, asker).await;
                }
            }
            Ok((request, Verdict::Elsewhere)) => {
                let (socket, shared, bytes) = (socket.clone(), shared.clone(), bytes.to_vec());
                // Bounded: `elsewhere` gives up at once where too many wait already.
                tokio::spawn(async move {
                    if let Some(reply) = shared.elsewhere(&request, &bytes, Transport::Udp).await {
                        let _ = socket.send_to(&reply, asker).await;
                    }
                });
            }
        }
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Never closed, so the permit never fails; ending the loop then is right anyway.
    while let Ok(slot) = slots.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    // The asker hung up or stayed silent: nothing to tell anyone.
                    let _ = serve_connection(stream, &shared).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "names over TCP");
                tokio::time::sleep(Duration::from_millis(ERROR_PAUSE_MS)).await;
            }
        }
    }
}

/// Messages over TCP carry their length in two bytes before them (RFC 1035 section 4.2.2).
async fn serve_connection(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let idle = Duration::from_secs(IDLE_TIMEOUT_S);
    loop {
        let mut length = [0; 2];
        tokio::time::timeout(idle, stream.read_exact(&mut length)).await??;
        let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
        tokio::time::timeout(idle, stream.read_exact(&mut bytes)).await??;
        let reply = match shared.decide(&bytes) {
            Err(reply) => reply,
            Ok((_, Verdict::Answer(reply))) => reply.to_vec().ok(),
            Ok((request, Verdict::Elsewhere)) => shared.elsewhere(&request, &bytes, Transport::Tcp).await,
        };
        let Some(reply) = reply else { return Ok(()) };
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes(), reply.as_slice()].concat();
        tokio::time::timeout(idle, stream.write_all(&framed)).await??;
    }
}
