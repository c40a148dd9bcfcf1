//! Giving a container away: the agent's part of the source's side. Paused on success, resumed on failure.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::link::FromAgent;
use godwit_api::tls;
use godwit_api::types::ErrorBody;
use godwit_container::keeper::state::read_state;
use godwit_container::{Cgroup, LaunchSpec};
use godwit_memory::PageFilter;
use godwit_migrate::source::{DumpMemory, FIXED_MS, PartError, Workload};
use godwit_migrate::{SendError, send};
use godwit_model::container::{ContainerSpec, ContainerState};
use godwit_model::migration::{MoveOptions, Phase, Progress};
use godwit_model::{HostName, MoveId};
use godwit_network::{Mac, NetworkError};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::dump::{BegunDump, Dump, WorkDirs};
use super::{Detail, ROOT_TREE, volume_tree};
use crate::expedite::Expedited;
use crate::host::{Host, locked};
use crate::laps::Laps;
use crate::movable;
use crate::sharedfiles::{TreeMount, shared_writable};
use crate::task::{Closed, Live, Shared, volumes_dir};

/// Connecting and handshake, in milliseconds.
const CONNECT_TIMEOUT_MS: u64 = 5_000;
/// No container is slowed down below this, in thousandths of a core.
const LEAST_CPU_MILLIS: u64 = 10;
/// A cancelled sender has let go of the container within this time, in milliseconds.
const CANCEL_TIMEOUT_MS: u64 = 30_000;

/// What the controller said of the move.
#[derive(Debug, Clone)]
pub struct Plan {
    pub id: MoveId,
    pub to: HostName,
    pub address: SocketAddr,
    pub to_tunnel: Ipv4Addr,
    pub options: MoveOptions,
    /// What moves like this stood still for besides sending, in milliseconds; `None`: none has been seen.
    pub fixed_ms: Option<f64>,
    /// Revision of the store at which the move began.
    pub revision: u64,
}

/// A container on its way out, as its task holds it.
pub struct Outgoing {
    pub id: MoveId,
    worker: Option<JoinHandle<Result<(), ()>>>,
    /// Cutting the connection is how a sender is stopped: it then undoes what it did, as for any broken wire.
    connection: Arc<std::sync::Mutex<Option<OwnedFd>>>,
    held: Arc<std::sync::Mutex<Held>>,
}

/// What a container that stands still needs of its host, from around the freeze to the verdict.
#[derive(Default)]
struct Held {
    expedited: Option<Expedited>,
    /// Nobody runs commands in it.
    closed: Option<Closed>,
    /// The container has ended meanwhile, like this: the better reason for what fails then.
    ended: Option<&'static str>,
}

impl Outgoing {
    /// Begins to send in the background.
    pub fn start(host: &Arc<Host>, plan: Plan, spec: &ContainerSpec, live: &Live, shared: Arc<Shared>) -> Self {
        let connection = Arc::new(std::sync::Mutex::new(None));
        let held = Arc::default();
        let id = plan.id.clone();
        let leaving = Leaving {
            host: Arc::clone(host),
            plan,
            spec: spec.clone(),
            cgroup: live.cgroup.clone(),
            pid: live.pid,
            shared,
            dirs: None,
            begun: None,
            unplugging: None,
            held: Arc::clone(&held),
            begun_at: Instant::now(),
            cpu_usec: live.cgroup.usage().map(|u| u.cpu_usec).unwrap_or_default(),
            usual_cpu: None,
        };
        let worker = tokio::spawn(run(leaving, Arc::clone(&connection)));
        Self { id, worker: Some(worker), connection, held }
    }

    /// A move whose sender died with an earlier agent; only the store's verdict is missing.
    pub fn orphan(id: MoveId) -> Self {
        Self { id, worker: None, connection: Arc::default(), held: Arc::default() }
    }

    /// The end of the sending part: given away, or failed and running on. Never, once it has been told.
    pub async fn ended(this: &mut Option<Self>) -> Result<(), ()> {
        match this.as_mut().and_then(|o| o.worker.as_mut()) {
            Some(worker) => {
                let result = worker.await;
                if let Some(outgoing) = this {
                    outgoing.worker = None;
                }
                result.unwrap_or(Err(()))
            }
            None => std::future::pending().await,
        }
    }

    /// Stops a sender that is still at work and waits until it has undone its part.
    pub async fn cancel(&mut self) {
        self.hang_up();
        if let Some(worker) = self.worker.take()
            && timeout(Duration::from_millis(CANCEL_TIMEOUT_MS), worker).await.is_err()
        {
            tracing::error!(id = %self.id, "a cancelled move has not let go of its container yet");
        }
    }

    /// The container has ended here. `false`: not everything was given away, so the move has failed. `true`: the
    /// destination may have all of it, and only the store's word tells where it goes on.
    pub async fn container_ended(&mut self, why: &'static str) -> bool {
        locked(&self.held).ended = Some(why);
        self.hang_up();
        let Some(worker) = self.worker.take() else { return true };
        match timeout(Duration::from_millis(CANCEL_TIMEOUT_MS), worker).await {
            Ok(Ok(Err(()))) => false,
            // A sender that died, or does not let go: nobody knows what it has sent.
            Ok(Err(_)) | Err(_) | Ok(Ok(Ok(()))) => true,
        }
    }

    fn hang_up(&self) {
        if let Some(fd) = locked(&self.connection).as_ref() {
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        }
    }
}

async fn run(mut leaving: Leaving, connection: Arc<std::sync::Mutex<Option<OwnedFd>>>) -> Result<(), ()> {
    let host = Arc::clone(&leaving.host);
    let id = leaving.plan.id.clone();
    let result = give(&mut leaving, &connection).await;
    // A criu that still waits for the freeze has the directory open in which it works.
    tokio::task::block_in_place(|| leaving.begun = None);
    if let Some(dirs) = leaving.dirs.take()
        && let Err(error) = dirs.remove()
    {
        tracing::error!(%error, "a move's working files are left behind");
    }
    locked(&connection).take();
    match result {
        Ok(()) => Ok(()),
        Err((phase, error)) => {
            let error = locked(&leaving.held).ended.map_or(error, ErrorBody::new);
            tracing::warn!(container = %leaving.spec.name, %phase, error = error.one_line(), "not moved; it runs on");
            host.voice.say(FromAgent::MoveFailed { id, phase, error });
            Err(())
        }
    }
}

async fn give(leaving: &mut Leaving, connection: &std::sync::Mutex<Option<OwnedFd>>) -> Result<(), (Phase, ErrorBody)> {
    let check = |e: ErrorBody| (Phase::Check, e);
    let prepare = |text: String| (Phase::Prepare, ErrorBody::new(text));
    let host = Arc::clone(&leaving.host);
    host.criu.as_ref().ok_or_else(|| check(ErrorBody::new("this host has no usable CRIU")))?;
    let container_dir = leaving.shared.dir.clone();
    let settled = tokio::task::spawn_blocking(move || super::fill::settled(&container_dir)).await;
    settled.map_err(|e| prepare(e.to_string()))?.map_err(check)?;
    let dirs = WorkDirs::make(&host, &leaving.plan.id)
        .map_err(|e| prepare(format!("the move's working directory could not be made: {e}")))?;
    leaving.dirs = Some(dirs);
    let net = &leaving.spec.network;
    let network = host.network.lock().await;
    let ready = network.prepare_divert(Mac(net.mac.0), net.vni).await;
    drop(network);
    ready.map_err(|e| (Phase::Prepare, ErrorBody::from_chain(&e)))?;
    let (address, to) = (leaving.plan.address, leaving.plan.to.clone());
    let connect = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let handle = tcp.as_fd().try_clone_to_owned()?;
        let connector = TlsConnector::from(Arc::clone(&host.client_tls));
        Ok::<_, std::io::Error>((connector.connect(tls::host_server_name(&to), tcp).await?, handle))
    };
    let (stream, handle) = timeout(Duration::from_millis(CONNECT_TIMEOUT_MS), connect)
        .await
        .map_err(|_| prepare(format!("{to} ({address}) does not answer")))?
        .map_err(|e| prepare(format!("{to} ({address}) could not be reached: {e}")))?;
    *locked(connection) = Some(handle);
    let (reader, writer) = tokio::io::split(stream);
    let writer = tokio::io::BufWriter::with_capacity(256 << 10, writer);
    let id = leaving.plan.id.to_string();
    let container = leaving.spec.id.to_string();
    match send(reader, writer, &id, &container, leaving).await {
        Ok(sent) => {
            tracing::info!(container = %leaving.spec.name, to = %to, bytes = sent.bytes, "given away; waits for the verdict");
            Ok(())
        }
        Err(error) => Err((error.phase(), describe(&error))),
    }
}

fn describe(error: &SendError) -> ErrorBody {
    ErrorBody::from_chain(error)
}

struct Leaving {
    host: Arc<Host>,
    plan: Plan,
    spec: ContainerSpec,
    cgroup: Cgroup,
    pid: u32,
    shared: Arc<Shared>,
    dirs: Option<WorkDirs>,
    /// A criu that waits for the freeze, and what it will leave out.
    begun: Option<(BegunDump, PageFilter)>,
    /// The container's port is being taken from the bridge.
    unplugging: Option<JoinHandle<Result<(), NetworkError>>>,
    held: Arc<std::sync::Mutex<Held>>,
    begun_at: Instant,
    /// Processor time used up to then, in microseconds.
    cpu_usec: u64,
    /// What it used before it was slowed down, in thousandths of a core.
    usual_cpu: Option<u64>,
}

impl Leaving {
    /// Processor time it has used since the move began, in thousandths of a core.
    fn cpu_millis(&self) -> Result<u64, PartError> {
        let used = self.cgroup.usage()?.cpu_usec.saturating_sub(self.cpu_usec);
        Ok((used as f64 / self.begun_at.elapsed().as_secs_f64() / 1e3) as u64)
    }

    /// Starts criu; where memory does not go through it, all that can be done before the freeze is.
    async fn begin_dump(
        &self,
        pages: Option<OwnedFd>,
        filter: Option<PageFilter>,
    ) -> Result<(BegunDump, Option<PageFilter>), PartError> {
        let dirs = self.dirs.clone().ok_or("the move has no working directory")?;
        let criu = self.host.criu.clone().ok_or("this host has no usable CRIU")?;
        let launch = LaunchSpec::load(&self.shared.dir)?;
        let (container_dir, cgroup, pid) = (self.shared.dir.clone(), self.cgroup.clone(), self.pid);
        let begin = move || {
            let what =
                Dump { criu: &criu, dirs: &dirs, container_dir: &container_dir, launch: &launch, cgroup: &cgroup, pid };
            what.begin(pages, filter.as_ref()).map(|begun| (begun, filter))
        };
        Ok(tokio::task::spawn_blocking(begin).await??)
    }

    fn show(&self, state: ContainerState) {
        locked(&self.shared.status).state = state;
        self.host.changed.notify_one();
    }
}

impl Workload for Leaving {
    fn trees(&self) -> Vec<(String, PathBuf)> {
        let volumes = volumes_dir(&self.host, &self.spec.name);
        let mut trees = vec![(ROOT_TREE.to_owned(), self.shared.dir.join("upper"))];
        trees.extend(self.spec.volumes.iter().map(|v| (volume_tree(&v.volume), volumes.join(&v.volume))));
        trees
    }

    fn progress(&mut self, phase: Phase, progress: Progress) {
        self.host.voice.say(FromAgent::MoveProgress { id: self.plan.id.clone(), phase, progress });
    }

    fn pids(&self) -> Result<Vec<i32>, PartError> {
        Ok(self.cgroup.pids()?.into_iter().map(u32::cast_signed).collect())
    }

    fn options(&self) -> MoveOptions {
        self.plan.options
    }

    fn fixed_ms(&self) -> f64 {
        self.plan.fixed_ms.unwrap_or(FIXED_MS)
    }

    fn slow_down(&mut self, percent: u32) -> Result<bool, PartError> {
        let usual = match self.usual_cpu {
            Some(usual) => usual,
            None => self.cpu_millis()?,
        };
        self.usual_cpu = Some(usual);
        let millis = usual * u64::from(percent) / 100;
        if millis < LEAST_CPU_MILLIS {
            return Ok(false);
        }
        self.shared.brake.slow(&self.cgroup, millis)?;
        tracing::info!(container = %self.spec.name, usual, millis, "slowed down for its move");
        Ok(true)
    }

    fn full_speed(&mut self) {
        if self.shared.brake.is_slowed()
            && let Err(error) = self.shared.brake.release(&self.cgroup)
        {
            tracing::error!(container = %self.spec.name, error = ErrorBody::from_chain(&error).one_line(), "it is still slowed down");
        }
    }

    fn hidden_writes(&self) -> Option<String> {
        match self.cgroup.pids() {
            Ok(pids) => movable::direct_io(&pids),
            Err(error) => Some(format!("its processes cannot be listed: {error}")),
        }
    }

    async fn before_freeze(&mut self, carried: bool) -> Result<serde_json::Value, PartError> {
        let closed = self.shared.gate.close().await.ok_or("a health check that was killed does not end")?;
        if let Some(open) = movable::by_sessions(self.shared.exec_sessions()) {
            return Err(open.into());
        }
        locked(&self.held).closed = Some(closed);
        let launch = LaunchSpec::load(&self.shared.dir)?;
        let state = read_state(&self.shared.dir)?.ok_or("the keeper has left no state")?;
        let status = locked(&self.shared.status).clone();
        let detail = Detail {
            launch,
            stdout_pipe: state.stdout_pipe,
            stderr_pipe: state.stderr_pipe,
            restarts: status.restarts,
            started_at_ms: status.started_at_ms,
            health: status.health,
            image_digest: status.image_digest,
        };
        if carried {
            let dirs = self.dirs.as_ref().ok_or("the move has no working directory")?;
            let filter = PageFilter::install(&dirs.work)?;
            let (begun, filter) = self.begin_dump(None, Some(filter)).await?;
            self.begun = filter.map(|filter| (begun, filter));
        }
        Ok(serde_json::to_value(detail)?)
    }

    async fn freeze(&mut self) -> Result<Vec<(String, Vec<u8>)>, PartError> {
        let (cgroup, mac, vni) = (self.cgroup.clone(), Mac(self.spec.network.mac.0), self.spec.network.vni);
        let mut laps = Laps::default();
        locked(&self.held).expedited = Some(self.host.expedite.begin());
        // Files that were written before the freeze shall not be on their way to the disk in the middle of it.
        tokio::task::spawn_blocking(move || cgroup.freeze()).await??;
        self.show(ContainerState::Frozen);
        laps.lap("freezer");
        // Frames switch first, the port is muted after: a reply on its way out still leaves. And muted before the dump:
        // what a frozen container's TCP sends after its sockets were copied, its peer has and the copy does not know.
        let network = self.host.network.lock().await;
        locked(&self.host.redirects).insert(mac, (vni, self.plan.to_tunnel));
        network.divert(mac, vni, self.plan.to_tunnel).await?;
        laps.lap("divert");
        network.mute(self.spec.id.as_str()).await?;
        drop(network);
        laps.lap("mute");
        // The dump need not wait for this; whoever gives the container away does.
        let (host, id) = (Arc::clone(&self.host), self.spec.id.clone());
        self.unplugging = Some(tokio::spawn(async move { host.network.lock().await.unplug(id.as_str()).await }));
        tracing::debug!(parts = %laps, "frozen");
        self.host.voice.say(FromAgent::MoveFrozen { id: self.plan.id.clone() });
        godwit_hold::reach("freeze").await;
        let mut trees = vec![TreeMount { target: "/".into(), tree: ROOT_TREE.to_owned() }];
        trees.extend(
            self.spec
                .volumes
                .iter()
                .map(|v| TreeMount { target: v.target.clone().into(), tree: volume_tree(&v.volume) }),
        );
        Ok(shared_writable(&self.cgroup.pids()?, &trees))
    }

    async fn dump(&mut self, memory: DumpMemory) -> Result<PathBuf, PartError> {
        let begun = match memory {
            DumpMemory::Carried(last) => {
                let (begun, filter) = self.begun.take().ok_or("criu has not been started")?;
                filter.leave_out(&last)?;
                begun
            }
            DumpMemory::Stream(pages) => {
                // It was to leave memory out, and has not begun.
                tokio::task::block_in_place(|| self.begun = None);
                let pages = pages.into_std()?;
                pages.set_nonblocking(false)?;
                self.begin_dump(Some(pages.into()), None).await?.0
            }
        };
        let cgroup = self.cgroup.clone();
        let dump = move || {
            begun.finish().inspect_err(|_| {
                let connections = cgroup.pids().map(|pids| super::repair::end(&pids)).unwrap_or_default();
                if connections > 0 {
                    tracing::warn!(connections, "CRIU ended in the middle of a dump: connections may be broken");
                }
            })
        };
        tokio::task::spawn_blocking(dump).await??;
        if let Some(unplugging) = self.unplugging.take() {
            unplugging.await??;
        }
        Ok(self.dirs.clone().ok_or("the move has no working directory")?.images)
    }

    async fn thaw(&mut self) {
        locked(&self.held).expedited = None;
        if let Some(unplugging) = self.unplugging.take()
            && let Err(error) = unplugging.await
        {
            tracing::error!(%error, "the container's port was not unplugged");
        }
        match thaw(&self.host, &self.spec, &self.cgroup).await {
            Ok(()) => self.show(ContainerState::Running),
            Err(error) => tracing::error!(container = %self.spec.name, error = error.one_line(), "could not be thawed"),
        }
        locked(&self.held).closed = None;
    }
}

/// The container goes on here: wire first, so that its first word is heard.
pub async fn thaw(host: &Arc<Host>, spec: &ContainerSpec, cgroup: &Cgroup) -> Result<(), ErrorBody> {
    locked(&host.redirects).remove(&Mac(spec.network.mac.0));
    let network = host.network.lock().await;
    let plugged = network.plug(spec.id.as_str()).await;
    drop(network);
    let cgroup = cgroup.clone();
    let thawed = tokio::task::spawn_blocking(move || cgroup.thaw().map_err(|e| ErrorBody::from_chain(&e)));
    // Both are tried whatever becomes of the other.
    let thawed = thawed.await.map_err(|e| ErrorBody::new(e.to_string()))?;
    plugged.map_err(|e| ErrorBody::from_chain(&e))?;
    thawed
}
