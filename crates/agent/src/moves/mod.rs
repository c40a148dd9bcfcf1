//! Moves of this host's containers: giving away ([`outgoing`]) and taking in ([`incoming`]).

pub mod dump;
pub mod fill;
pub mod ghosts;
pub mod incoming;
pub mod outgoing;
mod repair;
pub mod room;

use std::sync::Arc;
use std::time::Duration;

use godwit_api::tls::{self, PeerName};
use godwit_api::types::ErrorBody;
use godwit_model::container::Health;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::host::Host;
use crate::witness;

/// A handshake takes at most this long, in milliseconds.
const HANDSHAKE_TIMEOUT_MS: u64 = 10_000;
/// After an accept that failed, the next one waits this long, in milliseconds (out of descriptors, for example).
const ACCEPT_PAUSE_MS: u64 = 100;
/// Before a connection is taken in, this many others may be in their handshake.
const MAX_HANDSHAKES: usize = 64;

/// What the destination has to know of the source's container, in the last frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    pub launch: godwit_container::LaunchSpec,
    pub stdout_pipe: Option<u64>,
    pub stderr_pipe: Option<u64>,
    pub restarts: u32,
    pub started_at_ms: Option<u64>,
    /// As its last health check found it: it is no newcomer where it arrives.
    #[serde(default)]
    pub health: Option<Health>,
    pub image_digest: Option<String>,
}

/// Names of the trees of files, the same on both sides.
pub const ROOT_TREE: &str = "root";

pub fn volume_tree(volume: &str) -> String {
    format!("volume:{volume}")
}

/// Takes connections of other agents that bring a container, until the agent ends.
pub async fn listen(host: Arc<Host>, listener: TcpListener) {
    let slots = Arc::new(tokio::sync::Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let host = Arc::clone(&host);
                tokio::spawn(async move {
                    if let Err(error) = take(&host, stream).await {
                        tracing::warn!(%from, error, "a connection that brings a container was refused");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

async fn take(host: &Arc<Host>, stream: TcpStream) -> Result<(), String> {
    let _ = stream.set_nodelay(true);
    let acceptor = TlsAcceptor::from(Arc::clone(&host.server_tls));
    let limit = Duration::from_millis(HANDSHAKE_TIMEOUT_MS);
    let stream = timeout(limit, acceptor.accept(stream)).await.map_err(|_| "no handshake in time".to_owned())?;
    let stream = stream.map_err(|e| e.to_string())?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = match tls::peer_name(certificates).map_err(|e| ErrorBody::from_chain(&e).one_line())? {
        PeerName::Host(name) => name,
        other => return Err(format!("{other:?} is no host")),
    };
    if stream.get_ref().1.alpn_protocol() == Some(witness::ALPN) {
        return timeout(limit, witness::answer(host, stream)).await.map_err(|_| "no answer in time".to_owned())?;
    }
    incoming::connected(host, peer, stream).await
}
