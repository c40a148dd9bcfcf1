//! The container on its way out, as the migration sees it: what to copy, freeze, dump and thaw.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use godwit_api::link::FromAgent;
use godwit_api::types::ErrorBody;
use godwit_container::keeper::state::read_state;
use godwit_container::{Cgroup, LaunchSpec};
use godwit_memory::{PageFilter, Pause, Round};
use godwit_migrate::source::{DumpMemory, FIXED_MS, Lane, PartError, Workload};
use godwit_model::container::{ContainerSpec, ContainerState};
use godwit_model::migration::{MoveOptions, Phase, Progress};
use godwit_network::{Mac, NetworkError};
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::task::JoinHandle;

use super::standstill::Standstill;
use super::{Held, Plan, WRITE_BUFFER_BYTES, connect, thaw};
use crate::host::{Host, locked};
use crate::laps::Laps;
use crate::movable;
use crate::moves::dump::{BegunDump, Dump, WorkDirs};
use crate::moves::{Detail, ROOT_TREE, volume_tree};
use crate::sharedfiles::{TreeMount, shared_writable};
use crate::task::{Shared, volumes_dir};

/// No container is slowed down below this, in thousandths of a core.
const LEAST_CPU_MILLIS: u64 = 10;

/// What nobody asked for: so many connections at the most.
const MOST_CONNECTIONS: u32 = 4;
/// What waits in the socket while pages are sent that somebody may wait for, in bytes.
const LATE_BUFFER_BYTES: usize = 256 << 10;

pub(super) struct Leaving {
    pub(super) host: Arc<Host>,
    pub(super) plan: Plan,
    pub(super) spec: ContainerSpec,
    pub(super) cgroup: Cgroup,
    pub(super) standstill: Arc<Standstill>,
    pub(super) pid: u32,
    pub(super) shared: Arc<Shared>,
    pub(super) dirs: Option<WorkDirs>,
    /// A criu that waits for the freeze, and what it will leave out.
    pub(super) begun: Option<(BegunDump, PageFilter)>,
    /// The container's port is being taken from the bridge.
    pub(super) unplugging: Option<JoinHandle<Result<(), NetworkError>>>,
    pub(super) held: Arc<std::sync::Mutex<Held>>,
    pub(super) connection: Arc<std::sync::Mutex<Option<OwnedFd>>>,
    pub(super) begun_at: Instant,
    /// Processor time used up to then, in microseconds.
    pub(super) cpu_usec: u64,
    /// What it used before it was slowed down, in thousandths of a core.
    pub(super) usual_cpu: Option<u64>,
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

    /// What CRIU wants to know of the frozen processes' mappings, so that it needs not read their smaps. It does where
    /// anything is in doubt.
    fn serve_flags(&self, last: &Round, filter: &PageFilter) -> Result<(), PartError> {
        let Some(flags) = &self.host.mapping_flags else { return Ok(()) };
        let begun = Instant::now();
        let mut served = 0;
        for process in &last.processes {
            match flags.smaps(process.pid) {
                Ok(text) => {
                    filter.serve_smaps(process.pid, &text)?;
                    served += 1;
                }
                Err(error) => {
                    let because = ErrorBody::from_chain(&error).one_line();
                    tracing::debug!(container = %self.spec.name, because, "CRIU will read smaps");
                }
            }
        }
        tracing::debug!(
            served,
            processes = last.processes.len(),
            ms = begun.elapsed().as_secs_f64() * 1e3,
            "flags told"
        );
        Ok(())
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

    fn pause(&self) -> Arc<dyn Pause> {
        Arc::clone(&self.standstill) as Arc<dyn Pause>
    }

    fn options(&self) -> MoveOptions {
        self.plan.options
    }

    fn connections(&self) -> u32 {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        // Both ends of a connection keep one busy, and the container needs some.
        self.plan.options.connections.unwrap_or((cores / 4).clamp(1, MOST_CONNECTIONS))
    }

    async fn lane(&mut self) -> Result<Lane, PartError> {
        let (stream, _) = connect(&self.host, &self.plan).await?;
        let (_, writer) = tokio::io::split(stream);
        Ok(Box::new(tokio::io::BufWriter::with_capacity(WRITE_BUFFER_BYTES, writer)))
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
        let (cgroup, standstill) = (self.cgroup.clone(), Arc::clone(&self.standstill));
        let (mac, vni) = (Mac(self.spec.network.mac.0), self.spec.network.vni);
        let mut laps = Laps::default();
        locked(&self.held).expedited = Some(self.host.expedite.begin());
        // Files that were written before the freeze shall not be on their way to the disk in the middle of it.
        let freeze = move || {
            standstill.end();
            cgroup.freeze()
        };
        tokio::task::spawn_blocking(freeze).await??;
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
                self.serve_flags(&last, &filter)?;
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
        let criu = Pid::from_raw(begun.pid().cast_signed()).ok_or("criu has no process")?;
        let criu = pidfd_open(criu, PidfdFlags::empty())?;
        locked(&self.held).dumping(criu)?;
        let cgroup = self.cgroup.clone();
        let dump = move || {
            begun.finish().inspect_err(|_| {
                let connections = cgroup.pids().map(|pids| crate::moves::repair::end(&pids)).unwrap_or_default();
                if connections > 0 {
                    tracing::warn!(connections, "CRIU ended in the middle of a dump: connections may be broken");
                }
            })
        };
        let dumped = tokio::task::spawn_blocking(dump).await;
        locked(&self.held).criu = None;
        dumped??;
        if let Some(unplugging) = self.unplugging.take() {
            unplugging.await??;
        }
        Ok(self.dirs.clone().ok_or("the move has no working directory")?.images)
    }

    fn still_needed(&mut self) {
        locked(&self.held).needed = true;
        let shorter = |fd: &OwnedFd| set_socket_send_buffer_size(fd, LATE_BUFFER_BYTES);
        if let Some(Err(error)) = locked(&self.connection).as_ref().map(shorter) {
            tracing::debug!(%error, "pages that are waited for queue behind others");
        }
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
