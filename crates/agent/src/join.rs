//! Becoming a member: a key of our own, a certificate from the controller, once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_api::routes;
use godwit_api::tls::{self, Identity};
use godwit_api::types::{ErrorBody, JoinAnswer, JoinRequest};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use thiserror::Error;
use tokio::net::TcpStream;

use crate::config::AgentConfig;

const TIMEOUT_MS: u64 = 10_000;
const MAX_ANSWER_BYTES: usize = 1 << 20;

#[derive(Debug, Error)]
pub enum JoinError {
    #[error(
        "this host is not a member yet; give --join-token-file (the controller keeps it as join-token in its state directory)"
    )]
    NoToken,
    #[error("the join token {} could not be read", path.display())]
    Token { path: PathBuf, source: std::io::Error },
    #[error("the join token {} is not one", path.display())]
    TokenFormat { path: PathBuf, source: serde_json::Error },
    #[error("the controller {address} could not be reached")]
    Connect { address: String, source: std::io::Error },
    #[error("the controller {address} did not answer within {TIMEOUT_MS} ms")]
    Timeout { address: String },
    #[error("the controller's answer could not be understood")]
    Answer { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the controller refused this host")]
    Refused(#[source] ErrorBody),
    #[error("keys or certificates failed")]
    Tls(#[from] tls::TlsError),
}

/// Written by the controller as `join-token`.
#[derive(Deserialize)]
struct Token {
    controller_ca_pem: String,
    token: String,
}

/// The identity on disk, or a new one from the controller.
pub async fn identity(config: &AgentConfig) -> Result<Identity, JoinError> {
    let dir = config.state_dir.join("identity");
    if let Some(identity) = Identity::load(&dir)? {
        return Ok(identity);
    }
    let path = config.join_token_file.as_ref().ok_or(JoinError::NoToken)?;
    let token = read_token(path)?;
    let (key_pem, csr_pem) = tls::make_csr(&config.name)?;
    let request = JoinRequest { name: config.name.clone(), token: token.token, csr_pem };
    let late = |_| JoinError::Timeout { address: config.controller.clone() };
    let ask = ask(&config.controller, &token.controller_ca_pem, &request);
    let answer = tokio::time::timeout(Duration::from_millis(TIMEOUT_MS), ask).await.map_err(late)??;
    let identity = Identity { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem };
    identity.save(&dir)?;
    tracing::info!(name = %config.name, "this host is a member now");
    Ok(identity)
}

fn read_token(path: &Path) -> Result<Token, JoinError> {
    let text = std::fs::read(path).map_err(|source| JoinError::Token { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| JoinError::TokenFormat { path: path.to_owned(), source })
}

async fn ask(address: &str, ca_pem: &str, request: &JoinRequest) -> Result<JoinAnswer, JoinError> {
    let connect = |source| JoinError::Connect { address: address.to_owned(), source };
    let odd = |e: Box<dyn std::error::Error + Send + Sync>| JoinError::Answer { source: e };
    let tcp = TcpStream::connect(address).await.map_err(connect)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls::join_client_config(ca_pem)?));
    let stream = connector.connect(tls::controller_server_name(), tcp).await.map_err(connect)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| odd(e.into()))?;
    let driver = tokio::spawn(connection);
    let body = serde_json::to_vec(request).map_err(|e| odd(e.into()))?;
    let request = hyper::Request::post(routes::AGENT_JOIN)
        .header("host", "controller")
        .header("content-type", "application/json")
        .body(Full::new(bytes::Bytes::from(body)))
        .map_err(|e| odd(e.into()))?;
    let response = sender.send_request(request).await.map_err(|e| odd(e.into()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(odd)?.to_bytes();
    driver.abort();
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(|e| odd(e.into()));
    }
    let error = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody::new(format!("HTTP status {status}")));
    Err(JoinError::Refused(error))
}
