//! An agent that is played: it joins, links, reports what it is told to run as running, and does what a test says.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use godwit_api::link::{Desired, FromAgent, FromController, HEARTBEAT_MS, PROTOCOL, Reply, Request};
use godwit_api::tls::Identity;
use godwit_api::types::ErrorBody;
use godwit_model::container::{ContainerState, ContainerStatus, Movable};
use godwit_model::host::HostFacts;
use godwit_model::{Bytes, HostName, MilliCpu};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::controller::{Controller, within};

pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

pub struct Agent {
    pub identity: Arc<Identity>,
    /// What it is asked and does not answer by itself.
    pub asked: mpsc::Receiver<Request>,
    /// What it shall say.
    pub voice: mpsc::Sender<FromAgent>,
    task: JoinHandle<()>,
}

/// A new host, linked.
pub async fn agent(controller: &Controller, name: &str) -> Agent {
    agent_as(controller, name, |_| {}).await
}

/// A new host that is otherwise than the others.
pub async fn agent_as(controller: &Controller, name: &str, change: impl FnOnce(&mut HostFacts)) -> Agent {
    let mut facts = facts(HostName::new(name).unwrap());
    change(&mut facts);
    let identity = Arc::new(controller.join(name).await);
    let socket = dial(controller, Some(&identity), "/v1/agent/link").await.unwrap();
    let (ask, asked) = mpsc::channel(64);
    let (voice, said) = mpsc::channel(1024);
    let task = tokio::spawn(live(facts, socket, ask, said));
    let client = controller.client();
    let linked = async {
        while !client.hosts().await.unwrap().iter().any(|h| h.name.as_str() == name && h.connected) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(linked).await;
    Agent { identity, asked, voice, task }
}

impl Agent {
    /// Its link ends as when its host loses power.
    pub async fn die(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub async fn dial(controller: &Controller, identity: Option<&Identity>, path: &str) -> Result<Socket, Error> {
    let stream = controller.dial(identity).await;
    let (socket, _) = within(tokio_tungstenite::client_async(format!("wss://controller{path}"), stream)).await?;
    Ok(socket)
}

async fn live(facts: HostFacts, mut socket: Socket, ask: mpsc::Sender<Request>, mut said: mpsc::Receiver<FromAgent>) {
    say(&mut socket, &FromAgent::Hello { protocol: PROTOCOL, facts: Box::new(facts) }).await;
    let mut beat = tokio::time::interval(Duration::from_millis(HEARTBEAT_MS / 2));
    let mut desired = Desired::default();
    loop {
        tokio::select! {
            _ = beat.tick() => say(&mut socket, &status(&desired)).await,
            Some(message) = said.recv() => say(&mut socket, &message).await,
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => match serde_json::from_str(&text).unwrap() {
                    FromController::Refused { error } => panic!("refused: {error}"),
                    FromController::Desired(new) => {
                        desired = *new;
                        say(&mut socket, &status(&desired)).await;
                    }
                    FromController::Request { request, body } => {
                        let result = match &*body {
                            Request::PrepareMove { .. } => Ok(Reply::Prepared { address: ([127, 0, 0, 1], 1).into() }),
                            Request::OpenSession { session, .. } if session.is_empty() => Err(ErrorBody::new("odd")),
                            _ => Ok(Reply::Done),
                        };
                        say(&mut socket, &FromAgent::Reply { request, result }).await;
                        let _ = ask.send(*body).await;
                    }
                },
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
        }
    }
}

async fn say(socket: &mut Socket, message: &FromAgent) {
    // A controller that has ended is found by the next read.
    let _ = socket.send(Message::Text(serde_json::to_string(message).unwrap().into())).await;
}

fn status(desired: &Desired) -> FromAgent {
    let containers = desired.containers.iter().map(|assigned| ContainerStatus {
        id: assigned.spec.id.clone(),
        name: assigned.spec.name.clone(),
        generation: assigned.generation,
        state: if assigned.run { ContainerState::Running } else { ContainerState::Stopped },
        message: None,
        health: None,
        pid: Some(1),
        started_at_ms: Some(1),
        restarts: 0,
        exit: None,
        memory: None,
        cpu_usec: None,
        movable: Movable::default(),
        image_digest: None,
    });
    FromAgent::Status { containers: containers.collect(), applied_revision: desired.revision }
}

fn facts(name: HostName) -> HostFacts {
    HostFacts {
        name,
        godwit_version: "0.1.0".to_owned(),
        kernel: "6.12".to_owned(),
        architecture: "x86_64".to_owned(),
        criu: Some("4.2".to_owned()),
        cpu_features: Vec::new(),
        cpu_model: "played".to_owned(),
        cpus: MilliCpu(4000),
        cpu_mhz: 2400,
        memory: Bytes::mib(8192),
        disk_free: Bytes::mib(8192),
        tunnel_address: [127, 0, 0, 1].into(),
        migration_address: ([127, 0, 0, 1], 7718).into(),
        certificate_sha256: String::new(),
        labels: Default::default(),
        written_pages: godwit_model::host::WrittenPages::Tracked { by: Default::default() },
    }
}

/// Waits until a container is as wanted.
pub async fn until(controller: &Controller, name: &str, state: &str) -> godwit_api::types::ContainerView {
    let (client, name) = (controller.client(), name.parse().unwrap());
    let reached = async {
        loop {
            let view = client.container(&name).await.unwrap();
            if view.state == state {
                return view;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(reached).await
}
