//! A controller in this process, on a directory of its own and a port that the system picks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_api::client::{Address, Client, ClientError};
use godwit_api::tls::{self, Identity, JoinToken};
use godwit_api::types::{ApplyRequest, ErrorBody, JoinRequest};
use godwit_controller::{ControllerConfig, RunError, run};
use godwit_model::HostName;
use godwit_model::manifest::{Manifest, parse};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes on a busy machine, in milliseconds.
pub const LIMIT_MS: u64 = 30_000;

pub struct Controller {
    pub dir: PathBuf,
    pub address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

pub async fn start(dir: &Path) -> Controller {
    let mut config = config(dir);
    let (started, address) = oneshot::channel();
    config.started = Some(started);
    let stop = config.stop.clone();
    let task = tokio::spawn(run(config));
    let Ok(address) = within(address).await else { panic!("not started: {:?}", task.await) };
    Controller { dir: dir.to_owned(), address, stop, task }
}

pub fn config(dir: &Path) -> ControllerConfig {
    ControllerConfig::new(dir.join("state"), dir.join("api.sock"), "127.0.0.1:0")
}

/// Waits for what must happen.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_millis(LIMIT_MS), work).await.expect("it did not happen in time")
}

impl Controller {
    pub async fn stop(self) {
        self.stop.cancel();
        within(self.task).await.unwrap().unwrap();
    }

    pub fn begin_stop(&self) {
        self.stop.cancel();
    }

    /// A person on the controller's machine.
    pub fn client(&self) -> Client {
        Client::new(Address::Unix(self.dir.join("api.sock")))
    }

    /// Somebody elsewhere, with this certificate or none.
    pub fn remote(&self, identity: Option<&Identity>) -> Client {
        let address = Address::Https { host: self.address.ip().to_string(), port: self.address.port() };
        Client::new(address).with_tls(self.tls(identity))
    }

    pub fn admin(&self) -> Identity {
        Identity::load(&self.dir.join("state/admin")).unwrap().unwrap()
    }

    pub fn token(&self) -> JoinToken {
        serde_json::from_slice(&std::fs::read(self.dir.join("state/join-token")).unwrap()).unwrap()
    }

    fn tls(&self, identity: Option<&Identity>) -> Arc<rustls::ClientConfig> {
        Arc::new(match identity {
            Some(identity) => tls::client_config(identity).unwrap(),
            None => tls::join_client_config(&self.token().controller_ca_pem).unwrap(),
        })
    }

    pub async fn dial(&self, identity: Option<&Identity>) -> TlsStream<TcpStream> {
        let tcp = TcpStream::connect(self.address).await.unwrap();
        TlsConnector::from(self.tls(identity)).connect(tls::controller_server_name(), tcp).await.unwrap()
    }

    /// A request as a stranger would write it, over TLS.
    pub async fn raw(&self, identity: Option<&Identity>, method: Method, path: &str, body: &str) -> Raw {
        let stream = self.dial(identity).await;
        ask(TokioIo::new(stream), method, path, body).await
    }

    /// The same over the unix socket.
    pub async fn raw_local(&self, method: Method, path: &str, body: &str) -> Raw {
        let stream = UnixStream::connect(self.dir.join("api.sock")).await.unwrap();
        ask(TokioIo::new(stream), method, path, body).await
    }

    /// Makes `name` a member, as an agent does.
    pub async fn join(&self, name: &str) -> Identity {
        let (key_pem, request) = join_request(name, &self.token().token);
        let answer = self.raw(None, Method::POST, "/v1/agent/join", &request).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        let answer: godwit_api::types::JoinAnswer = serde_json::from_str(&answer.body).unwrap();
        Identity { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem }
    }
}

/// A key and the request to join with it.
pub fn join_request(name: &str, token: &str) -> (String, String) {
    let name = HostName::new(name).unwrap();
    let (key_pem, csr_pem) = tls::make_csr(&name).unwrap();
    (key_pem, serde_json::to_string(&JoinRequest { name, token: token.to_owned(), csr_pem }).unwrap())
}

pub struct Raw {
    pub status: StatusCode,
    pub body: String,
}

impl Raw {
    /// The sentence of an answer that has to be an error.
    #[track_caller]
    pub fn error(&self) -> ErrorBody {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no ErrorBody: {} {:?}", self.status, self.body))
    }
}

async fn ask<S>(stream: TokioIo<S>, method: Method, path: &str, body: &str) -> Raw
where
    TokioIo<S>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "controller")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap();
    let answer = within(sender.send_request(request)).await.unwrap();
    let status = answer.status();
    let body = within(answer.into_body().collect()).await.unwrap().to_bytes();
    driver.abort();
    Raw { status, body: String::from_utf8(body.to_vec()).unwrap() }
}

/// An environment with one layer of this many containers.
pub fn manifest(name: &str, replicas: u32) -> Manifest {
    let db = format!("{{image: 'oci:/srv/redis', deploy: {{replicas: {replicas}}}}}");
    let text = format!("name: {name}\nservices:\n  db: {db}\n");
    parse("compose.yaml", &text, None, &BTreeMap::new()).unwrap()
}

pub fn request(name: &str, replicas: u32) -> ApplyRequest {
    ApplyRequest { manifest: manifest(name, replicas), dry_run: false }
}

/// What the controller said no with.
#[track_caller]
pub fn refusal<T>(result: Result<T, ClientError>) -> (u16, ErrorBody) {
    match result.err().expect("this should have been refused") {
        ClientError::Api { status, body } => (status.as_u16(), body),
        other => panic!("not refused but failed: {other:?}"),
    }
}
