//! Taking a container in: the agent's part of the destination's side.
//!
//! Nothing in it runs before the store names this host as its owner. Until then every error, and every word of the
//! controller that the move is off, unmakes all of it.

mod arriving;
mod preparing;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::link::{Assignment, Reply};
use godwit_api::types::ErrorBody;
use godwit_container::LaunchSpec;
use godwit_container::keeper::protocol::{Event, Reply as Said, Request};
use godwit_container::keeper::state::Phase as KeeperPhase;
use godwit_image::Image;
use godwit_memory::FillerProcess;
use godwit_migrate::wire::{FrameReader, MAX_CONNECTIONS};
use godwit_migrate::{Arrival, Following};
use godwit_model::container::{ContainerSpec, Health};
use godwit_model::event::EventKind;
use godwit_model::units::Bytes;
use godwit_model::{Generation, HostName, MoveId};
use godwit_network::Parking;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use self::arriving::{Site, arrive};
use super::dump::WorkDirs;
use super::fill::{self, Filling};
use super::ghosts;
use crate::expedite::Expedited;
use crate::host::{Host, locked};
use crate::keeper::Keeper;
use crate::task::{self, Live, Record, container_dir, volumes_dir};

/// CRIU comes to each of its stops within this time, in milliseconds.
const RESTORE_TIMEOUT_MS: u64 = 120_000;

/// One container on its way in.
pub struct Incoming {
    pub id: MoveId,
    pub spec: ContainerSpec,
    pub generation: Generation,
    pub from: HostName,
    /// What the container used when the move was asked for.
    memory: Bytes,
    /// Revision of the store at which the move began: an older `Desired` says nothing of it.
    pub since_revision: u64,
    stage: tokio::sync::Mutex<Stage>,
    /// Where further connections of the stream go.
    lanes: std::sync::Mutex<Option<mpsc::Sender<FrameReader<arriving::Reader>>>>,
    /// Made in the background from the freeze on; whoever unmakes the rest waits for it.
    site: tokio::sync::Mutex<Option<JoinHandle<Result<Site, ErrorBody>>>>,
}

enum Stage {
    /// Everything is ready for the stream.
    Ready(Box<Ready>),
    /// The stream runs in this task.
    Receiving(JoinHandle<()>),
    /// Restored; waits for the store's word.
    Held(Box<Held>),
    /// Became a task, or was unmade.
    Over,
}

struct Ready {
    image: Image,
    parking: Parking,
    dirs: WorkDirs,
}

struct Held {
    live: Live,
    parking: Option<Parking>,
    dirs: Option<WorkDirs>,
    record: Record,
    started_at_ms: Option<u64>,
    health: Option<Health>,
    filler: Option<Arc<FillerProcess>>,
    /// Memory that is still on its way.
    following: Option<Following>,
    /// Until it runs.
    _expedited: Option<Expedited>,
    since: Instant,
}

fn chain<E: std::error::Error + 'static>(e: E) -> ErrorBody {
    ErrorBody::from_chain(&e)
}

impl Incoming {
    /// The store names this host as owner, since this revision of it: everything runs from here on.
    pub async fn activate(
        self: &Arc<Self>,
        host: &Arc<Host>,
        generation: Generation,
        revision: u64,
    ) -> Result<Reply, ErrorBody> {
        let mut stage = self.stage.lock().await;
        if let Stage::Over = *stage {
            return if locked(&host.tasks).contains_key(&self.spec.id) {
                Ok(Reply::Activated { hand_over_ms: 0.0, activate_ms: 0.0, frames_parked: 0 })
            } else {
                Err(ErrorBody::new(format!("move {} was unmade on this host", self.id)))
            };
        }
        if !matches!(*stage, Stage::Held(_)) {
            return Err(ErrorBody::new(format!("container {} has not arrived yet", self.spec.name)));
        }
        let Stage::Held(mut held) = std::mem::replace(&mut *stage, Stage::Over) else {
            return Err(ErrorBody::new("the move is over"));
        };
        godwit_hold::reach("activate").await;
        let begun = Instant::now();
        let hand_over_ms = held.since.elapsed().as_secs_f64() * 1e3;
        // Before it runs: CRIU may wait for memory that does not come any more.
        let filling = Filling { filler: held.filler.take(), following: held.following.take() };
        let container_dir = container_dir(host, &self.spec.id);
        fill::follow(
            host,
            &self.spec.name,
            container_dir.clone(),
            filling,
            held.live.keeper.clone(),
            held.live.cgroup.clone(),
        );
        let result = resume(&mut held).await;
        let resumed_ms = begun.elapsed().as_secs_f64() * 1e3;
        let frames_parked = match held.parking.as_mut() {
            Some(parking) => parking.hand_out().await.map(|d| d.frames).map_err(chain),
            None => Ok(0),
        };
        let activate_ms = begun.elapsed().as_secs_f64() * 1e3;
        tracing::debug!(resumed_ms, activate_ms, "activated");
        // Before anyone is told: a next move would be in its way.
        if let Some(parking) = held.parking.take()
            && let Err(error) = parking.end().await
        {
            tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "a parking was not cleared away");
        }
        held.record.incoming = None;
        held.record.generation = generation;
        held.record.since_revision = revision;
        if let Err(error) = held.record.save(&container_dir) {
            tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "the container's record is stale");
        }
        if result.is_err() {
            // It is started again from its files.
            ghosts::remove(host, &self.spec).await;
        }
        let assignment =
            Assignment { spec: self.spec.clone(), generation, run: true, start_count: held.record.start_count };
        let Held { live, dirs, record, started_at_ms, health, .. } = *held;
        task::spawn_live(host, assignment, live, record);
        if let Some(task) = locked(&host.tasks).get(&self.spec.id) {
            let mut status = locked(&task.shared.status);
            status.started_at_ms = started_at_ms;
            // Without checks it has none; with them, the next one judges.
            status.health = status.health.and(health).or(status.health);
        }
        locked(&host.incoming).remove(&self.id);
        host.changed.notify_one();
        if let Some(dirs) = dirs {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = dirs.remove() {
                    tracing::error!(%error, "a move's working files are left behind");
                }
            });
        }
        // The container is ours by the store's word whatever happened above: a restore that failed at the very end is
        // a container that ended, and its task starts it again by its restart policy.
        result?;
        let frames_parked = frames_parked.unwrap_or_else(|error| {
            tracing::error!(error = error.one_line(), "parked frames were not delivered; peers will send them again");
            0
        });
        Ok(Reply::Activated { hand_over_ms, activate_ms, frames_parked })
    }

    /// Unmakes everything; nothing of it has run.
    pub async fn discard(self: &Arc<Self>, host: &Arc<Host>, reason: &str) {
        // A stream at work holds no lock while it waits; it is stopped first.
        let mut stage = self.stage.lock().await;
        match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Over => return,
            Stage::Receiving(worker) => {
                worker.abort();
                let _ = worker.await;
            }
            Stage::Ready(_) | Stage::Held(_) => {}
        }
        tracing::info!(container = %self.spec.name, id = %self.id, reason, "an arriving container is unmade");
        self.unmake(host).await;
    }

    async fn unmake(&self, host: &Arc<Host>) {
        let site = self.site.lock().await.take();
        if let Some(site) = site
            && let Err(error) = site.await
        {
            tracing::error!(%error, "what was made for an arriving container may be half made");
        }
        let volumes = volumes_dir(host, &self.spec.name);
        task::unmake(host, &self.spec.id, Some(volumes)).await;
        if let Err(error) = WorkDirs::of(host, &self.id).remove() {
            tracing::error!(%error, "a move's working files are left behind");
        }
        locked(&host.incoming).remove(&self.id);
        // Ends parking, if dropping it has not: the host's network is made to match again.
        if let Err(error) = host.apply_network().await {
            tracing::error!(%error, "the network does not match what is wanted");
        }
    }
}

/// The word to CRIU, and its answer that everything runs.
async fn resume(held: &mut Held) -> Result<(), ErrorBody> {
    let told = held.live.keeper.call(Request::RestoreProceed { go_on: true }, "resume").await;
    if let Err(error) = told {
        // An agent before this one may have said it.
        let (said, ..) = held.live.keeper.call(Request::Status, "status").await.map_err(chain)?;
        match said {
            Said::Status(state) if state.phase == KeeperPhase::Running => return Ok(()),
            Said::Status(state) if state.phase == KeeperPhase::Restored => {}
            _ => return Err(chain(error)),
        }
    }
    match restore_event(&mut held.live.events).await? {
        Event::Resumed { .. } => Ok(()),
        other => Err(ErrorBody::new(format!("the keeper said {other:?} instead of resuming"))),
    }
}

async fn restore_event(events: &mut mpsc::Receiver<Event>) -> Result<Event, ErrorBody> {
    match timeout(Duration::from_millis(RESTORE_TIMEOUT_MS), events.recv()).await {
        Ok(Some(Event::RestoreFailed { error })) => Err(ErrorBody::new(error)),
        Ok(Some(event)) => Ok(event),
        Ok(None) => Err(ErrorBody::new("the keeper ended in the middle of the restore")),
        Err(_) => {
            Err(ErrorBody::new(format!("CRIU did not come to its next step within {} s", RESTORE_TIMEOUT_MS / 1000)))
        }
    }
}

/// A connection from another host: its offer names the move; the rest of the move happens here.
pub async fn connected(host: &Arc<Host>, peer: HostName, stream: TlsStream<TcpStream>) -> Result<(), String> {
    let (reader, writer) = tokio::io::split(stream);
    let reader = tokio::io::BufReader::with_capacity(256 << 10, reader);
    let arrival = godwit_migrate::arrival(reader).await.map_err(|e| ErrorBody::from_chain(&e).one_line())?;
    let move_id = arrival.move_id().to_owned();
    let unexpected = || format!("the move {move_id} of {peer} is not expected here");
    let id: MoveId = move_id.parse().map_err(|_| unexpected())?;
    let incoming = locked(&host.incoming).get(&id).filter(|i| i.from == peer).cloned().ok_or_else(unexpected)?;
    let offered = match arrival {
        Arrival::Offer(offered) => offered,
        Arrival::Join { lane, .. } => {
            let lanes = locked(&incoming.lanes).clone().ok_or_else(unexpected)?;
            return lanes.try_send(lane).map_err(|_| unexpected());
        }
    };
    let mut stage = incoming.stage.lock().await;
    match std::mem::replace(&mut *stage, Stage::Over) {
        Stage::Ready(ready) => {
            let (lanes, joined) = mpsc::channel(MAX_CONNECTIONS as usize);
            *locked(&incoming.lanes) = Some(lanes);
            let (host, this) = (Arc::clone(host), Arc::clone(&incoming));
            let arriving = async move { arrive(host, this, *ready, offered, joined, writer).await };
            *stage = Stage::Receiving(tokio::spawn(arriving));
            Ok(())
        }
        other => {
            *stage = other;
            Err(unexpected())
        }
    }
}

/// What an earlier agent of this host was receiving: restored and waiting, or worth nothing.
pub async fn adopt(host: &Arc<Host>, record: Record) {
    let Some(id) = record.incoming.clone() else { return };
    let dir = container_dir(host, &record.spec.id);
    let spec = record.spec.clone();
    let held = adopt_held(host, &dir, record.clone()).await;
    let stage = match held {
        Some(held) => Stage::Held(Box::new(held)),
        None => Stage::Over,
    };
    let lost = matches!(stage, Stage::Over);
    let incoming = Arc::new(Incoming {
        id: id.clone(),
        spec: spec.clone(),
        generation: record.generation,
        from: host.config.name.clone(),
        memory: Bytes::default(),
        since_revision: record.since_revision,
        stage: tokio::sync::Mutex::new(stage),
        lanes: std::sync::Mutex::default(),
        site: tokio::sync::Mutex::default(),
    });
    if lost {
        incoming.unmake(host).await;
        host.event(EventKind::MoveFailed, Some(&spec.name), "its arrival ended with the agent");
    } else {
        locked(&host.incoming).insert(id, incoming);
    }
}

async fn adopt_held(host: &Host, dir: &Path, record: Record) -> Option<Held> {
    let (keeper, events) = Keeper::connect(dir).await.ok()?;
    let (said, ..) = keeper.call(Request::Status, "status").await.ok()?;
    let Said::Status(state) = said else { return None };
    if state.phase != KeeperPhase::Restored {
        return None;
    }
    let launch = LaunchSpec::load(dir).ok()?;
    let cgroup = godwit_container::Cgroup::open(&launch.cgroup_path()).ok()?;
    let live = Live { keeper, events, cgroup, pid: state.pid? };
    let dirs = record.incoming.as_ref().map(|id| WorkDirs::of(host, id));
    Some(Held {
        live,
        parking: None,
        dirs,
        record,
        started_at_ms: None,
        health: None,
        filler: None,
        following: None,
        _expedited: None,
        since: Instant::now(),
    })
}
