//! Memory of a container that has arrived, filled in while it runs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::types::ErrorBody;
use godwit_container::Cgroup;
use godwit_memory::{FillerProcess, ObjectId, ObjectKind, PageRange, SharedUse};
use godwit_migrate::wire::{SharedKind, SharedPlace};
use godwit_model::ContainerName;
use godwit_model::event::EventKind;

use crate::host::Host;
use crate::translate;

/// All memory is in its place within this time, in seconds: it is on this host already.
const FILL_TIMEOUT_S: u64 = 600;

/// The source's places of shared memory as this host's processes have them.
pub fn shared_uses(cgroup: &Cgroup, places: &[SharedPlace]) -> Result<Vec<SharedUse>, ErrorBody> {
    let pids = cgroup.pids().map_err(|e| ErrorBody::from_chain(&e))?;
    let here: HashMap<i32, i32> =
        pids.into_iter().filter_map(|pid| Some((inner_pid(pid)?, pid.cast_signed()))).collect();
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

/// A process's number in its own pid namespace.
fn inner_pid(pid: u32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("NSpid:"))?.split_ascii_whitespace().last()?.parse().ok()
}

/// Starts the process that fills the memory of one arriving container, beside the keepers: like them it outlives us.
pub async fn start(host: &Arc<Host>, work: PathBuf) -> Result<FillerProcess, ErrorBody> {
    let (binary, cgroup) = (host.config.binary.clone(), translate::keeper_cgroup(&host.config));
    let start = move || {
        let mut command = Command::new(binary);
        command.arg("filler").arg("--work").arg(&work);
        let filler = FillerProcess::start(command, &work).map_err(|e| ErrorBody::from_chain(&e))?;
        let joined = Cgroup::open(&cgroup).and_then(|cgroup| cgroup.join(filler.pid().unsigned_abs()));
        joined.map_err(|e| ErrorBody::from_chain(&e))?;
        Ok(filler)
    };
    tokio::task::spawn_blocking(start).await.map_err(|e| ErrorBody::new(e.to_string()))?
}

/// Watches the filling to its end. A container that would have to go on without some of its memory is killed: its task
/// then does what its restart policy says.
pub fn follow(host: &Arc<Host>, name: &ContainerName, filler: Arc<FillerProcess>, cgroup: Cgroup) {
    let (host, name) = (Arc::clone(host), name.clone());
    tokio::task::spawn_blocking(move || {
        let why = match filler.wait(Duration::from_secs(FILL_TIMEOUT_S)) {
            Ok(Some(report)) => {
                tracing::info!(container = %name, ?report, "all memory is in its place");
                return;
            }
            Ok(None) => format!("not all of its memory was in its place after {FILL_TIMEOUT_S} s"),
            Err(error) => ErrorBody::from_chain(&error).one_line(),
        };
        host.event(EventKind::MoveFailed, Some(&name), format!("{name} is ended and started anew: {why}"));
        if let Err(error) = cgroup.kill_all() {
            tracing::error!(container = %name, error = ErrorBody::from_chain(&error).one_line(), "could not be ended");
        }
    });
}
