//! The stream of one move, from its first frame to processes that are restored and held.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::link::FromAgent;
use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::{Event, Request, RestoreSpec};
use godwit_container::spec::BindMount;
use godwit_container::{Cgroup, LaunchSpec};
use godwit_criu::{Ends, Message, PageServerOptions, PassedFd, Session};
use godwit_image::Image;
use godwit_memory::{FillerProcess, Late, PageStore};
use godwit_migrate::destination::{Joined, Landing};
use godwit_migrate::source::PartError;
use godwit_migrate::wire::Final;
use godwit_migrate::{Offered, Received, receive};
use godwit_model::MoveId;
use godwit_model::container::{ContainerSpec, Health};
use godwit_model::migration::{DowntimePart, Phase};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::server::TlsStream;

use super::{Held, Incoming, Ready, Stage, chain, restore_event};
use crate::expedite::Expedited;
use crate::host::Host;
use crate::keeper::Keeper;
use crate::laps::Laps;
use crate::moves::dump::WorkDirs;
use crate::moves::{Detail, ROOT_TREE, fill, room, volume_tree};
use crate::task::{self, Live, Record, container_dir, volumes_dir};
use crate::translate;

/// The page server ends after the last page within this time, in milliseconds.
const PAGES_TIMEOUT_MS: u64 = 60_000;
/// The number under which criu finds the page socket.
const PAGES_FD: i32 = 10;

pub(super) type Reader = tokio::io::BufReader<tokio::io::ReadHalf<TlsStream<TcpStream>>>;
type Writer = tokio::io::WriteHalf<TlsStream<TcpStream>>;

/// Receives and restores; whatever happens, the stage says so at the end.
pub(super) async fn arrive(
    host: Arc<Host>,
    incoming: Arc<Incoming>,
    ready: Ready,
    offered: Offered<Reader>,
    joined: Joined<Reader>,
    writer: Writer,
) {
    let dirs = ready.dirs.clone();
    let mut arriving = Arriving {
        host: Arc::clone(&host),
        incoming: Arc::clone(&incoming),
        image: ready.image,
        dirs: ready.dirs,
        page_server: None,
        detail: None,
        expedited: None,
        restored: None,
    };
    let result = receive(offered, writer, joined, &mut arriving).await;
    let restored = arriving.restored.take();
    match (result, restored) {
        (Ok((received, following)), Some(Restored { live, record, started_at_ms, health, filler })) => {
            let held = Held {
                live,
                parking: Some(ready.parking),
                dirs: Some(dirs),
                record,
                started_at_ms,
                health,
                filler,
                following,
                _expedited: arriving.expedited.take(),
                since: Instant::now(),
            };
            *incoming.stage.lock().await = Stage::Held(Box::new(held));
            host.voice.say(report(&incoming.id, &received));
        }
        (result, _) => {
            let mut error = match result {
                Err(error) => ErrorBody::from_chain(&error),
                Ok(_) => ErrorBody::new("nothing was restored"),
            };
            let said = dirs.errors_of("restore.log");
            if !said.is_empty() {
                error.causes.push(said);
            }
            let phase = if dirs.work.join("restore.log").exists() { Phase::Freeze } else { Phase::Copy };
            drop(arriving);
            drop(ready.parking);
            // Held to the end: whoever wants the move gone, or a later one in its place, waits here until it is.
            let mut stage = incoming.stage.lock().await;
            *stage = Stage::Over;
            incoming.unmake(&host).await;
            drop(stage);
            // Told last: whoever hears it may look for leftovers.
            host.voice.say(FromAgent::MoveFailed { id: incoming.id.clone(), phase, error });
        }
    }
}

fn report(id: &MoveId, received: &Received) -> FromAgent {
    let fin = &received.fin;
    let transfer = received.since_freeze_ms - fin.freeze_ms - fin.dump_ms - fin.files_ms - received.restore_ms;
    FromAgent::MoveReady {
        id: id.clone(),
        parts: vec![
            (DowntimePart::Freeze, fin.freeze_ms),
            (DowntimePart::Dump, fin.dump_ms),
            (DowntimePart::Files, fin.files_ms),
            (DowntimePart::Transfer, transfer.max(0.0)),
            (DowntimePart::Restore, received.restore_ms),
        ],
        since_freeze_ms: received.since_freeze_ms,
        // What is late has been promised; if it does not come, there is no move to tell of.
        bytes_received: received.bytes + fin.late_bytes,
        memory_bytes: fin.memory_bytes + fin.late_bytes,
        file_bytes: fin.file_bytes,
        rounds: fin.rounds,
        slowed_to_percent: fin.slowed_to_percent,
        late_bytes: fin.late_bytes,
        paused_ms: fin.paused_ms,
        // An older source does not say why.
        stood_still: fin
            .stood_still
            .clone()
            .or_else(|| fin.shared.is_none().then(|| "its host does not say why".to_owned())),
    }
}

struct Arriving {
    host: Arc<Host>,
    incoming: Arc<Incoming>,
    image: Image,
    dirs: WorkDirs,
    page_server: Option<(Session, i32)>,
    /// What the source said of the container when it was frozen.
    detail: Option<Detail>,
    expedited: Option<Expedited>,
    restored: Option<Restored>,
}

/// Everything that a restore needs on this host.
pub(super) struct Site {
    launch: LaunchSpec,
    keeper: Keeper,
    events: mpsc::Receiver<Event>,
    /// Where memory has come in rounds.
    filler: Option<FillerProcess>,
}

struct Restored {
    live: Live,
    record: Record,
    started_at_ms: Option<u64>,
    health: Option<Health>,
    filler: Option<Arc<FillerProcess>>,
}

impl Landing for Arriving {
    fn expects(&mut self, move_id: &str, container: &str) -> Result<(), String> {
        let same = move_id == self.incoming.id.as_str() && container == self.incoming.spec.id.as_str();
        if same { Ok(()) } else { Err(format!("move {move_id} is not the one this host expects")) }
    }

    fn trees(&self) -> Vec<(String, PathBuf)> {
        let spec = &self.incoming.spec;
        let volumes = volumes_dir(&self.host, &spec.name);
        let mut trees = vec![(ROOT_TREE.to_owned(), container_dir(&self.host, &spec.id).join("upper"))];
        trees.extend(spec.volumes.iter().map(|v| (volume_tree(&v.volume), volumes.join(&v.volume))));
        trees
    }

    fn images_dir(&self) -> PathBuf {
        self.dirs.images.clone()
    }

    fn frozen(&mut self, detail: &serde_json::Value) {
        self.expedited = Some(self.host.expedite.begin());
        self.detail = serde_json::from_value(detail.clone()).ok();
    }

    fn files_complete(&mut self) {
        if let Some(detail) = &self.detail {
            self.begin_site(&detail.launch, true);
        }
    }

    async fn page_sink(&mut self) -> Result<UnixStream, PartError> {
        room::enough(&self.host, self.incoming.memory, room::Way::Streamed).map_err(|e| e.one_line())?;
        let criu = self.host.criu.clone().ok_or("this host has no usable CRIU")?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let passed = vec![PassedFd { number: PAGES_FD, fd: theirs.into() }];
        let directories = self.dirs.for_criu();
        let started = tokio::task::spawn_blocking(move || {
            let mut session = Session::start(&criu, passed, Ends::Undone)?;
            let options = PageServerOptions { directories, socket_fd: PAGES_FD };
            session.request_page_server(&options)?;
            match session.receive_within(Duration::from_millis(PAGES_TIMEOUT_MS))? {
                Message::PageServer { pid } => Ok((session, pid)),
                _ => Err(godwit_criu::SessionError::Ended),
            }
        });
        self.page_server = Some(started.await??);
        ours.set_nonblocking(true)?;
        Ok(UnixStream::from_std(ours)?)
    }

    async fn pages_stored(&mut self) -> Result<(), PartError> {
        let (session, pid) = self.page_server.take().ok_or("there is no page server")?;
        let ended = tokio::task::spawn_blocking(move || {
            session.request_wait(pid)?;
            session.receive_within(Duration::from_millis(PAGES_TIMEOUT_MS))
        });
        match ended.await?? {
            Message::Done { status: Some(0) | None } => Ok(()),
            other => {
                Err(format!("CRIU's page server ended badly: {other:?}; {}", self.dirs.errors_of("page-server.log"))
                    .into())
            }
        }
    }

    async fn restore(
        &mut self,
        fin: &Final,
        memory: Option<Arc<PageStore>>,
        late: Option<Late>,
    ) -> Result<(), PartError> {
        let spec = self.incoming.spec.clone();
        let mut laps = Laps::default();
        let detail: Detail = serde_json::from_value(fin.detail.clone())?;
        self.begin_site(&detail.launch, memory.is_some());
        let mut site = self.incoming.site.lock().await;
        // Taken out only when it is there: whoever stops this here leaves it to be unmade.
        let made = site.as_mut().ok_or("nothing was made ready")?.await;
        *site = None;
        drop(site);
        let Site { launch, keeper, mut events, filler } = made??;
        laps.lap("made ready");
        let criu = self.host.criu.as_ref().ok_or("this host has no usable CRIU")?;
        let filler = match (memory, filler) {
            (Some(store), Some(filler)) => {
                let filler = Arc::new(filler);
                let loading = Arc::clone(&filler);
                let container_dir = container_dir(&self.host, &spec.id);
                tokio::task::spawn_blocking(move || fill::load(&loading, store, late, &container_dir)).await??;
                Some(filler)
            }
            (Some(_), None) => return Err("memory has come, and nobody to fill it in".into()),
            (None, _) => None,
        };
        let restore = RestoreSpec {
            criu: criu.path.clone(),
            images_dir: self.dirs.images.clone(),
            work_dir: self.dirs.work.clone(),
            stdout_pipe: detail.stdout_pipe,
            stderr_pipe: detail.stderr_pipe,
            lazy_pages: filler.is_some(),
        };
        keeper.call(Request::Restore(restore), "restore").await?;
        let pid = match restore_event(&mut events).await? {
            Event::RestoreNetwork { pid } => pid,
            other => return Err(format!("the keeper said {other:?} where the network was due").into()),
        };
        godwit_hold::reach("restore").await;
        laps.lap("criu to network");
        task::attach_network(&self.host, &spec, pid).await?;
        // Frames out may leave from the first instant; frames in are parked.
        self.host.network.lock().await.plug(spec.id.as_str()).await?;
        laps.lap("network");
        keeper.call(Request::RestoreProceed { go_on: true }, "restore").await?;
        let pid = match restore_event(&mut events).await? {
            Event::Restored { pid } => pid,
            other => return Err(format!("the keeper said {other:?} where the restored processes were due").into()),
        };
        laps.lap("criu to restored");
        let cgroup = Cgroup::open(&launch.cgroup_path())?;
        if let Some(filler) = &filler {
            let uses = fill::shared_uses(&cgroup, fin.shared.as_deref().unwrap_or_default())?;
            let filler = Arc::clone(filler);
            let report = tokio::task::spawn_blocking(move || filler.restored(uses)).await??;
            tracing::debug!(?report, "shared memory");
        }
        laps.lap("shared memory");
        tracing::debug!(parts = %laps, "restored");
        let record = Record {
            spec,
            generation: self.incoming.generation,
            start_count: 0,
            image_digest: detail.image_digest,
            restarts: detail.restarts,
            since_revision: self.incoming.since_revision,
            incoming: Some(self.incoming.id.clone()),
            outgoing: None,
        };
        self.restored = Some(Restored {
            live: Live { keeper, events, cgroup, pid },
            record,
            started_at_ms: detail.started_at_ms,
            health: detail.health,
            filler,
        });
        Ok(())
    }
}

impl Arriving {
    /// Begins to make everything ready that CRIU's restore needs, once.
    fn begin_site(&self, launch: &LaunchSpec, carried: bool) {
        // Only the task that receives gets here, and unmaking comes after it.
        let Ok(mut site) = self.incoming.site.try_lock() else { return };
        if site.is_some() {
            return;
        }
        let spec = &self.incoming.spec;
        let dir = container_dir(&self.host, &spec.id);
        let launch = self.relocated(launch.clone(), dir.join("rootfs"), spec);
        let (host, image, id_base) = (Arc::clone(&self.host), self.image.clone(), spec.id_base);
        let work = self.dirs.work.clone();
        *site = Some(tokio::spawn(async move {
            let mut laps = Laps::default();
            task::mount_root(&dir, &image, id_base).await?;
            laps.lap("mount");
            let (keeper, events) = task::start_keeper(&host, &dir, &launch).await?;
            laps.lap("keeper");
            let criu = host.criu.as_ref().ok_or_else(|| ErrorBody::new("this host has no usable CRIU"))?;
            let prepare = Request::PrepareRestore { criu: criu.path.clone() };
            keeper.call(prepare, "prepare a restore").await.map_err(chain)?;
            laps.lap("criu");
            let filler = match carried {
                true => Some(fill::start(&host, dir.clone(), work).await?),
                false => None,
            };
            laps.lap("filler");
            tracing::debug!(parts = %laps, "ready for the restore");
            Ok(Site { launch, keeper, events, filler })
        }));
    }

    /// The source's own specification with this host's places in it: both must agree on every mount.
    fn relocated(&self, launch: LaunchSpec, rootfs: PathBuf, spec: &ContainerSpec) -> LaunchSpec {
        let volumes = volumes_dir(&self.host, &spec.name);
        let here = |mount: BindMount| match spec.volumes.iter().find(|v| v.target == mount.target) {
            Some(volume) => BindMount { source: volumes.join(&volume.volume), ..mount },
            None => mount,
        };
        LaunchSpec {
            rootfs,
            cgroup_parent: self.host.config.cgroup_parent.clone(),
            keeper_cgroup: Some(translate::keeper_cgroup(&self.host.config)),
            resources: translate::limits(&spec.resources),
            mounts: launch.mounts.into_iter().map(here).collect(),
            ..launch
        }
    }
}
