//! One connection for one request.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::response::Parts;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::CONNECT_TIMEOUT_MS;
use super::address::Address;
use super::error::ClientError;
use crate::tls::controller_server_name;

/// An answer whose body is still to be read.
pub(super) struct Answer {
    pub parts: Parts,
    pub body: Incoming,
    pub driver: Driver,
}

/// The task that moves the connection's bytes; ends with its owner.
pub(super) struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

async fn dial(address: &Address, tls: Option<&Arc<rustls::ClientConfig>>) -> Result<Box<dyn Io>, ClientError> {
    let failed = |source: io::Error| ClientError::Connect { address: address.clone(), source };
    match address {
        Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await.map_err(failed)?)),
        Address::Https { host, port } => {
            let config = tls.ok_or_else(|| ClientError::NoCertificate { address: address.clone() })?;
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            let stream =
                TlsConnector::from(config.clone()).connect(controller_server_name(), stream).await.map_err(failed)?;
            Ok(Box::new(stream))
        }
    }
}

/// Dials, sends `request` and returns the head of the answer, whatever its status.
pub(super) async fn roundtrip(
    address: &Address,
    tls: Option<&Arc<rustls::ClientConfig>>,
    request: Request<Full<Bytes>>,
) -> Result<Answer, ClientError> {
    let path = request.uri().path().to_owned();
    let stream = tokio::time::timeout(Duration::from_millis(CONNECT_TIMEOUT_MS), dial(address, tls))
        .await
        .map_err(|_| ClientError::Connect { address: address.clone(), source: io::ErrorKind::TimedOut.into() })??;
    let broken = |source: hyper::Error| ClientError::Broken { path: path.clone(), source: Box::new(source) };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // An error of the connection also reaches whoever waits for the answer or its body.
    let driver = Driver(tokio::spawn(async move {
        let _ = connection.with_upgrades().await;
    }));
    let (parts, body) = sender.send_request(request).await.map_err(broken)?.into_parts();
    Ok(Answer { parts, body, driver })
}
