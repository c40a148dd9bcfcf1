//! Memory of a container that has arrived, filled in while it runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::Request;
use godwit_container::{Cgroup, start_time_ticks};
use godwit_memory::PageStore;
use godwit_memory::{FillerProcess, Late, ObjectId, ObjectKind, PageRange, SharedUse, inner_pid};
use godwit_migrate::Following;
use godwit_migrate::wire::{SharedKind, SharedPlace};
use godwit_model::ContainerName;
use godwit_model::event::EventKind;
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::keeper::Keeper;
use crate::translate;

/// All memory is in its place within this time, in seconds: it is on this host already.
const FILL_TIMEOUT_S: u64 = 600;

/// A move waits this long for the one before to be filled in, in seconds.
const SETTLE_TIMEOUT_S: u64 = 60;
/// In the container's directory: who fills its memory.
const MARK: &str = "filler.json";

#[derive(Serialize, Deserialize)]
struct Mark {
    pid: u32,
    start_ticks: u64,
    /// Some of the memory is still on its way, to the agent that wrote this.
    #[serde(default)]
    late: bool,
}

/// What becomes of the memory of a container that runs already.
#[derive(Default)]
pub struct Filling {
    /// `None`: started by an earlier agent.
    pub filler: Option<Arc<FillerProcess>>,
    /// What comes from the source meanwhile.
    pub following: Option<Following>,
}

/// The source's places of shared memory as this host's processes have them.
pub fn shared_uses(cgroup: &Cgroup, places: &[SharedPlace]) -> Result<Vec<SharedUse>, ErrorBody> {
    let pids = cgroup.pids().map_err(|e| ErrorBody::from_chain(&e))?;
    let here: HashMap<i32, i32> =
        pids.into_iter().map(u32::cast_signed).filter_map(|pid| Some((inner_pid(pid)?, pid))).collect();
    let here = |place: &SharedPlace| {
        let odd = |what: &str| ErrorBody::new(format!("shared memory of process {}: {what}", place.inner_pid));
        let pid = here.get(&place.inner_pid).ok_or_else(|| odd("it was not restored"))?;
        let range = PageRange::new(place.start, place.end).ok_or_else(|| odd("an empty mapping"))?;
        let kind = match place.kind {
            SharedKind::Anonymous => ObjectKind::Anonymous,
            SharedKind::Memfd => ObjectKind::Memfd,
            SharedKind::SysV => ObjectKind::SysV,
            SharedKind::File => ObjectKind::File,
        };
        let object = ObjectId { device: place.device, inode: place.inode, sysv: kind == ObjectKind::SysV };
        Ok(SharedUse { inner_pid: place.inner_pid, pid: *pid, range, object, kind, offset: place.offset })
    };
    places.iter().map(here).collect()
}

/// Starts the process that fills the memory of one arriving container, beside the keepers: like them it outlives us.
/// `container_dir` remembers it, for [`settled`].
pub async fn start(host: &Arc<Host>, container_dir: PathBuf, work: PathBuf) -> Result<FillerProcess, ErrorBody> {
    let (binary, cgroup) = (host.config.binary.clone(), translate::keeper_cgroup(&host.config));
    let start = move || {
        let mut command = Command::new(binary);
        command.arg("filler").arg("--work").arg(&work);
        let filler = FillerProcess::start(command, &work).map_err(|e| ErrorBody::from_chain(&e))?;
        let pid = filler.pid().unsigned_abs();
        let joined = Cgroup::open(&cgroup).and_then(|cgroup| cgroup.join(pid));
        joined.map_err(|e| ErrorBody::from_chain(&e))?;
        let mark = start_time_ticks(pid).and_then(|start_ticks| {
            std::fs::write(container_dir.join(MARK), serde_json::to_vec(&Mark { pid, start_ticks, late: false })?)
        });
        mark.map_err(|e| ErrorBody::new(format!("the filler cannot be noted down: {e}")))?;
        Ok(filler)
    };
    tokio::task::spawn_blocking(start).await.map_err(|e| ErrorBody::new(e.to_string()))?
}

/// Gives the filler what has arrived, and says what has not. Blocks.
pub fn load(
    filler: &FillerProcess,
    store: Arc<PageStore>,
    late: Option<Late>,
    container_dir: &Path,
) -> Result<(), ErrorBody> {
    if let Some(late) = late {
        mark_late(container_dir, true)?;
        filler.expect(late).map_err(|e| ErrorBody::from_chain(&e))?;
    }
    filler.load(store).map_err(|e| ErrorBody::from_chain(&e))
}

/// Notes down whether memory is still on its way: an agent after this one cannot take it, and must know.
fn mark_late(container_dir: &Path, late: bool) -> Result<(), ErrorBody> {
    let path = container_dir.join(MARK);
    let changed = read_mark(&path)?.map(|mark| serde_json::to_vec(&Mark { late, ..mark }));
    let written = changed.map(|text| {
        let new = path.with_extension("new");
        std::fs::write(&new, text?)?;
        std::fs::rename(new, &path)
    });
    written.transpose().map_err(wrong(&path)).map(|_| ())
}

fn wrong(path: &Path) -> impl Fn(std::io::Error) -> ErrorBody + '_ {
    move |e| ErrorBody::new(format!("{}: {e}", path.display()))
}

fn read_mark(path: &Path) -> Result<Option<Mark>, ErrorBody> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| wrong(path)(e.into())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(wrong(path)(e)),
    }
}

/// Waits until the memory of a container that arrived here is complete. Before that it must not be given away: what is
/// not filled in yet looks like memory that was never used. Blocks.
pub fn settled(container_dir: &Path) -> Result<(), ErrorBody> {
    if ended_within(container_dir, SETTLE_TIMEOUT_S)? {
        return Ok(());
    }
    let what = "its memory is still being filled in after its last move";
    Err(ErrorBody::new(format!("{what}, for more than {SETTLE_TIMEOUT_S} s; try again later")))
}

/// Waits for the end of whoever fills a container's memory; `false` if that does not come within `limit_s` seconds.
fn ended_within(container_dir: &Path, limit_s: u64) -> Result<bool, ErrorBody> {
    let path = container_dir.join(MARK);
    let Some(mark) = read_mark(&path)? else { return Ok(true) };
    let wrong = wrong(&path);
    let pid = rustix::process::Pid::from_raw(mark.pid.cast_signed());
    let pidfd = pid.and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
    // Its number may be another's by now.
    if let Some(pidfd) = pidfd
        && start_time_ticks(mark.pid).is_ok_and(|ticks| ticks == mark.start_ticks)
    {
        let limit = rustix::time::Timespec { tv_sec: limit_s.cast_signed(), tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&limit)));
        if ended.map_err(|e| wrong(e.into()))? == 0 {
            return Ok(false);
        }
    }
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(wrong(e)),
        _ => Ok(true),
    }
}

/// Watches the filling to its end; of what an earlier agent started only the end is seen. A
/// container that would have to go on without some of its memory is killed: its task then does what its restart policy
/// says.
pub fn follow(
    host: &Arc<Host>,
    name: &ContainerName,
    container_dir: PathBuf,
    Filling { filler, following }: Filling,
    keeper: Keeper,
    cgroup: Cgroup,
) {
    let (host, name) = (Arc::clone(host), name.clone());
    if let Some(mut following) = following {
        let (container_dir, name) = (container_dir.clone(), name.clone());
        tokio::spawn(async move {
            // The filler says that something is missing, too.
            match following
                .end()
                .await
                .map_err(|e| ErrorBody::from_chain(&e))
                .and_then(|()| mark_late(&container_dir, false))
            {
                Ok(()) => tracing::info!(container = %name, "all memory has come"),
                Err(error) => tracing::error!(container = %name, error = error.one_line(), "memory has not come"),
            }
        });
    }
    tokio::task::spawn_blocking(move || {
        let ended = match filler {
            None if read_mark(&container_dir.join(MARK)).is_ok_and(|mark| mark.is_some_and(|mark| mark.late)) => {
                Err(ErrorBody::new("some of its memory was still on its way when the agent ended"))
            }
            Some(filler) => match filler.wait(Duration::from_secs(FILL_TIMEOUT_S)) {
                Ok(Some(report)) => {
                    tracing::info!(container = %name, ?report, "all memory is in its place");
                    Ok(true)
                }
                Ok(None) => Ok(false),
                Err(error) => Err(ErrorBody::from_chain(&error)),
            },
            None => ended_within(&container_dir, FILL_TIMEOUT_S),
        };
        // The move's buffers were freed long ago.
        godwit_memory::give_back_freed();
        let why = match ended {
            Ok(true) => return,
            Ok(false) => format!("not all of its memory was in its place after {FILL_TIMEOUT_S} s"),
            Err(error) => error.one_line(),
        };
        host.event(EventKind::MoveFailed, Some(&name), format!("{name} is ended and started anew: {why}"));
        // A CRIU that has not let go of the processes yet would keep them.
        let off = keeper.call(Request::RestoreProceed { go_on: false }, "call off a restore");
        let _ = tokio::runtime::Handle::current().block_on(off);
        if let Err(error) = cgroup.kill_all() {
            tracing::error!(container = %name, error = ErrorBody::from_chain(&error).one_line(), "could not be ended");
        }
    });
}
