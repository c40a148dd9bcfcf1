//! The life of one container on this host: start, watch, restart, give away, unmake.

mod ending;
mod lease;
mod looking;
mod moving;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use godwit_api::link::Assignment;
use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::{Event, Reply, Request};
use godwit_container::keeper::state::Exit;
use godwit_container::{LaunchSpec, keeper::state as keeper_state};
use godwit_model::container::{ContainerState, Health};
use godwit_model::event::EventKind;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use self::ending::exit_status;
use super::health::HealthLoop;
use super::make::{self, Live, chain, volumes_dir};
use super::record::Record;
use super::unmake::{stop_everything, unmake};
use super::{Command, Shared};
use crate::host::{Host, locked};
use crate::keeper::Keeper;
use crate::moves::fill::{self, Filling};
use crate::moves::outgoing::Outgoing;
use crate::{movable, translate};

/// Pauses before a restart, in milliseconds: doubled from the first to the longest, reset by a run of the calm time.
const FIRST_BACKOFF_MS: u64 = 200;
const LONGEST_BACKOFF_MS: u64 = 30_000;
const CALM_RUN_MS: u64 = 10_000;
/// How often usage is read, in milliseconds.
const USAGE_EVERY_MS: u64 = 2_000;
/// After a kill signal the kernel ends a process within this time, in milliseconds.
const KILL_TIMEOUT_MS: u64 = 10_000;

pub struct Task {
    host: Arc<Host>,
    assignment: Assignment,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    record: Record,
    live: Option<Live>,
    started: Instant,
    restart_at: Option<Instant>,
    backoff_ms: u64,
    health: Option<HealthLoop>,
    outgoing: Option<Outgoing>,
    looker: movable::Looker,
    /// How it ended after it was given away, until the store says where it goes on.
    ended: Option<Exit>,
    /// It is to start when the host's lease goes on.
    start_by_lease: bool,
    /// Its keeper holds it still since the end of the host's lease.
    fenced: bool,
}

impl Task {
    pub fn new(
        host: Arc<Host>,
        assignment: Assignment,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let record = Record {
            spec: assignment.spec.clone(),
            generation: assignment.generation,
            start_count: assignment.start_count,
            image_digest: None,
            restarts: 0,
            since_revision: 0,
            incoming: None,
            outgoing: None,
        };
        let restart_at = assignment.run.then(Instant::now);
        Self {
            host,
            assignment,
            shared,
            commands,
            record,
            live: None,
            started: Instant::now(),
            restart_at,
            backoff_ms: FIRST_BACKOFF_MS,
            health: None,
            outgoing: None,
            looker: movable::Looker::default(),
            ended: None,
            start_by_lease: false,
            fenced: false,
        }
    }

    /// For a container that runs already.
    pub fn with_live(mut self, live: Live, record: Record) -> Self {
        self.record = record;
        self.restart_at = None;
        self.went_live(live);
        self
    }

    /// Takes over what an earlier agent left in the container's directory.
    pub async fn adopt(&mut self, record: Record) {
        self.record = record;
        let dir = self.shared.dir.clone();
        let connected = Keeper::connect(&dir).await;
        let state = match &connected {
            Ok((keeper, _)) => keeper.call(Request::Status, "status").await.ok(),
            Err(_) => None,
        };
        if let (Ok((keeper, events)), Some((Reply::Status(state), ..))) = (connected, state)
            && let (Some(pid), None, Ok(launch)) = (state.pid, &state.exit, LaunchSpec::load(&dir))
            && state.phase == keeper_state::Phase::Running
            && let Ok(cgroup) = make::open_cgroup(&launch)
        {
            tracing::info!(container = %self.record.spec.name, pid, "adopted");
            self.restart_at = None;
            // An agent that slowed it down for a move may not have lived to end that.
            if let Err(error) = self.shared.brake.release(&cgroup) {
                tracing::error!(
                    error = ErrorBody::from_chain(&error).one_line(),
                    "its processor time was not given back"
                );
            }
            fill::follow(&self.host, &self.record.spec.name, dir, Filling::default(), keeper.clone(), cgroup.clone());
            self.shared.guarded.store(state.guarded, Ordering::Relaxed);
            self.went_live(Live { keeper, events, cgroup, pid });
            locked(&self.shared.status).started_at_ms = state.started_unix_ms;
            self.resume_giving_away();
            if state.fenced {
                self.lease_ended();
            }
            return;
        }
        // No keeper, or a half-made container: what is left of it goes, its files stay.
        let exit = keeper_state::read_exit(&dir).ok().flatten();
        stop_everything(&self.host, &self.record.spec.id).await;
        if self.record.outgoing.is_some() {
            // It may run elsewhere by now: it is started again only by the store's word that it does not.
            self.restart_at = None;
            self.resume_giving_away();
            return;
        }
        if let Some(exit) = exit {
            self.exited(exit);
        } else if self.assignment.run {
            self.restart_at = Some(Instant::now());
        }
    }

    /// A container that was being given away when the agent died: frozen, it waits for the store's verdict; not frozen
    /// yet, the move has failed and it simply runs on.
    fn resume_giving_away(&mut self) {
        let Some(id) = self.record.outgoing.clone() else { return };
        *locked(&self.shared.outgoing) = Some(id.clone());
        self.outgoing = Some(Outgoing::orphan(id));
        self.set_state(ContainerState::Frozen, Some("waits for the controller's word on its move".to_owned()));
    }

    fn went_live(&mut self, live: Live) {
        *locked(&self.shared.keeper) = Some(live.keeper.clone());
        {
            let mut status = locked(&self.shared.status);
            status.pid = Some(live.pid);
            status.exit = None;
            status.restarts = self.record.restarts;
            status.image_digest = self.record.image_digest.clone();
            status.started_at_ms = Some(now_ms());
        }
        let live_keeper = live.keeper.clone();
        self.live = Some(live);
        self.started = Instant::now();
        self.health = self.assignment.spec.health.clone().map(|check| {
            locked(&self.shared.status).health = Some(Health::Starting);
            HealthLoop::start(check, live_keeper, Arc::clone(&self.shared))
        });
        self.set_state(ContainerState::Running, None);
    }

    fn set_state(&self, state: ContainerState, message: Option<String>) {
        let mut status = locked(&self.shared.status);
        status.state = state;
        status.message = message;
        status.generation = self.assignment.generation;
        drop(status);
        self.host.changed.notify_one();
    }

    /// Runs until the container is unmade.
    pub async fn run(mut self) {
        let mut usage = tokio::time::interval(Duration::from_millis(USAGE_EVERY_MS));
        usage.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let restart = self.restart_at.filter(|_| self.live.is_none());
            tokio::select! {
                command = self.commands.recv() => match command {
                    None => return,
                    Some(Command::Unassign { keep_volumes }) => {
                        if self.unassign(keep_volumes).await {
                            return;
                        }
                    }
                    Some(command) => self.obey(command).await,
                },
                event = next_event(&mut self.live) => self.hear(event).await,
                () = sleep_until(restart.unwrap_or_else(far)), if restart.is_some() => self.start().await,
                ended = Outgoing::ended(&mut self.outgoing) => self.sending_ended(ended).await,
                judged = HealthLoop::next(&mut self.health) => self.judge(judged),
                _ = usage.tick() => self.measure(false),
            }
        }
    }

    async fn start(&mut self) {
        self.restart_at = None;
        if !self.host.lease.may_run() {
            return self.wait_for_lease();
        }
        self.set_state(ContainerState::Preparing, None);
        // Written before anything is made, so that an agent after this one knows whose directory it finds.
        let dir = self.shared.dir.clone();
        let saved = std::fs::create_dir_all(&dir)
            .map_err(make::wrong("making the container's directory"))
            .and_then(|()| self.record.save(&dir).map_err(chain));
        let made = match saved {
            Ok(()) => make::start(&self.host, &self.assignment.spec).await,
            Err(error) => Err(error),
        };
        match made {
            Ok((live, image)) => {
                self.record.image_digest = Some(image.digest.to_string());
                self.save_record();
                self.went_live(live);
                self.event(EventKind::ContainerStarted, format!("started with {}", image.reference));
            }
            Err(error) => {
                stop_everything(&self.host, &self.assignment.spec.id).await;
                let text = error.one_line();
                tracing::warn!(container = %self.assignment.spec.name, error = text, "could not be started");
                if locked(&self.shared.status).message.as_deref() != Some(&text) {
                    self.event(EventKind::ContainerFailed, format!("could not be started: {text}"));
                }
                self.set_state(ContainerState::Failed, Some(text));
                self.schedule_restart();
            }
        }
    }

    fn schedule_restart(&mut self) {
        if self.started.elapsed() > Duration::from_millis(CALM_RUN_MS) {
            self.backoff_ms = FIRST_BACKOFF_MS;
        }
        self.restart_at = Some(Instant::now() + Duration::from_millis(self.backoff_ms));
        self.backoff_ms = (self.backoff_ms * 2).min(LONGEST_BACKOFF_MS);
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Assign(assignment) => self.assign(*assignment).await,
            Command::StartMove(plan, answer) => {
                let _ = answer.send(self.start_move(plan).await);
            }
            Command::Verdict(id, verdict, answer) => {
                let result = self.verdict(&id, verdict).await;
                if let Some(answer) = answer {
                    let _ = answer.send(result);
                }
            }
            Command::Examine(answer) => {
                self.measure(true);
                let _ = answer.send(locked(&self.shared.status).movable.clone());
            }
            Command::LeaseEnded => self.lease_ended(),
            Command::LeaseKnown => self.lease_known().await,
            // Handled by `run`, which it ends.
            Command::Unassign { .. } => {}
        }
    }

    async fn assign(&mut self, new: Assignment) {
        // It has lived elsewhere since: nothing of what is here is what it is now.
        if new.generation > self.record.generation && self.outgoing.is_none() {
            self.settle().await;
            let errors = unmake(&self.host, &self.assignment.spec.id, None).await;
            if !errors.is_empty() {
                return self.set_state(ContainerState::Failed, Some(errors.join("; ")));
            }
            self.restart_at = new.run.then(Instant::now);
        }
        let old = std::mem::replace(&mut self.assignment, new);
        self.record.spec = self.assignment.spec.clone();
        self.record.generation = self.assignment.generation;
        if old.spec.resources != self.assignment.spec.resources
            && let Some(live) = &self.live
            && let Err(error) =
                self.shared.brake.assign(&live.cgroup, translate::limits(&self.assignment.spec.resources))
        {
            let text = ErrorBody::from_chain(&error).one_line();
            self.event(EventKind::ContainerFailed, format!("its new limits could not be set: {text}"));
        }
        let asked_again = self.assignment.start_count > self.record.start_count;
        self.record.start_count = self.assignment.start_count;
        if self.outgoing.is_some() {
            return;
        }
        if old != self.assignment {
            self.save_record();
        }
        match (&self.live, self.assignment.run) {
            (Some(_), false) => self.stop().await,
            (None, true) if !old.run || asked_again => {
                self.backoff_ms = FIRST_BACKOFF_MS;
                self.restart_at = Some(Instant::now());
            }
            (None, false) => {
                self.restart_at = None;
                if locked(&self.shared.status).state != ContainerState::Stopped {
                    self.set_state(ContainerState::Stopped, None);
                }
            }
            _ => {}
        }
    }

    /// Asks the program to end, then insists.
    async fn stop(&mut self) {
        if self.fenced {
            // It stands still and hears nothing.
            return self.stopped().await;
        }
        let Some(live) = &mut self.live else { return };
        let signal = LaunchSpec::load(&self.shared.dir).map_or(nix::libc::SIGTERM, |l| l.stop_signal);
        let grace = Duration::from_millis(self.assignment.spec.stop_grace_ms);
        let _ = live.keeper.signal(signal).await;
        let mut exit = wait_exit(live, grace).await;
        if exit.is_none() {
            let _ = live.keeper.signal(nix::libc::SIGKILL).await;
            exit = wait_exit(live, Duration::from_millis(KILL_TIMEOUT_MS)).await;
        }
        if let Some(exit) = &exit {
            locked(&self.shared.status).exit = Some(exit_status(exit));
        }
        self.stopped().await;
    }

    async fn stopped(&mut self) {
        self.settle().await;
        self.set_state(ContainerState::Stopped, None);
        self.event(EventKind::ContainerStopped, "stopped");
    }

    /// After the program's end: keeper, link, cgroup and mounts go, files stay.
    async fn settle(&mut self) {
        self.shared.guarded.store(true, Ordering::Relaxed);
        self.fenced = false;
        *locked(&self.shared.keeper) = None;
        self.live = None;
        self.health = None;
        {
            let mut status = locked(&self.shared.status);
            status.pid = None;
            status.health = None;
            (status.memory, status.working_set) = (None, None);
        }
        let errors = stop_everything(&self.host, &self.assignment.spec.id).await;
        if !errors.is_empty() {
            self.set_state(ContainerState::Failed, Some(errors.join("; ")));
        }
    }

    /// Everything of the container goes; true when the task has nothing left to do.
    async fn unassign(&mut self, keep_volumes: bool) -> bool {
        let gave_away = self.outgoing.is_some();
        if self.live.is_some() && !gave_away && !self.fenced {
            self.stop().await;
        }
        if gave_away {
            let _ = self.release().await;
            locked(&self.host.redirects).remove(&godwit_network::Mac(self.assignment.spec.network.mac.0));
        }
        let volumes = (!keep_volumes).then(|| volumes_dir(&self.host, &self.assignment.spec.name));
        let errors = unmake(&self.host, &self.assignment.spec.id, volumes).await;
        if !errors.is_empty() {
            self.set_state(ContainerState::Failed, Some(format!("could not be removed: {}", errors.join("; "))));
            return false;
        }
        locked(&self.host.tasks).remove(&self.assignment.spec.id);
        self.host.task_gone.notify_waiters();
        // Also what the move's buffers were; nobody waits for it.
        tokio::task::spawn_blocking(godwit_memory::give_back_freed);
        if !gave_away {
            self.event(EventKind::ContainerRemoved, "removed");
        }
        self.host.changed.notify_one();
        true
    }

    fn save_record(&self) {
        if self.shared.dir.is_dir()
            && let Err(error) = self.record.save(&self.shared.dir)
        {
            tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "the container's record is stale");
        }
    }

    fn event(&self, kind: EventKind, message: impl Into<String>) {
        self.host.event(kind, Some(&self.assignment.spec.name), message);
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(24 * 3600)
}

pub fn now_ms() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}

async fn next_event(live: &mut Option<Live>) -> Option<Event> {
    match live {
        Some(live) => live.events.recv().await,
        None => std::future::pending().await,
    }
}

async fn wait_exit(live: &mut Live, limit: Duration) -> Option<Exit> {
    let exit = async {
        loop {
            match live.events.recv().await {
                Some(Event::Exited(exit)) => return Some(exit),
                Some(_) => {}
                None => return None,
            }
        }
    };
    timeout(limit, exit).await.ok().flatten()
}
