//! Agents ask each other whether they have a controller: over the port of moves, told apart by the protocol's name in the
//! TLS handshake (ALPN, RFC 7301). An agent that does not know the name brings or takes moves only, and vouches for nobody.

use std::io;
use std::sync::Arc;

use godwit_api::tls;
use godwit_lease::Witness;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::server::TlsStream;

use crate::host::Host;

/// The protocol's name in the handshake.
pub const ALPN: &[u8] = b"godwit-witness/1";
/// Longest answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 256;

/// Why a witness gave no answer.
#[derive(Debug, Error)]
pub enum AskError {
    #[error("it cannot be reached")]
    Connect(#[source] io::Error),
    #[error("it does not know the question")]
    Unknown,
    #[error("its answer could not be read")]
    Read(#[source] io::Error),
    #[error("its answer means nothing")]
    Answer(#[source] serde_json::Error),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    /// It has no controller.
    unlinked: bool,
}

/// Whether that host has no controller, said after this was called. To be bounded by the caller.
pub async fn ask(host: &Host, witness: &Witness) -> Result<bool, AskError> {
    let tcp = TcpStream::connect(witness.address).await.map_err(AskError::Connect)?;
    let connector = TlsConnector::from(Arc::clone(&host.witness_tls));
    let name = tls::host_server_name(&witness.host);
    let mut stream = connector.connect(name, tcp).await.map_err(AskError::Connect)?;
    if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(AskError::Unknown);
    }
    let mut text = Vec::new();
    (&mut stream).take(MAX_ANSWER_BYTES).read_to_end(&mut text).await.map_err(AskError::Read)?;
    let answer: Answer = serde_json::from_slice(&text).map_err(AskError::Answer)?;
    Ok(answer.unlinked)
}

/// Answers one that asks. It was asked after its connection was made: this host's answer is not older.
pub async fn answer(host: &Host, mut stream: TlsStream<TcpStream>) -> Result<(), String> {
    let answer = Answer { unlinked: host.lease.vouch() };
    let text = serde_json::to_vec(&answer).map_err(|e| e.to_string())?;
    stream.write_all(&text).await.map_err(|e| e.to_string())?;
    stream.shutdown().await.map_err(|e| e.to_string())
}
