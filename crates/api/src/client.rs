//! The client of the API: one typed method for each route of [`crate::routes`], over a unix socket or mutual TLS.
//!
//! Each request has its own connection, so that a stream that is read slowly holds up nothing else, and a dropped
//! answer is a closed connection, which is how the controller learns that nobody listens any more.
#![deny(missing_docs)]

mod address;
mod error;
mod exec;
mod lines;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use godwit_model::event::Event;
use godwit_model::migration::Move;
use godwit_model::{ContainerName, EnvName, HostName, MoveId};
use godwit_plan::{Advice, RecoveryPlan};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use address::{Address, AddressError};
pub use error::ClientError;
pub use exec::{ExecOutput, ExecReceiver, ExecSender};
pub use lines::{Lines, MAX_LINE_BYTES};

use crate::routes;
use crate::session::{ExecRequest, LogLine};
use crate::types::{
    ActivateRequest, ApplyAnswer, ApplyRequest, BalanceAnswer, BalanceChange, BalanceView, ContainerView,
    EnvironmentView, ErrorBody, EvacuateAnswer, EvacuateRequest, HostView, MigrateRequest, MovePlan, PlacementView,
    VersionView,
};
use transport::Answer;

/// How long making a connection may take, in milliseconds.
pub const CONNECT_TIMEOUT_MS: u64 = 5_000;
/// How long the controller may take to begin its answer, in milliseconds: longer than it waits for an agent.
pub const ANSWER_TIMEOUT_MS: u64 = crate::link::REQUEST_TIMEOUT_MS + 15_000;
/// The largest answer that is not a stream, in bytes.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A controller's API. Cheap to clone; holds no connection.
#[derive(Debug, Clone)]
pub struct Client {
    address: Address,
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Client {
    /// A client of the controller at `address`. Nothing is dialled yet.
    pub fn new(address: Address) -> Self {
        Self { address, tls: None }
    }

    /// The certificate to show, and the authority to trust, for addresses that begin with `https`: see
    /// [`crate::tls::client_config`].
    pub fn with_tls(mut self, config: Arc<rustls::ClientConfig>) -> Self {
        self.tls = Some(config);
        self
    }

    /// Where this client dials.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The controller's version and the identity of its store.
    pub async fn version(&self) -> Result<VersionView, ClientError> {
        self.get(routes::VERSION).await
    }

    /// All hosts that ever joined.
    pub async fn hosts(&self) -> Result<Vec<HostView>, ClientError> {
        self.get(routes::HOSTS).await
    }

    /// How containers are balanced over the hosts, and what is advised now.
    pub async fn balance(&self) -> Result<BalanceView, ClientError> {
        self.get(routes::BALANCE).await
    }

    /// Changes mode and policy of balancing; what is not named stays.
    pub async fn change_balance(&self, change: &BalanceChange) -> Result<BalanceView, ClientError> {
        self.send(Method::PUT, routes::BALANCE, Some(change)).await
    }

    /// Carries out once what is advised now, whatever the mode.
    pub async fn balance_now(&self) -> Result<BalanceAnswer, ClientError> {
        self.send(Method::POST, routes::BALANCE_NOW, NOTHING).await
    }

    /// All environments, with their containers.
    pub async fn environments(&self) -> Result<Vec<EnvironmentView>, ClientError> {
        self.get(routes::ENVIRONMENTS).await
    }

    /// One environment.
    pub async fn environment(&self, name: &EnvName) -> Result<EnvironmentView, ClientError> {
        self.get(&routes::environment(name)).await
    }

    /// Makes the environment what its manifest says; `dry_run` only says what would change.
    pub async fn apply(&self, request: &ApplyRequest) -> Result<ApplyAnswer, ClientError> {
        self.send(Method::PUT, &routes::environment(&request.manifest.name), Some(request)).await
    }

    /// Removes an environment with its containers, their files and volumes.
    pub async fn delete_environment(&self, name: &EnvName) -> Result<ApplyAnswer, ClientError> {
        self.send(Method::DELETE, &routes::environment(name), NOTHING).await
    }

    /// The containers of one environment, or of all.
    pub async fn containers(&self, env: Option<&EnvName>) -> Result<Vec<ContainerView>, ClientError> {
        match env {
            Some(env) => self.get(&format!("{}?env={env}", routes::CONTAINERS)).await,
            None => self.get(routes::CONTAINERS).await,
        }
    }

    /// One container.
    pub async fn container(&self, name: &ContainerName) -> Result<ContainerView, ClientError> {
        self.get(&routes::container(name)).await
    }

    /// Removes one container with its files and volumes.
    pub async fn remove_container(&self, name: &ContainerName) -> Result<ContainerView, ClientError> {
        self.send(Method::DELETE, &routes::container(name), NOTHING).await
    }

    /// Stops a container; its files stay. Answers once that is wanted, not once it has ended.
    pub async fn stop(&self, name: &ContainerName) -> Result<ContainerView, ClientError> {
        self.send(Method::POST, &routes::container_verb(name, "stop"), NOTHING).await
    }

    /// Starts a container that was stopped or ended by itself.
    pub async fn start(&self, name: &ContainerName) -> Result<ContainerView, ClientError> {
        self.send(Method::POST, &routes::container_verb(name, "start"), NOTHING).await
    }

    /// Begins to move a container. [`Client::watch_move`] tells how it goes on.
    pub async fn migrate(&self, name: &ContainerName, request: &MigrateRequest) -> Result<Move, ClientError> {
        self.send(Method::POST, &routes::container_verb(name, "migrate"), Some(request)).await
    }

    /// Says where a move would go, or why nowhere; nothing moves.
    pub async fn plan_move(&self, name: &ContainerName, request: &MigrateRequest) -> Result<MovePlan, ClientError> {
        self.send(Method::POST, &routes::container_verb(name, "plan-move"), Some(request)).await
    }

    /// Every host as a place for a container, with what speaks against it or for it.
    pub async fn placement(&self, name: &ContainerName) -> Result<PlacementView, ClientError> {
        self.get(&routes::container_verb(name, "placement")).await
    }

    /// What would start where if this host were lost now.
    pub async fn plan_fail(&self, host: &HostName) -> Result<RecoveryPlan, ClientError> {
        self.get(&routes::plan_fail(host)).await
    }

    /// Moves that would make the fleet better.
    pub async fn plan_rebalance(&self) -> Result<Advice, ClientError> {
        self.get(routes::PLAN_REBALANCE).await
    }

    /// Begins to empty a host, or only says how that would go. Events tell how it goes on.
    pub async fn evacuate(&self, host: &HostName, request: &EvacuateRequest) -> Result<EvacuateAnswer, ClientError> {
        self.send(Method::POST, &routes::host_verb(host, "evacuate"), Some(request)).await
    }

    /// Closes a host: it keeps what it has and takes nothing new.
    pub async fn cordon(&self, host: &HostName) -> Result<HostView, ClientError> {
        self.send(Method::POST, &routes::host_verb(host, "cordon"), NOTHING).await
    }

    /// Opens a host again.
    pub async fn activate(&self, host: &HostName, request: &ActivateRequest) -> Result<HostView, ClientError> {
        self.send(Method::POST, &routes::host_verb(host, "activate"), Some(request)).await
    }

    /// Says that a host is dead for certain: what it had starts elsewhere without waiting for its lease.
    pub async fn declare_dead(&self, host: &HostName) -> Result<HostView, ClientError> {
        self.send(Method::POST, &routes::host_verb(host, "declare-dead"), NOTHING).await
    }

    /// The moves the store remembers.
    pub async fn moves(&self) -> Result<Vec<Move>, ClientError> {
        self.get(routes::MOVES).await
    }

    /// One move.
    pub async fn r#move(&self, id: &MoveId) -> Result<Move, ClientError> {
        self.get(&routes::r#move(id)).await
    }

    /// Asks for a move to be given up. Refused once the store names the destination as owner.
    pub async fn cancel_move(&self, id: &MoveId) -> Result<Move, ClientError> {
        self.send(Method::POST, &format!("{}/cancel", routes::r#move(id)), NOTHING).await
    }

    /// The move as it is now and after each change; ends when the move is over.
    pub async fn watch_move(&self, id: &MoveId) -> Result<Lines<Move>, ClientError> {
        self.lines(&format!("{}/watch", routes::r#move(id))).await
    }

    /// What a container wrote: its last `tail` lines (`None`: all that are kept), then, with `follow`, what comes.
    pub async fn logs(
        &self,
        name: &ContainerName,
        tail: Option<u32>,
        follow: bool,
    ) -> Result<Lines<LogLine>, ClientError> {
        let tail = tail.map(|n| format!("&tail={n}")).unwrap_or_default();
        self.lines(&format!("{}?follow={follow}{tail}", routes::container_verb(name, "logs"))).await
    }

    /// Events with a number above `since`, then, with `follow`, what comes.
    pub async fn events(&self, since: Option<u64>, follow: bool) -> Result<Lines<Event>, ClientError> {
        let since = since.map(|n| format!("&since={n}")).unwrap_or_default();
        self.lines(&format!("{}?follow={follow}{since}", routes::EVENTS)).await
    }

    /// Runs a program in a container. The two halves are its standard input and control, and its output.
    pub async fn exec(
        &self,
        name: &ContainerName,
        request: ExecRequest,
    ) -> Result<(ExecSender, ExecReceiver), ClientError> {
        exec::open(self, &routes::container_verb(name, "exec"), request).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.send(Method::GET, path, NOTHING).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let Answer { parts, body, driver: _driver } = self.answer(method, path, body).await?;
        let bytes = collect(path, body).await?;
        serde_json::from_slice(&bytes).map_err(|source| ClientError::NotJson {
            path: path.to_owned(),
            status: parts.status,
            source,
        })
    }

    async fn lines<T: DeserializeOwned>(&self, path: &str) -> Result<Lines<T>, ClientError> {
        let answer = self.answer(Method::GET, path, NOTHING).await?;
        Ok(Lines::new(path, answer))
    }

    /// Sends a request and waits for the head of a good answer; a bad one becomes an error with its body.
    async fn answer(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Answer, ClientError> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, self.address.host());
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(serde_json::to_vec(body).map_err(|source| ClientError::Encode { source })?)
            }
            None => Bytes::new(),
        };
        let request =
            request.body(Full::new(bytes)).map_err(|e| ClientError::Protocol { what: format!("{path}: {e}") })?;
        self.checked(path, request, StatusCode::is_success).await
    }

    async fn checked(
        &self,
        path: &str,
        request: Request<Full<Bytes>>,
        good: impl Fn(&StatusCode) -> bool,
    ) -> Result<Answer, ClientError> {
        let work = transport::roundtrip(&self.address, self.tls.as_ref(), request);
        let answer = tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), work)
            .await
            .map_err(|_| ClientError::Silent { address: self.address.clone(), after_ms: ANSWER_TIMEOUT_MS })??;
        if good(&answer.parts.status) {
            return Ok(answer);
        }
        let status = answer.parts.status;
        let bytes = collect(path, answer.body).await?;
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| plain_error(path, status, &bytes));
        Err(ClientError::Api { status, body })
    }
}

const NOTHING: Option<&()> = None;

async fn collect(path: &str, body: hyper::body::Incoming) -> Result<Bytes, ClientError> {
    let all = Limited::new(body, MAX_ANSWER_BYTES).collect();
    let all = tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), all)
        .await
        .map_err(|_| ClientError::Protocol { what: format!("the answer to {path} stopped half way") })?;
    all.map(|b| b.to_bytes()).map_err(|source| ClientError::Broken { path: path.to_owned(), source })
}

/// An error of something that does not speak our JSON (a router's own 404, a proxy): its first line, cut.
fn plain_error(path: &str, status: StatusCode, bytes: &[u8]) -> ErrorBody {
    const MAX_SHOWN_CHARS: usize = 200;
    let text = String::from_utf8_lossy(bytes);
    let line: String = text.lines().next().unwrap_or_default().chars().take(MAX_SHOWN_CHARS).collect();
    let mut body = ErrorBody::new(format!("{path} was answered with {status}"));
    if !line.trim().is_empty() {
        body.causes.push(line);
    }
    body
}
