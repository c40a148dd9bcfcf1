//! Sessions: a person's stream and the connection that a container's host dials for it find each other here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use godwit_api::link::{Request, SessionBody};
use godwit_model::container::ContainerState;
use godwit_model::{ContainerId, ContainerName, HostName};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use crate::core::{Core, locked};
use crate::links::AskError;

/// Sessions at one time.
const MAX_SESSIONS: usize = 512;
/// How long a host may take to dial after it has agreed to, in milliseconds.
const DIAL_TIMEOUT_MS: u64 = 10_000;
/// How long a peer may take to end a session that the other one has ended, in milliseconds.
const CLOSE_TIMEOUT_MS: u64 = 1_000;

/// Why there is no session with a container.
#[derive(Debug, Error)]
pub enum SessionError {
    #[error("there is no container {name}")]
    NoSuchContainer { name: ContainerName },
    #[error("{name} is on no host yet; `godwit ps` says why")]
    NoHost { name: ContainerName },
    #[error("{name} does not run, it is {state}; start it first")]
    NotRunning { name: ContainerName, state: &'static str },
    #[error("{MAX_SESSIONS} sessions are open, that is the most; end some")]
    TooMany,
    #[error("the host {host} did not open the session within {} s", DIAL_TIMEOUT_MS / 1000)]
    NotDialled { host: HostName },
    #[error(transparent)]
    Ask(#[from] AskError),
}

/// Cheap to make; lives as long as the controller.
pub struct Sessions {
    expected: Expected,
    slots: Arc<Semaphore>,
}

/// Sessions that a host has still to dial, by id.
type Expected = Arc<Mutex<BTreeMap<String, Expectation>>>;

struct Expectation {
    host: HostName,
    socket: oneshot::Sender<WebSocket>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { expected: Expected::default(), slots: Arc::new(Semaphore::new(MAX_SESSIONS)) }
    }
}

/// An id that is waited for, no longer than this lives.
struct Ticket {
    id: String,
    expected: Expected,
    dialled: oneshot::Receiver<WebSocket>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        locked(&self.expected).remove(&self.id);
    }
}

/// The host's side of a session.
pub struct AgentSocket {
    pub socket: WebSocket,
    _slot: OwnedSemaphorePermit,
}

impl Sessions {
    fn expect(&self, host: &HostName) -> Ticket {
        // The id is also the right to dial: it is told to one host only, and cannot be guessed.
        let id = uuid::Uuid::new_v4().simple().to_string();
        let (socket, dialled) = oneshot::channel();
        locked(&self.expected).insert(id.clone(), Expectation { host: host.clone(), socket });
        Ticket { id, expected: Arc::clone(&self.expected), dialled }
    }

    /// Where to hand over what `host` dials for this session; once, and only if it was made for this host.
    pub fn claim(&self, id: &str, host: &HostName) -> Option<oneshot::Sender<WebSocket>> {
        let mut expected = locked(&self.expected);
        if expected.get(id)?.host != *host {
            return None;
        }
        expected.remove(id).map(|e| e.socket)
    }
}

/// Asks the container's host to open a session and waits until it has.
pub async fn open(
    core: &Core,
    name: &ContainerName,
    body: impl FnOnce(ContainerId) -> SessionBody,
) -> Result<AgentSocket, SessionError> {
    let (id, host) = target(core, name)?;
    let slot = Arc::clone(&core.sessions.slots).try_acquire_owned().map_err(|_| SessionError::TooMany)?;
    let mut ticket = core.sessions.expect(&host);
    core.links.ask(&host, Request::OpenSession { session: ticket.id.clone(), body: body(id) }).await?;
    match timeout(Duration::from_millis(DIAL_TIMEOUT_MS), &mut ticket.dialled).await {
        Ok(Ok(socket)) => Ok(AgentSocket { socket, _slot: slot }),
        Ok(Err(_)) | Err(_) => Err(SessionError::NotDialled { host }),
    }
}

/// Whether a program can be run in the container, as far as is known here.
pub fn check_running(core: &Core, name: &ContainerName) -> Result<(), SessionError> {
    let (id, host) = target(core, name)?;
    let report = core.links.report(&host).filter(|report| report.connected);
    let report = report.ok_or_else(|| AskError::NotConnected { host: host.clone() })?;
    match report.containers.get(&id).map(|status| status.state) {
        Some(ContainerState::Running | ContainerState::Frozen) => Ok(()),
        Some(state) => Err(SessionError::NotRunning { name: name.clone(), state: state.as_str() }),
        None => Err(SessionError::NotRunning { name: name.clone(), state: ContainerState::Preparing.as_str() }),
    }
}

fn target(core: &Core, name: &ContainerName) -> Result<(ContainerId, HostName), SessionError> {
    let world = core.state.world();
    let container = world.containers.get(name).filter(|c| !c.removed);
    let container = container.ok_or_else(|| SessionError::NoSuchContainer { name: name.clone() })?;
    let host = container.owner().ok_or_else(|| SessionError::NoHost { name: name.clone() })?;
    Ok((container.spec.id.clone(), host.clone()))
}

/// Ends a WebSocket. What the peer still sends is read: a connection closed over unread bytes is reset, and a reset
/// takes what the peer has not read yet with it.
pub async fn close(mut socket: WebSocket) {
    let end = async {
        if socket.send(Message::Close(None)).await.is_ok() {
            while let Some(Ok(_)) = socket.recv().await {}
        }
    };
    // A peer that does not answer loses its connection.
    let _ = timeout(Duration::from_millis(CLOSE_TIMEOUT_MS), end).await;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_host_that_was_asked_may_dial_and_only_once() {
        let sessions = Sessions::default();
        let (h1, h2) = (HostName::new("h1").unwrap(), HostName::new("h2").unwrap());
        let ticket = sessions.expect(&h1);
        assert!(sessions.claim(&ticket.id, &h2).is_none());
        assert!(sessions.claim("nonsense", &h1).is_none());
        assert!(sessions.claim(&ticket.id, &h1).is_some());
        assert!(sessions.claim(&ticket.id, &h1).is_none());
    }

    #[test]
    fn a_session_nobody_waits_for_is_forgotten() {
        let sessions = Sessions::default();
        let host = HostName::new("h1").unwrap();
        let id = sessions.expect(&host).id.clone();
        assert!(sessions.claim(&id, &host).is_none());
    }
}
