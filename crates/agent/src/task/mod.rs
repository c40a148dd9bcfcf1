//! One task per container: the only one that changes it. Everyone else queues a [`Command`].

mod brake;
mod gate;
mod health;
mod make;
mod record;
mod run;
mod unmake;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use godwit_api::link::{Assignment, Desired};
use godwit_api::types::ErrorBody;
use godwit_model::container::{ContainerSpec, ContainerState, ContainerStatus, Movable};
use godwit_model::{ContainerId, ContainerName, MoveId};
use tokio::sync::{mpsc, oneshot};

use crate::host::{Host, locked};
use crate::keeper::Keeper;
use crate::moves::outgoing::Plan;
use crate::translate;

pub use brake::Brake;
pub use gate::{Closed, ExecGate};
pub use make::{Live, attach_network, container_dir, ensure_image, mount_root, start_keeper, volumes_dir};
pub use record::Record;
pub use unmake::{sweep_volumes, unmake};

/// Commands waiting for one container.
const QUEUE_COMMANDS: usize = 64;

type Answer = oneshot::Sender<Result<(), ErrorBody>>;

pub enum Command {
    Assign(Box<Assignment>),
    /// This host does not own the container any more.
    Unassign {
        /// Another container of the same name takes them over.
        keep_volumes: bool,
    },
    StartMove(Plan, Answer),
    Verdict(MoveId, Verdict, Option<Answer>),
    Examine(oneshot::Sender<Movable>),
    /// The host's lease has ended, and keepers have stopped what runs.
    LeaseEnded,
    /// What the host still owns is known again.
    LeaseKnown,
}

/// What becomes of a container that was given away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Handed over: free everything here.
    Release,
    /// The move is off: go on.
    Resume { reason: String },
}

/// What others may see of a container without asking its task.
pub struct Shared {
    pub status: Mutex<ContainerStatus>,
    pub outgoing: Mutex<Option<MoveId>>,
    pub keeper: Mutex<Option<Keeper>>,
    pub dir: PathBuf,
    pub gate: ExecGate,
    pub brake: Brake,
    /// Its keeper stops it at the end of the host's lease, or nothing of it runs.
    guarded: AtomicBool,
    /// See [`Record::since_revision`].
    since_revision: AtomicU64,
}

impl Shared {
    /// Said before the move shows: whoever sees it sees this too.
    fn since(&self, revision: u64) {
        self.since_revision.fetch_max(revision, Ordering::SeqCst);
    }

    /// Commands that somebody runs in the container; health checks are not among them.
    pub fn exec_sessions(&self) -> u32 {
        // The gate is looked at first: a check that ends in between is counted by neither.
        let probes = self.gate.probes();
        let execs = godwit_container::keeper::state::read_state(&self.dir).ok().flatten().map_or(0, |s| s.execs);
        execs.saturating_sub(probes)
    }
}

#[derive(Clone)]
pub struct TaskHandle {
    name: ContainerName,
    mailbox: mpsc::Sender<Command>,
    pub shared: Arc<Shared>,
}

impl TaskHandle {
    pub fn name(&self) -> &ContainerName {
        &self.name
    }

    pub fn status(&self) -> ContainerStatus {
        locked(&self.shared.status).clone()
    }

    /// Whether a `Desired` of this revision knows how the container came to be as it is.
    pub fn known_at(&self, revision: u64) -> bool {
        self.shared.since_revision.load(Ordering::SeqCst) <= revision
    }

    pub fn guarded(&self) -> bool {
        self.shared.guarded.load(Ordering::Relaxed)
    }

    pub fn outgoing_move(&self) -> Option<MoveId> {
        locked(&self.shared.outgoing).clone()
    }

    pub fn keeper(&self) -> Option<Keeper> {
        locked(&self.shared.keeper).clone()
    }

    /// Queues a command; a full queue drops it, and the next `Desired` repeats it.
    pub fn tell(&self, command: Command) {
        if self.mailbox.try_send(command).is_err() {
            tracing::warn!(container = %self.name, "a command waits for the next round: the container's task is busy");
        }
    }

    /// Queues a command and waits for its answer.
    pub async fn ask(&self, command: impl FnOnce(Answer) -> Command) -> Result<(), ErrorBody> {
        self.queue(command).await?
    }

    /// Whether the container can be moved, looked at now.
    pub async fn examine(&self) -> Result<Movable, ErrorBody> {
        self.queue(Command::Examine).await
    }

    async fn queue<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, ErrorBody> {
        let gone = || ErrorBody::new(format!("container {} is being removed from this host", self.name));
        let (sender, receiver) = oneshot::channel();
        self.mailbox.send(command(sender)).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())
    }
}

fn first_status(spec: &ContainerSpec, generation: godwit_model::Generation) -> ContainerStatus {
    ContainerStatus {
        id: spec.id.clone(),
        name: spec.name.clone(),
        generation,
        state: ContainerState::Preparing,
        message: None,
        health: None,
        pid: None,
        started_at_ms: None,
        restarts: 0,
        exit: None,
        memory: None,
        working_set: None,
        cpu_usec: None,
        movable: Movable::default(),
        image_digest: None,
    }
}

fn register(
    host: &Arc<Host>,
    spec: &ContainerSpec,
    generation: godwit_model::Generation,
    since_revision: u64,
) -> (Arc<Shared>, mpsc::Receiver<Command>) {
    let (mailbox, commands) = mpsc::channel(QUEUE_COMMANDS);
    let shared = Arc::new(Shared {
        status: Mutex::new(first_status(spec, generation)),
        outgoing: Mutex::new(None),
        keeper: Mutex::new(None),
        dir: container_dir(host, &spec.id),
        gate: ExecGate::default(),
        brake: Brake::new(translate::limits(&spec.resources)),
        guarded: AtomicBool::new(true),
        since_revision: AtomicU64::new(since_revision),
    });
    let handle = TaskHandle { name: spec.name.clone(), mailbox, shared: Arc::clone(&shared) };
    locked(&host.tasks).insert(spec.id.clone(), handle);
    (shared, commands)
}

/// A new task for a container this host is to run.
pub fn spawn(host: &Arc<Host>, assignment: Assignment) {
    let (shared, commands) = register(host, &assignment.spec, assignment.generation, 0);
    tokio::spawn(run::Task::new(Arc::clone(host), assignment, shared, commands).run());
}

/// A task for a container that runs here already: it has just arrived by a move.
pub fn spawn_live(host: &Arc<Host>, assignment: Assignment, live: Live, record: Record) {
    let (shared, commands) = register(host, &assignment.spec, assignment.generation, record.since_revision);
    let task = run::Task::new(Arc::clone(host), assignment, shared, commands).with_live(live, record);
    tokio::spawn(task.run());
}

/// Finds what an earlier agent left: every container directory becomes a task, adopted with its keeper where it lives.
/// Containers that were arriving are unmade unless their processes are restored and wait for the store's word.
pub async fn adopt_all(host: &Arc<Host>, last: Option<&Desired>) {
    let Ok(list) = std::fs::read_dir(host.config.containers_dir()) else { return };
    for item in list.flatten() {
        let Ok(id) = item.file_name().to_string_lossy().parse::<ContainerId>() else { continue };
        let record = match Record::load(&item.path()) {
            Ok(Some(record)) => record,
            Ok(None) => {
                tracing::warn!(%id, "an unfinished container directory is removed");
                unmake(host, &id, None).await;
                continue;
            }
            Err(error) => {
                tracing::error!(%id, error = ErrorBody::from_chain(&error).one_line(), "left alone");
                continue;
            }
        };
        let mut record = record;
        if record.incoming.is_some() {
            use godwit_container::keeper::state::{Phase, read_state};
            let phase = read_state(&item.path()).ok().flatten().map(|state| state.phase);
            let ours =
                last.is_some_and(|d| d.containers.iter().any(|a| a.spec.id == id && a.generation >= record.generation));
            // It runs only after the store's word: an agent that died before it could note that leaves it like this.
            // And what is ours by that word, but did not survive as a process, has its only files here.
            let arrived = phase == Some(Phase::Running) || (ours && phase != Some(Phase::Restored));
            if !arrived {
                crate::moves::incoming::adopt(host, record).await;
                continue;
            }
            record.incoming = None;
            if phase != Some(Phase::Running) {
                crate::moves::ghosts::remove(host, &record.spec).await;
            }
        }
        let run = last.and_then(|d| d.containers.iter().find(|a| a.spec.id == id)).is_none_or(|a| a.run);
        let assignment = Assignment {
            spec: record.spec.clone(),
            generation: record.generation,
            run,
            start_count: record.start_count,
        };
        let (shared, commands) = register(host, &assignment.spec, assignment.generation, record.since_revision);
        let mut task = run::Task::new(Arc::clone(host), assignment, shared, commands);
        task.adopt(record).await;
        tokio::spawn(task.run());
    }
}
