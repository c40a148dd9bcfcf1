//! The life of one agent's link, from its hello to its end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use futures_util::StreamExt;
use godwit_api::link::{Desired, FromAgent, FromController, PROTOCOL, Reply, SILENCE_MS};
use godwit_api::types::ErrorBody;
use godwit_lease::Beat;
use godwit_model::event::EventKind;
use godwit_model::host::{HostFacts, HostState};
use godwit_model::{ContainerName, HostName};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::Ask;
use crate::apply::host_index;
use crate::core::Core;
use crate::desired::desired;
use crate::leases;
use crate::state::records::HostRecord;
use crate::state::{About, StateError, Tx, World};

/// How often a link is looked at for silence and for requests nobody waits for any more, in milliseconds.
const LOOK_EVERY_MS: u64 = 1_000;
/// Events of one host waiting to be stored; more are dropped with a warning.
const QUEUE_EVENTS: usize = 256;

struct Told {
    kind: EventKind,
    container: Option<ContainerName>,
    message: String,
}

/// Serves an agent until its link ends. `host` is what its certificate says.
pub async fn serve(core: Arc<Core>, host: HostName, mut socket: WebSocket) {
    let facts = match hello(&host, &mut socket).await {
        Ok(facts) => facts,
        Err(error) => {
            tracing::warn!(%host, error = error.one_line(), "an agent was refused");
            let _ = write(&mut socket, &FromController::Refused { error }).await;
            return;
        }
    };
    if let Err(error) = register(&core, facts).await {
        let error = ErrorBody::from_chain(&error);
        tracing::error!(%host, error = error.one_line(), "an agent could not be registered");
        let _ = write(&mut socket, &FromController::Refused { error }).await;
        return;
    }
    let (number, queue) = core.links.open(&host);
    tracing::info!(%host, "linked");
    let (told, telling) = mpsc::channel(QUEUE_EVENTS);
    let recorder = tokio::spawn(record(Arc::clone(&core), host.clone(), telling));
    let mut link = Link {
        core: Arc::clone(&core),
        host: host.clone(),
        number,
        last: None,
        told_at: 0,
        pending: HashMap::new(),
        last_request: 0,
        told,
    };
    let reason = link.run(&mut socket, queue).await;
    let Link { told, .. } = link;
    if core.links.close(&host, number) {
        tracing::warn!(%host, reason, "the link is down");
        let message = format!("the link to {host} is down: {reason}");
        let _ = told.try_send(Told { kind: EventKind::HostDisconnected, container: None, message });
    }
    drop(told);
    let _ = recorder.await;
}

/// The first message, checked.
async fn hello(host: &HostName, socket: &mut WebSocket) -> Result<HostFacts, ErrorBody> {
    let limit = Duration::from_millis(SILENCE_MS);
    let message = match timeout(limit, socket.next()).await {
        Ok(Some(Ok(Message::Text(text)))) => serde_json::from_str(text.as_str()),
        _ => return Err(ErrorBody::new("the agent did not introduce itself")),
    };
    match message {
        Ok(FromAgent::Hello { protocol, facts }) => {
            if protocol != PROTOCOL && protocol + 1 != PROTOCOL {
                let text = format!("the agent speaks version {protocol} of the link, this controller {PROTOCOL}");
                return Err(ErrorBody::new(text).with_hint("upgrade the older of both"));
            }
            if facts.name != *host {
                return Err(ErrorBody::new(format!(
                    "the agent calls itself {}, its certificate says {host}",
                    facts.name
                )));
            }
            Ok(*facts)
        }
        Ok(_) => Err(ErrorBody::new("the agent's first message is not its introduction")),
        Err(error) => Err(ErrorBody::new(format!("the agent's introduction cannot be read: {error}"))),
    }
}

/// Writes down who has come.
async fn register(core: &Core, facts: HostFacts) -> Result<(), StateError> {
    let decide = |world: &World| {
        let mut tx = Tx::new();
        let old = world.hosts.get(&facts.name);
        let record = match old {
            Some(old) => HostRecord { facts: facts.clone(), ..old.value.clone() },
            None => {
                let index = host_index(world).ok_or(StateError::TooManyHosts)?;
                tx.allocate(world);
                HostRecord {
                    facts: facts.clone(),
                    state: HostState::Active,
                    index,
                    evacuation: None,
                    bring_back: Vec::new(),
                    lease: None,
                    before_failure: None,
                    declared_dead: false,
                }
            }
        };
        if old.map(|old| &old.value) != Some(&record) {
            tx.put_host(old.map(|old| &**old), &record);
        }
        let message = format!("the host {} is connected", facts.name);
        tx.event(EventKind::HostConnected, About::host(&facts.name), message);
        Ok((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// Stores what a host tells, in order, as many at a time as have come.
async fn record(core: Arc<Core>, host: HostName, mut telling: mpsc::Receiver<Told>) {
    const MAX_AT_ONCE: usize = 32;
    let mut batch = Vec::with_capacity(MAX_AT_ONCE);
    while telling.recv_many(&mut batch, MAX_AT_ONCE).await > 0 {
        let decide = |_: &World| {
            let mut tx = Tx::new();
            for one in &batch {
                let about = match &one.container {
                    Some(name) => About::container(name, Some(&host)),
                    None => About::host(&host),
                };
                tx.event(one.kind, about, one.message.clone());
            }
            Ok::<_, StateError>((tx, ()))
        };
        if let Err(error) = core.state.transact(decide).await {
            tracing::error!(%host, error = ErrorBody::from_chain(&error).one_line(), "events are lost");
        }
        batch.clear();
    }
}

struct Link {
    core: Arc<Core>,
    host: HostName,
    number: u64,
    /// What the host was last told to be.
    last: Option<Desired>,
    /// It is what the store says as of this revision.
    told_at: u64,
    pending: HashMap<u64, oneshot::Sender<Result<Reply, ErrorBody>>>,
    last_request: u64,
    told: mpsc::Sender<Told>,
}

impl Link {
    /// Until the link ends; why it did.
    async fn run(&mut self, socket: &mut WebSocket, mut queue: mpsc::Receiver<Ask>) -> String {
        let mut world = self.core.state.follow();
        let mut look = interval(Duration::from_millis(LOOK_EVERY_MS));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        if let Err(reason) = self.tell(socket).await {
            return reason;
        }
        loop {
            let step = tokio::select! {
                message = socket.next() => {
                    heard = Instant::now();
                    match message {
                        Some(Ok(Message::Text(text))) => match self.hear(text.as_str()) {
                            Ok(Some(beat)) => self.prolong(socket, beat.as_ref()).await,
                            other => other.map(|_| ()),
                        },
                        Some(Ok(Message::Close(_))) | None => Err("closed by the agent".to_owned()),
                        Some(Ok(_)) => Ok(()),
                        Some(Err(error)) => Err(error.to_string()),
                    }
                }
                ask = queue.recv() => match ask {
                    Some(ask) => self.ask(socket, ask).await,
                    None => Err("a newer link of this host took over".to_owned()),
                },
                changed = world.changed() => match changed {
                    Ok(()) => self.tell(socket).await,
                    Err(_) => Err("the controller ends".to_owned()),
                },
                _ = look.tick() => {
                    self.pending.retain(|_, answer| !answer.is_closed());
                    if heard.elapsed() > Duration::from_millis(SILENCE_MS) {
                        Err(format!("nothing heard for {SILENCE_MS} ms"))
                    } else {
                        Ok(())
                    }
                }
            };
            if let Err(reason) = step {
                return reason;
            }
        }
    }

    /// Sends what the host shall be, if that differs from what it was last told, or if somebody waits for the host to
    /// have seen a newer revision.
    async fn tell(&mut self, socket: &mut WebSocket) -> Result<(), String> {
        let world = self.core.state.world();
        let new = desired(&world, &self.host);
        if let Some(last) = &self.last {
            let same = Desired { revision: last.revision, ..new.clone() } == *last;
            if same && last.revision >= awaited(&world, &self.host) {
                self.told_at = world.revision.0;
                return Ok(());
            }
        }
        write(socket, &FromController::Desired(Box::new(new.clone()))).await?;
        self.last = Some(new);
        self.told_at = world.revision.0;
        Ok(())
    }

    /// The host's lease goes on, once it has heard what it shall be.
    async fn prolong(&mut self, socket: &mut WebSocket, beat: Option<&Beat>) -> Result<(), String> {
        let Some(beat) = beat else {
            if let Err(error) = leases::none(&self.core, &self.host).await {
                return Err(ErrorBody::from_chain(&error).one_line());
            }
            return Ok(());
        };
        self.tell(socket).await?;
        let sent = self.last.as_ref().map_or(0, |last| last.revision);
        match leases::answer(&self.core, &self.host, beat, self.told_at, sent).await {
            Ok(Some(grant)) => write(socket, &FromController::Lease(grant)).await,
            Ok(None) => Ok(()),
            Err(error) => {
                let error = ErrorBody::from_chain(&error).one_line();
                tracing::error!(host = %self.host, error, "its lease is not prolonged");
                Ok(())
            }
        }
    }

    async fn ask(&mut self, socket: &mut WebSocket, ask: Ask) -> Result<(), String> {
        // A request may stand on what the store says since a moment ago.
        self.tell(socket).await?;
        self.last_request += 1;
        let request = self.last_request;
        self.pending.insert(request, ask.answer);
        write(socket, &FromController::Request { request, body: Box::new(ask.body) }).await
    }

    /// A message. Of a status: whether the host asks for its lease to go on.
    fn hear(&mut self, text: &str) -> Result<Option<Option<Beat>>, String> {
        let message = serde_json::from_str(text).map_err(|e| format!("a message that cannot be read: {e}"))?;
        match message {
            FromAgent::Hello { .. } => return Err("a second introduction".to_owned()),
            FromAgent::Status { containers, applied_revision, beat } => {
                self.core.links.update(&self.host, self.number, |report| {
                    report.containers = containers.into_iter().map(|c| (c.id.clone(), c)).collect();
                    report.applied_revision = applied_revision;
                    report.current = true;
                });
                return Ok(Some(beat));
            }
            FromAgent::Event { kind, container, message } => {
                if self.told.try_send(Told { kind, container, message }).is_err() {
                    tracing::warn!(host = %self.host, "an event is dropped: too many at once");
                }
            }
            FromAgent::Reply { request, result } => {
                if let Some(answer) = self.pending.remove(&request) {
                    // Nobody waits any more: what was asked for is in the next `Desired` too.
                    let _ = answer.send(result);
                }
            }
            about_a_move @ (FromAgent::MoveProgress { .. }
            | FromAgent::MoveFrozen { .. }
            | FromAgent::MoveReady { .. }
            | FromAgent::MoveFailed { .. }) => self.core.moves.hear(&self.host, about_a_move),
        }
        Ok(None)
    }
}

/// The newest revision that this host has to have seen for something that leaves it to be called gone.
fn awaited(world: &World, host: &HostName) -> u64 {
    let leaving = world.containers.values().filter(|c| c.leaving.iter().any(|l| l.host == *host));
    leaving.map(|c| c.revision.0).max().unwrap_or(0)
}

async fn write(socket: &mut WebSocket, message: &FromController) -> Result<(), String> {
    let text = serde_json::to_string(message).map_err(|e| e.to_string())?;
    match timeout(Duration::from_millis(SILENCE_MS), socket.send(Message::Text(text.into()))).await {
        Ok(sent) => sent.map_err(|e| e.to_string()),
        Err(_) => Err(format!("nothing could be sent for {SILENCE_MS} ms")),
    }
}
