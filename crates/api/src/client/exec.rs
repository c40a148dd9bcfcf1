//! The client's side of an exec session (see [`crate::session`] for the messages).

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::{Method, Request, StatusCode, header};
use http_body_util::Full;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::Client;
use super::error::ClientError;
use super::transport::{Answer, Driver};
use crate::session::{ExecControl, ExecRequest, MAX_MESSAGE_BYTES, STDERR, STDIN, STDOUT, TerminalSize};
use crate::types::ErrorBody;

/// The largest piece of standard input in one message, in bytes.
const MAX_STDIN_BYTES: usize = 64 << 10;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// What comes out of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Standard output; with a terminal, everything.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// The last one: exit code, or 128 + signal number.
    Exit(i32),
}

/// Standard input and control of a session.
pub struct ExecSender {
    sink: SplitSink<Socket, Message>,
}

/// Output of a session. Dropping it ends the connection.
pub struct ExecReceiver {
    stream: SplitStream<Socket>,
    _driver: Driver,
    ended: bool,
}

/// The upgrade is done through hyper, not by the WebSocket crate, so that a refusal (no such container, not running)
/// arrives with its whole body.
pub(super) async fn open(
    client: &Client,
    path: &str,
    request: ExecRequest,
) -> Result<(ExecSender, ExecReceiver), ClientError> {
    let key = generate_key();
    let upgrade = Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(header::HOST, client.address.host())
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key)
        .body(Full::new(Bytes::new()))
        .map_err(|e| ClientError::Protocol { what: format!("{path}: {e}") })?;
    let Answer { parts, body, driver } =
        client.checked(path, upgrade, |status| *status == StatusCode::SWITCHING_PROTOCOLS).await?;
    let accept = parts.headers.get(header::SEC_WEBSOCKET_ACCEPT).map(|v| v.as_bytes());
    if accept != Some(derive_accept_key(key.as_bytes()).as_bytes()) {
        return Err(ClientError::Protocol { what: format!("{path} was not answered with a WebSocket") });
    }
    let upgraded = hyper::upgrade::on(http::Response::from_parts(parts, body))
        .await
        .map_err(|source| ClientError::Broken { path: path.to_owned(), source: Box::new(source) })?;
    let limits =
        WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE_BYTES)).max_frame_size(Some(MAX_MESSAGE_BYTES));
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(limits)).await;
    let (sink, stream) = socket.split();
    let mut sender = ExecSender { sink };
    sender.control(&ExecControl::Start { request }).await?;
    Ok((sender, ExecReceiver { stream, _driver: driver, ended: false }))
}

impl ExecSender {
    /// Sends standard input. Nothing is sent for an empty piece: that would close it.
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        for piece in bytes.chunks(MAX_STDIN_BYTES) {
            let mut message = Vec::with_capacity(piece.len() + 1);
            message.push(STDIN);
            message.extend_from_slice(piece);
            self.sink.send(Message::Binary(message.into())).await.map_err(broken)?;
        }
        Ok(())
    }

    /// Ends standard input.
    pub async fn close_stdin(&mut self) -> Result<(), ClientError> {
        self.sink.send(Message::Binary(Bytes::from_static(&[STDIN]))).await.map_err(broken)
    }

    /// The person's terminal has another size now.
    pub async fn resize(&mut self, size: TerminalSize) -> Result<(), ClientError> {
        self.control(&ExecControl::Resize { size }).await
    }

    async fn control(&mut self, control: &ExecControl) -> Result<(), ClientError> {
        let text = serde_json::to_string(control).map_err(|source| ClientError::Encode { source })?;
        self.sink.send(Message::Text(text.into())).await.map_err(broken)
    }
}

impl ExecReceiver {
    /// The next piece of output; `None` after [`ExecOutput::Exit`]. A session that ends without it is an error.
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<ExecOutput>, ClientError> {
        while !self.ended {
            let message = match self.stream.next().await {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    self.ended = true;
                    return Err(broken(error));
                }
                None => Message::Close(None),
            };
            match message {
                Message::Binary(bytes) => return output(bytes).map(Some),
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(ExecControl::Exit { code }) => {
                        self.ended = true;
                        return Ok(Some(ExecOutput::Exit(code)));
                    }
                    Ok(ExecControl::Error { message }) => {
                        self.ended = true;
                        return Err(ClientError::Api { status: StatusCode::OK, body: ErrorBody::new(message) });
                    }
                    Ok(ExecControl::Start { .. } | ExecControl::Resize { .. }) | Err(_) => {
                        self.ended = true;
                        return Err(ClientError::Protocol { what: format!("unexpected message in a session: {text}") });
                    }
                },
                Message::Close(_) => {
                    self.ended = true;
                    let what = "the session ended without an exit code: the container, its host or the controller \
                                went away"
                        .to_owned();
                    return Err(ClientError::Protocol { what });
                }
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
        Ok(None)
    }
}

fn output(mut bytes: Bytes) -> Result<ExecOutput, ClientError> {
    let wrong = |what: String| Err(ClientError::Protocol { what });
    if bytes.is_empty() {
        return wrong("an empty message in a session".to_owned());
    }
    match bytes.split_to(1)[0] {
        STDOUT => Ok(ExecOutput::Stdout(bytes)),
        STDERR => Ok(ExecOutput::Stderr(bytes)),
        other => wrong(format!("a message of unknown kind {other} in a session")),
    }
}

fn broken(error: WsError) -> ClientError {
    ClientError::Broken { path: "the session".to_owned(), source: Box::new(error) }
}
