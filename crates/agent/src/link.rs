//! The connection to the controller: dialled by us, for as long as the agent lives, with growing pauses between tries.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use godwit_api::link::{FromAgent, FromController, HEARTBEAT_MS, MAX_MESSAGE_BYTES, PROTOCOL, SILENCE_MS};
use godwit_api::routes;
use godwit_api::types::ErrorBody;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::host::{Host, locked};

/// Pauses between tries, in milliseconds: the first and the longest.
const FIRST_PAUSE_MS: u64 = 100;
const LONGEST_PAUSE_MS: u64 = 2_000;
/// Connecting and both handshakes, in milliseconds.
const CONNECT_TIMEOUT_MS: u64 = 5_000;
/// Messages waiting to be sent; beyond it senders wait.
const QUEUE_MESSAGES: usize = 1024;

pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

#[derive(Debug, Error)]
pub enum DialError {
    #[error("{address} cannot be reached")]
    Connect { address: String, source: std::io::Error },
    #[error("{address} does not answer within {CONNECT_TIMEOUT_MS} ms")]
    Timeout { address: String },
    #[error("TLS with {address} failed; does this host's identity belong to that controller?")]
    Tls { address: String, source: std::io::Error },
    #[error("{address} did not open {path}")]
    Upgrade { address: String, path: String, source: Box<tokio_tungstenite::tungstenite::Error> },
}

/// A WebSocket to the controller at one of its agents' routes.
pub async fn dial(host: &Host, path: &str) -> Result<Socket, DialError> {
    let address = host.config.controller.clone();
    let late = |_| DialError::Timeout { address: address.clone() };
    let limit = Duration::from_millis(CONNECT_TIMEOUT_MS);
    let connect = async {
        let tcp = TcpStream::connect(&address)
            .await
            .map_err(|source| DialError::Connect { address: address.clone(), source })?;
        let _ = tcp.set_nodelay(true);
        if let Ok(std::net::SocketAddr::V4(peer)) = tcp.peer_addr() {
            *locked(&host.controller_address) = Some(*peer.ip());
        }
        let name = godwit_api::tls::controller_server_name();
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&host.client_tls));
        let tls =
            connector.connect(name, tcp).await.map_err(|source| DialError::Tls { address: address.clone(), source })?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let url = format!("wss://controller{path}");
        let (socket, _) =
            tokio_tungstenite::client_async_with_config(url, tls, Some(config)).await.map_err(|source| {
                DialError::Upgrade { address: address.clone(), path: path.to_owned(), source: Box::new(source) }
            })?;
        Ok(socket)
    };
    timeout(limit, connect).await.map_err(late)?
}

/// What the rest of the agent says to the controller. Cheap to clone; messages said while there is no link are kept
/// only as far as the queue goes, which is fine: `Status` and `Desired` repeat everything that matters.
#[derive(Clone)]
pub struct Voice {
    queue: mpsc::Sender<FromAgent>,
}

impl Voice {
    pub fn say(&self, message: FromAgent) {
        if self.queue.try_send(message).is_err() {
            tracing::warn!("a message to the controller was dropped: the link is down or too slow");
        }
    }
}

/// The other end of [`Voice`], owned by [`run`].
pub struct Line {
    queue: mpsc::Receiver<FromAgent>,
}

pub fn voice() -> (Voice, Line) {
    let (queue, receiver) = mpsc::channel(QUEUE_MESSAGES);
    (Voice { queue }, Line { queue: receiver })
}

/// Keeps the link; returns only when the agent ends.
pub async fn run(host: Arc<Host>, mut line: Line) {
    let mut pause = FIRST_PAUSE_MS;
    let mut said = String::new();
    loop {
        match dial(&host, routes::AGENT_LINK).await {
            Ok(socket) => {
                said.clear();
                pause = FIRST_PAUSE_MS;
                let end = serve(&host, &mut line, socket).await;
                tracing::warn!(reason = end, "the link to the controller is down; containers go on");
            }
            Err(error) => {
                let text = ErrorBody::from_chain(&error).one_line();
                if text != said {
                    tracing::warn!(%text, "no link to the controller; trying again");
                    said = text;
                }
            }
        }
        // Not a wait for something to happen: the pause that keeps many agents from storming one controller.
        tokio::time::sleep(Duration::from_millis(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE_MS);
    }
}

/// Speaks over one connection until it ends; the reason it did.
async fn serve(host: &Arc<Host>, line: &mut Line, mut socket: Socket) -> String {
    // What was queued for an older connection is older than the Hello below.
    while line.queue.try_recv().is_ok() {}
    let hello = FromAgent::Hello { protocol: PROTOCOL, facts: Box::new(host.facts()) };
    if let Err(reason) = write(&mut socket, &hello).await {
        return reason;
    }
    if let Err(reason) = write(&mut socket, &host.status()).await {
        return reason;
    }
    tracing::info!(controller = host.config.controller, "linked to the controller");
    let mut beat = interval(Duration::from_millis(HEARTBEAT_MS));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            message = socket.next() => {
                heard = Instant::now();
                match message {
                    Some(Ok(Message::Text(text))) => match serde_json::from_str::<FromController>(&text) {
                        Ok(FromController::Refused { error }) => return format!("refused: {}", error.one_line()),
                        Ok(message) => Host::hear(host, message),
                        Err(e) => return format!("a message that cannot be read: {e}"),
                    },
                    Some(Ok(Message::Close(_))) | None => return "closed by the controller".to_owned(),
                    Some(Ok(_)) => {}
                    Some(Err(e)) => return e.to_string(),
                }
            }
            said = line.queue.recv() => match said {
                Some(message) => if let Err(reason) = write(&mut socket, &message).await { return reason },
                None => return "the agent ends".to_owned(),
            },
            () = host.status_changed() => {
                if let Err(reason) = write(&mut socket, &host.status()).await { return reason }
            }
            _ = beat.tick() => {
                if heard.elapsed() > Duration::from_millis(SILENCE_MS) {
                    return format!("nothing heard for {SILENCE_MS} ms");
                }
                if let Err(reason) = write(&mut socket, &host.status()).await { return reason }
                if let Err(e) = socket.send(Message::Ping(Vec::new().into())).await { return e.to_string() }
            }
        }
    }
}

async fn write(socket: &mut Socket, message: &FromAgent) -> Result<(), String> {
    let text = serde_json::to_string(message).map_err(|e| e.to_string())?;
    let limit = Duration::from_millis(SILENCE_MS);
    match timeout(limit, socket.send(Message::Text(text.into()))).await {
        Ok(sent) => sent.map_err(|e| e.to_string()),
        Err(_) => Err(format!("nothing could be sent for {SILENCE_MS} ms")),
    }
}
