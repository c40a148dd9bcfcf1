//! An agent that is played: it joins, links, reports what it is told to run as running, and does what a test says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use godwit_api::link::{Desired, FromAgent, FromController, HEARTBEAT_MS, PROTOCOL, Reply, Request};
use godwit_api::tls::Identity;
use godwit_api::types::ErrorBody;
use godwit_model::container::{ContainerState, ContainerStatus, Movable};
use godwit_model::host::HostFacts;
use godwit_model::{Bytes, ContainerName, HostName, MilliCpu};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::controller::{Controller, within};

pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

pub type Busy = Arc<Mutex<BTreeMap<String, u64>>>;

pub struct Agent {
    pub name: HostName,
    pub identity: Arc<Identity>,
    /// What it is asked and does not answer by itself.
    pub asked: mpsc::Receiver<Request>,
    /// How much CPU its containers use, by their names, in thousandths of a core; the others use none.
    pub busy: Busy,
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
    link(controller, facts, identity).await
}

/// The same host links to a controller that was restarted.
pub async fn again(controller: &Controller, agent: Agent) -> Agent {
    let (name, identity) = (agent.name.clone(), Arc::clone(&agent.identity));
    agent.die().await;
    link(controller, facts(name), identity).await
}

async fn link(controller: &Controller, facts: HostFacts, identity: Arc<Identity>) -> Agent {
    let name = facts.name.clone();
    let socket = dial(controller, Some(&identity), "/v1/agent/link").await.unwrap();
    let (ask, asked) = mpsc::channel(64);
    let (voice, said) = mpsc::channel(1024);
    let busy = Busy::default();
    let task = tokio::spawn(live(facts, socket, ask, said, Arc::clone(&busy)));
    let client = controller.client();
    let linked = async {
        while !client.hosts().await.unwrap().iter().any(|h| h.name == name && h.connected) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(linked).await;
    Agent { name, identity, asked, busy, voice, task }
}

impl Agent {
    /// Its link ends as when its host loses power.
    pub async fn die(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Lets every move between these hosts succeed as soon as it is begun.
pub fn let_moves_succeed(agents: &mut [&mut Agent]) {
    let voices: Vec<(HostName, mpsc::Sender<FromAgent>)> =
        agents.iter().map(|agent| (agent.name.clone(), agent.voice.clone())).collect();
    for agent in agents {
        // Their ends of the channels stay with the agents.
        let mut asked = std::mem::replace(&mut agent.asked, mpsc::channel(1).1);
        let voices = voices.clone();
        tokio::spawn(async move {
            while let Some(request) = asked.recv().await {
                if let Request::StartMove { id, to, .. } = request
                    && let Some((_, voice)) = voices.iter().find(|(name, _)| *name == to)
                {
                    // A controller that has ended hears nothing.
                    let _ = voice.send(crate::phases::ready(id)).await;
                }
            }
        });
    }
}

pub async fn dial(controller: &Controller, identity: Option<&Identity>, path: &str) -> Result<Socket, Error> {
    let stream = controller.dial(identity).await;
    let (socket, _) = within(tokio_tungstenite::client_async(format!("wss://controller{path}"), stream)).await?;
    Ok(socket)
}

async fn live(
    facts: HostFacts,
    mut socket: Socket,
    ask: mpsc::Sender<Request>,
    mut said: mpsc::Receiver<FromAgent>,
    busy: Busy,
) {
    say(&mut socket, &FromAgent::Hello { protocol: PROTOCOL, facts: Box::new(facts) }).await;
    let mut beat = tokio::time::interval(Duration::from_millis(HEARTBEAT_MS / 2));
    let mut desired = Desired::default();
    let began = Instant::now();
    loop {
        tokio::select! {
            _ = beat.tick() => say(&mut socket, &status(&desired, &busy, began)).await,
            Some(message) = said.recv() => say(&mut socket, &message).await,
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => match serde_json::from_str(&text).unwrap() {
                    FromController::Refused { error } => panic!("refused: {error}"),
                    FromController::Desired(new) => {
                        desired = *new;
                        say(&mut socket, &status(&desired, &busy, began)).await;
                    }
                    FromController::Lease(_) => panic!("nobody asked for a lease"),
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

fn status(desired: &Desired, busy: &Busy, began: Instant) -> FromAgent {
    let used = |name: &ContainerName| {
        let milli = busy.lock().unwrap().get(&name.to_string()).copied()?;
        Some(began.elapsed().as_micros() as u64 * milli / 1000)
    };
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
        working_set: None,
        cpu_usec: used(&assigned.spec.name),
        movable: Movable::default(),
        image_digest: None,
    });
    FromAgent::Status { containers: containers.collect(), applied_revision: desired.revision, beat: None }
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
