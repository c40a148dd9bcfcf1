//! The agent's centre: what is wanted, who carries it out, what is told.
//!
//! The supervisor takes no input but the newest `Desired`: it makes the network match, gives every container's task its
//! assignment, and tells tasks whose container is not wanted here any more to unmake it. Requests only make things
//! happen sooner; whatever they would have done, the next `Desired` does too.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_api::link::{Assignment, Desired, FromAgent, FromController, MoveRole, Reply, Request};
use godwit_api::types::ErrorBody;
use godwit_criu::Criu;
use godwit_image::ImageStore;
use godwit_memory::MappingFlags;
use godwit_model::container::ContainerStatus;
use godwit_model::event::EventKind;
use godwit_model::{ContainerId, ContainerName, MoveId};
use godwit_network::{EnvironmentNetwork, HostNetwork, Mac};
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::config::AgentConfig;
use crate::lease::Lease;
use crate::ledger::Ledger;
use crate::link::Voice;
use crate::moves::incoming::Incoming;
use crate::moves::room;
use crate::task::{Command, TaskHandle, Verdict};
use crate::{facts, sessions, task, translate};

/// A `Desired` follows the request that overtook it within this time, in milliseconds.
const HEARD_TIMEOUT_MS: u64 = 5_000;

pub struct Host {
    pub config: AgentConfig,
    pub client_tls: Arc<ClientConfig>,
    pub server_tls: Arc<ServerConfig>,
    pub certificate_sha256: String,
    pub criu: Option<Criu>,
    /// `None`: the kernel does not tell them apart from smaps.
    pub mapping_flags: Option<MappingFlags>,
    pub voice: Voice,
    pub network: tokio::sync::Mutex<HostNetwork>,
    pub images: ImageStore,
    pub tasks: Mutex<BTreeMap<ContainerId, TaskHandle>>,
    pub incoming: Mutex<BTreeMap<MoveId, Arc<Incoming>>>,
    /// Held from the look whether a container has a place here to the moment it has: two moves never share directories.
    pub preparing: tokio::sync::Mutex<()>,
    /// Addresses that lead elsewhere although `Desired` does not say so yet: containers given away by a move.
    pub redirects: Mutex<BTreeMap<Mac, (u32, Ipv4Addr)>>,
    /// Addresses whose frames this host was asked to send elsewhere for moves between others, and their networks.
    pub redirected: Mutex<BTreeMap<Mac, u32>>,
    /// Where the controller was last reached; `None` before that.
    pub controller_address: Mutex<Option<Ipv4Addr>>,
    pub desired: watch::Sender<Option<Arc<Desired>>>,
    pub applied_revision: Mutex<u64>,
    pub changed: Notify,
    /// A container's task has ended, and with it everything of the container on this host.
    pub task_gone: Notify,
    pub expedite: Arc<crate::expedite::Expedite>,
    pub lease: Lease,
    /// As `client_tls`, to ask other hosts whether they have a controller.
    pub witness_tls: Arc<ClientConfig>,
}

/// Locks that no panic can leave half-changed.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    pub fn facts(&self) -> godwit_model::host::HostFacts {
        facts::read(&self.config, self.criu.as_ref(), self.certificate_sha256.clone())
    }

    pub fn status(&self) -> FromAgent {
        let mut containers: Vec<ContainerStatus> = locked(&self.tasks).values().map(TaskHandle::status).collect();
        containers.sort_by(|a, b| a.name.cmp(&b.name));
        // A container that nobody would stop cannot be started elsewhere: the host asks for no lease then.
        let guarded = locked(&self.tasks).values().all(TaskHandle::guarded);
        let beat = guarded.then(|| self.lease.beat());
        FromAgent::Status { containers, applied_revision: *locked(&self.applied_revision), beat }
    }

    /// Keepers stop their containers; this shows it.
    pub fn lease_ended(&self) {
        for task in locked(&self.tasks).values() {
            task.tell(Command::LeaseEnded);
        }
    }

    /// After a grant, and after what the host shall be is carried out: both are needed to know what it owns.
    fn changed_lease(&self) {
        if self.lease.carried_out(*locked(&self.applied_revision)) {
            self.lease_known();
        }
    }

    /// What is still owned is known again: it goes on.
    fn lease_known(&self) {
        tracing::info!("the lease of this host goes on, and so do the containers that are still its own");
        let Some(desired) = self.desired.borrow().clone() else { return };
        let tasks = locked(&self.tasks);
        for task in desired.containers.iter().filter_map(|assignment| tasks.get(&assignment.spec.id)) {
            task.tell(Command::LeaseKnown);
        }
    }

    /// Resolves after something of [`Host::status`] has changed.
    pub async fn status_changed(&self) {
        self.changed.notified().await;
    }

    pub fn event(&self, kind: EventKind, container: Option<&ContainerName>, message: impl Into<String>) {
        self.voice.say(FromAgent::Event { kind, container: container.cloned(), message: message.into() });
    }

    /// A message from the controller.
    pub fn hear(host: &Arc<Host>, message: FromController) {
        match message {
            FromController::Desired(desired) => {
                host.desired.send_replace(Some(Arc::from(desired)));
            }
            FromController::Lease(grant) => {
                if let Err(error) = host.lease.granted(grant) {
                    tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "the lease is not prolonged");
                }
                host.changed_lease();
            }
            FromController::Request { request, body } => {
                let host = Arc::clone(host);
                tokio::spawn(async move {
                    let result = Host::answer(&host, *body).await;
                    host.voice.say(FromAgent::Reply { request, result });
                });
            }
            FromController::Refused { error } => {
                tracing::error!(error = error.one_line(), "the controller refuses this host")
            }
        }
    }

    async fn answer(host: &Arc<Host>, body: Request) -> Result<Reply, ErrorBody> {
        match body {
            Request::PrepareMove { id, spec, generation, from, memory, revision } => {
                host.heard_of(revision).await?;
                room::enough(host, memory, room::Way::InRounds)?;
                Incoming::prepare(host, id, *spec, generation, from, memory, revision).await?;
                Ok(Reply::Prepared { address: host.config.migration_address() })
            }
            Request::StartMove { id, container, to, address, to_tunnel, options, fixed_ms, revision } => {
                let outgoing = crate::moves::outgoing::Plan { id, to, address, to_tunnel, options, fixed_ms, revision };
                host.task(&container)?.ask(|reply| Command::StartMove(outgoing, reply)).await?;
                Ok(Reply::Done)
            }
            Request::Examine { container } => Ok(Reply::Examined { movable: host.task(&container)?.examine().await? }),
            Request::Redirect { vni, mac, to_tunnel } => {
                let network = host.network.lock().await;
                locked(&host.redirected).insert(Mac(mac.0), vni);
                network.divert(Mac(mac.0), vni, to_tunnel).await.map_err(|e| ErrorBody::from_chain(&e))?;
                Ok(Reply::Done)
            }
            Request::ActivateMove { id, generation, revision } => {
                let incoming = locked(&host.incoming).get(&id).cloned();
                let incoming =
                    incoming.ok_or_else(|| ErrorBody::new(format!("move {id} is not known on this host")))?;
                incoming.activate(host, generation, revision).await
            }
            Request::ReleaseMove { id } => host.verdict(&id, Verdict::Release).await,
            Request::AbortMove { id, reason } => {
                let incoming = locked(&host.incoming).get(&id).cloned();
                if let Some(incoming) = incoming {
                    incoming.discard(host, &reason).await;
                    return Ok(Reply::Done);
                }
                host.verdict(&id, Verdict::Resume { reason }).await
            }
            Request::OpenSession { session, body } => {
                sessions::open(host, session, body)?;
                Ok(Reply::Done)
            }
        }
    }

    /// Waits for a `Desired` of at least this revision: what looks at the newest one then knows of what is begun here.
    async fn heard_of(&self, revision: u64) -> Result<(), ErrorBody> {
        let mut newest = self.desired.subscribe();
        let heard = newest.wait_for(|desired| desired.as_ref().is_some_and(|d| d.revision >= revision));
        match timeout(Duration::from_millis(HEARD_TIMEOUT_MS), heard).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ErrorBody::new(format!("this host has not heard of revision {revision} of the store"))),
        }
    }

    pub fn task(&self, id: &ContainerId) -> Result<TaskHandle, ErrorBody> {
        let found = locked(&self.tasks).get(id).cloned();
        found.ok_or_else(|| ErrorBody::new(format!("container {id} is not on this host")))
    }

    /// What becomes of a container this host gave away; done already if nobody knows the move.
    async fn verdict(&self, id: &MoveId, verdict: Verdict) -> Result<Reply, ErrorBody> {
        let task = locked(&self.tasks).values().find(|t| t.outgoing_move().as_ref() == Some(id)).cloned();
        match task {
            Some(task) => {
                task.ask(|reply| Command::Verdict(id.clone(), verdict, Some(reply))).await.map(|()| Reply::Done)
            }
            None => Ok(Reply::Done),
        }
    }

    /// Makes the host's network match the newest `Desired` and what moves have changed since.
    pub async fn apply_network(&self) -> Result<(), String> {
        let desired = self.desired.borrow().clone();
        let Some(desired) = desired else { return Ok(()) };
        let mut networks: Vec<EnvironmentNetwork> =
            translate::networks(&self.config, &desired.networks).map_err(|e| e.to_string())?;
        for (mac, (vni, to)) in locked(&self.redirects).iter() {
            networks = translate::redirected(networks, *vni, *mac, *to);
        }
        let controller = *locked(&self.controller_address);
        let network = self.network.lock().await;
        network.protect(desired.hosts.iter().copied().chain(controller).collect()).await;
        let errors = network.apply(&networks).await;
        if errors.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = errors.iter().map(|e| ErrorBody::from_chain(e).one_line()).collect();
        Err(lines.join("; "))
    }
}

/// Carries out every `Desired`, newest only, until the agent ends.
pub async fn supervise(host: Arc<Host>, ledger: Ledger) {
    let mut wanted = host.desired.subscribe();
    let mut store_id: Option<String> = match ledger.load() {
        Ok(Some(last)) => Some(last.store_id),
        Ok(None) => None,
        Err(error) => {
            tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "going on without it");
            None
        }
    };
    loop {
        let desired = wanted.borrow_and_update().clone();
        if let Some(desired) = desired {
            let ours = store_id.as_ref().is_none_or(|id| *id == desired.store_id);
            if !ours {
                tracing::error!(
                    "the controller has another store than the one this host belongs to; nothing is changed. \
                     If that is meant, stop the agent and delete ledger.json in its state directory"
                );
            } else {
                if let Err(error) = ledger.save(&desired) {
                    tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "acting without a ledger");
                }
                store_id = Some(desired.store_id.clone());
                carry_out(&host, &desired).await;
                *locked(&host.applied_revision) = desired.revision;
                host.changed_lease();
                host.changed.notify_one();
            }
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

/// Requests overtake: what one of them has begun since `desired` was made is left alone here, and a newer `Desired` that
/// knows of it is on its way.
async fn carry_out(host: &Arc<Host>, desired: &Desired) {
    if let Err(error) = host.apply_network().await {
        tracing::error!(%error, "the network does not match what is wanted");
    }
    end_redirects(host).await;
    for assignment in &desired.containers {
        assign(host, assignment, desired).await;
    }
    let wanted: std::collections::BTreeSet<&ContainerId> = desired.containers.iter().map(|a| &a.spec.id).collect();
    let unwanted: Vec<TaskHandle> = locked(&host.tasks)
        .iter()
        .filter(|(id, task)| !wanted.contains(id) && task.known_at(desired.revision))
        .map(|(_, task)| task.clone())
        .collect();
    for task in unwanted {
        let replaced = desired.containers.iter().any(|a| a.spec.name == *task.name());
        task.tell(Command::Unassign { keep_volumes: replaced || desired.volumes.contains(task.name()) });
    }
    let active = |id: &MoveId, role| desired.moves.iter().any(|m| m.id == *id && m.role == role);
    let stale: Vec<Arc<Incoming>> = locked(&host.incoming)
        .values()
        .filter(|i| i.since_revision <= desired.revision)
        .filter(|i| !active(&i.id, MoveRole::Destination) && !wanted.contains(&i.spec.id))
        .cloned()
        .collect();
    for incoming in stale {
        incoming.discard(host, "the controller does not know this move any more").await;
    }
    task::sweep_volumes(host).await;
}

/// Redirects of moves that are over end: frames go where the newest word says. A controller that died before it could
/// take a redirect back is thereby made good.
async fn end_redirects(host: &Arc<Host>) {
    let network = host.network.lock().await;
    // The newest word, after the lock: a redirect comes after the word that names its move.
    let Some(desired) = host.desired.borrow().clone() else { return };
    let moving = |mac: &Mac| desired.moving.iter().any(|m| m.0 == mac.0);
    let over: Vec<(Mac, u32)> =
        locked(&host.redirected).iter().filter(|(mac, _)| !moving(mac)).map(|(mac, vni)| (*mac, *vni)).collect();
    for (mac, vni) in over {
        let endpoints = desired.networks.iter().filter(|n| n.vni == vni).flat_map(|n| &n.endpoints);
        let described = endpoints.filter(|e| e.mac.0 == mac.0).find_map(|e| e.remote);
        if let Some(to) = described
            && let Err(error) = network.divert(mac, vni, to).await
        {
            tracing::error!(%mac, error = ErrorBody::from_chain(&error).one_line(), "a redirect is not taken back; tried again");
            continue;
        }
        locked(&host.redirected).remove(&mac);
    }
}

async fn assign(host: &Arc<Host>, assignment: &Assignment, desired: &Desired) {
    let id = &assignment.spec.id;
    let arriving = locked(&host.incoming).values().find(|i| i.spec.id == *id).cloned();
    if let Some(incoming) = arriving {
        // Ours by the store's word, restored here and waiting: the request may have been lost.
        if assignment.generation >= incoming.generation
            && let Err(error) = incoming.activate(host, assignment.generation, desired.revision).await
        {
            tracing::error!(container = %assignment.spec.name, error = error.one_line(), "could not be activated");
        }
        return;
    }
    let known = locked(&host.tasks).get(id).cloned();
    match known {
        Some(task) => {
            let out = task.outgoing_move();
            if !task.known_at(desired.revision) {
                return;
            }
            if let Some(out) = out
                && !desired.moves.iter().any(|m| m.id == out)
            {
                let reason = "the move is over and this host owns the container".to_owned();
                task.tell(Command::Verdict(out, Verdict::Resume { reason }, None));
            }
            task.tell(Command::Assign(Box::new(assignment.clone())));
        }
        None => task::spawn(host, assignment.clone()),
    }
}
