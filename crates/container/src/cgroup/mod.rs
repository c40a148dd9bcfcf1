//! A container's cgroup, version 1 (one directory per controller) or version 2 (one directory).
//!
//! Whoever knows `parent` and `id` can open, empty and delete the cgroup again, so nothing is
//! lost with the process that made it. Version 1 is used when the memory controller sits in a
//! version 1 hierarchy, whatever else is mounted.

mod detect;
mod v1;
mod v2;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

pub use detect::{Hierarchies, Version};

use crate::spec::Resources;

/// How long a freeze or a thaw may take.
pub const FREEZE_TIMEOUT_MS: u64 = 5_000;
/// How long killed processes may take to be gone.
pub const KILL_TIMEOUT_MS: u64 = 10_000;
/// How long the kernel may take to let go of an emptied cgroup.
pub const DELETE_TIMEOUT_MS: u64 = 5_000;
/// Levels of cgroups below a container's that are looked at.
const MAX_DEPTH: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no usable cgroup hierarchy is mounted: mount cgroup2 on /sys/fs/cgroup")]
    NotMounted,
    #[error("cannot read the list of mounts")]
    Mounts { source: io::Error },
    #[error("the kernel lacks the cgroup controller {controller}, needed for limits")]
    NoController { controller: &'static str },
    #[error("cgroup path {path:?} must be absolute, without . and ..")]
    BadPath { path: String },
    #[error("cannot {action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}: cannot read {text:?} as a number")]
    NotANumber { path: PathBuf, text: String },
    #[error(
        "memory limit of {limit_bytes} bytes is below what cgroup {path} cannot give back ({used_bytes} bytes in use)"
    )]
    LimitBelowUse { path: String, limit_bytes: u64, used_bytes: u64 },
    #[error(
        "cgroup {path} has processes of its own, so version 2 lets it limit nothing below: move them into a cgroup below it, or make containers elsewhere"
    )]
    InternalProcesses { path: PathBuf },
    #[error("cgroup {path} did not become {wanted} within {timeout_ms} ms")]
    Timeout { path: String, wanted: &'static str, timeout_ms: u64 },
}

type Result<T> = std::result::Result<T, CgroupError>;

/// Scheduling period; a quota is a share of it.
const CPU_PERIOD_USEC: u64 = 100_000;
/// Scheduling period of a container that is slowed down on purpose.
pub const SLOW_PERIOD_USEC: u64 = 5_000;
/// The kernel refuses a smaller quota, and a longer period (CFS bandwidth control, kernel documentation).
const MIN_QUOTA_USEC: u64 = 1_000;
const MAX_PERIOD_USEC: u64 = 1_000_000;

/// Processor time of all processes together in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuQuota {
    quota_usec: u64,
    period_usec: u64,
}

impl CpuQuota {
    /// For this many thousandths of a core; the period grows where the quota would be too small.
    fn of(millis: u64, period_usec: u64) -> Self {
        let period_usec = period_usec.max(MIN_QUOTA_USEC * 1000 / millis.max(1)).min(MAX_PERIOD_USEC);
        Self { quota_usec: (millis * period_usec / 1000).max(MIN_QUOTA_USEC), period_usec }
    }
}

/// What a cgroup has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Everything charged, page cache included.
    pub memory_bytes: u64,
    /// `memory_bytes` without file pages that have not been used lately.
    pub working_set_bytes: u64,
    pub memory_peak_bytes: u64,
    /// Processor time, user and system.
    pub cpu_usec: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    pub pids: u64,
}

/// One cgroup; holds names only, nothing happens on drop.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: String,
    hierarchies: Hierarchies,
}

impl Cgroup {
    /// Makes `parent/id` with the limits and returns it; one that exists is taken over.
    pub fn create(parent: &str, id: &str, resources: &Resources) -> Result<Cgroup> {
        let cgroup = Cgroup::ensure(&format!("{}/{id}", parent.trim_end_matches('/')))?;
        if let Version::V1 = cgroup.hierarchies.version() {
            v1::allow_standard_devices(&cgroup)?;
        }
        cgroup.set(resources)?;
        Ok(cgroup)
    }

    /// Makes `path` (and what is above it) without limits; one that exists is taken over.
    pub fn ensure(path: &str) -> Result<Cgroup> {
        let cgroup = Cgroup::open(path)?;
        match cgroup.hierarchies.version() {
            Version::V1 => v1::make(&cgroup)?,
            Version::V2 => v2::make(&cgroup)?,
        }
        Ok(cgroup)
    }

    /// Names the cgroup at `path`, whether it exists or not.
    pub fn open(path: &str) -> Result<Cgroup> {
        Cgroup::open_in(path, Hierarchies::detect()?)
    }

    /// Like [`Cgroup::open`], with known hierarchies.
    pub fn open_in(path: &str, hierarchies: Hierarchies) -> Result<Cgroup> {
        let plain =
            path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
        if !plain {
            return Err(CgroupError::BadPath { path: path.to_owned() });
        }
        Ok(Cgroup { path: path.to_owned(), hierarchies })
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn version(&self) -> Version {
        self.hierarchies.version()
    }

    /// The cgroup's directories, one for version 2, one per hierarchy for version 1.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.hierarchies.roots().into_iter().map(|root| join(&root, &self.path)).collect()
    }

    /// Where the freezer's files are: what CRIU is told to look at.
    pub fn freezer_directory(&self) -> Option<PathBuf> {
        self.hierarchies.controller("freezer").map(|root| join(&root, &self.path))
    }

    /// Names of the version 1 controllers in use; none for version 2.
    pub fn version_1_controllers(&self) -> Vec<String> {
        match &self.hierarchies {
            Hierarchies::V1(controllers) => controllers.keys().cloned().collect(),
            Hierarchies::V2(_) => Vec::new(),
        }
    }

    pub fn exists(&self) -> bool {
        self.directories().iter().any(|dir| dir.is_dir())
    }

    /// Moves a process and the children it will have into the cgroup.
    pub fn join(&self, pid: u32) -> Result<()> {
        for dir in self.directories() {
            write(&dir.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Sets the limits; `None` lifts one. Shrinking memory reclaims first and is refused, with
    /// the old limit kept, when what remains in use does not fit.
    pub fn set(&self, resources: &Resources) -> Result<()> {
        match self.version() {
            Version::V1 => v1::set(self, resources),
            Version::V2 => v2::set(self, resources),
        }
    }

    /// Sets the limit of processor time alone, in thousandths of a core; `None` lifts it.
    pub fn set_cpu(&self, millis: Option<u64>) -> Result<()> {
        self.set_quota(millis.map(|millis| CpuQuota::of(millis, CPU_PERIOD_USEC)))
    }

    /// As [`Cgroup::set_cpu`], for a limit far below what is used: in short periods, so that who waits for a process
    /// waits [`SLOW_PERIOD_USEC`] rather than a tenth of a second (longer only for less than a fifth of a core).
    pub fn slow_cpu(&self, millis: u64) -> Result<()> {
        self.set_quota(Some(CpuQuota::of(millis, SLOW_PERIOD_USEC)))
    }

    fn set_quota(&self, quota: Option<CpuQuota>) -> Result<()> {
        match self.version() {
            Version::V1 => v1::set_cpu(self, quota),
            Version::V2 => v2::set_cpu(self, quota),
        }
    }

    /// Stops all processes of the cgroup; returns when the kernel says that all have stopped.
    pub fn freeze(&self) -> Result<()> {
        match self.version() {
            Version::V1 => v1::freeze(self, Duration::from_millis(FREEZE_TIMEOUT_MS)),
            Version::V2 => v2::freeze(self, true),
        }
    }

    /// Lets the processes go on; returns when the kernel says so.
    pub fn thaw(&self) -> Result<()> {
        match self.version() {
            Version::V1 => v1::thaw(self),
            Version::V2 => v2::freeze(self, false),
        }
    }

    pub fn is_frozen(&self) -> Result<bool> {
        match self.version() {
            Version::V1 => v1::is_frozen(self),
            Version::V2 => v2::event(self, "frozen"),
        }
    }

    /// Process ids in the cgroup and below, as this process' pid namespace numbers them.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let Some(dir) = self.process_directory() else { return Ok(Vec::new()) };
        let mut pids = Vec::new();
        for dir in tree(&dir, MAX_DEPTH) {
            let path = dir.join("cgroup.procs");
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                // Deleted between listing and reading.
                Err(error) if gone(&error) => continue,
                Err(source) => return Err(CgroupError::Io { action: "read", path, source }),
            };
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    pub fn usage(&self) -> Result<Usage> {
        match self.version() {
            Version::V1 => v1::usage(self),
            Version::V2 => v2::usage(self),
        }
    }

    /// Kills everything in the cgroup, frozen or not, and waits until it is gone.
    pub fn kill_all(&self) -> Result<()> {
        self.kill_all_reaping(|| ())
    }

    /// As [`Cgroup::kill_all`], for the parent of some of the processes: `reap` is called whenever one has ended. The
    /// first process of a pid namespace ends only when all others of it are reaped (pid_namespaces(7)), also those that
    /// a parent outside has put there.
    pub fn kill_all_reaping(&self, mut reap: impl FnMut()) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(KILL_TIMEOUT_MS);
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            let pidfds: Vec<_> = pids
                .iter()
                .filter_map(|pid| Pid::from_raw(i32::try_from(*pid).ok()?))
                .filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
                .collect();
            if self.version() == Version::V1 || v2::kill(self).is_err() {
                // A process that forks faster than it is killed cannot do so while frozen. A
                // cgroup that does not freeze (a stopped tracee, for one) is killed as it is.
                let _ = v1_or_v2_freeze(self);
                for pidfd in &pidfds {
                    let _ = pidfd_send_signal(pidfd, Signal::KILL);
                }
                // Frozen processes of version 1 do not die before they are thawed.
                self.thaw()?;
            }
            if !all_ended(pidfds, deadline, &mut reap) || Instant::now() >= deadline {
                return Err(CgroupError::Timeout {
                    path: self.path.clone(),
                    wanted: "empty",
                    timeout_ms: KILL_TIMEOUT_MS,
                });
            }
        }
    }

    /// Removes the emptied cgroup and those below it; one that is not there is fine. Processes
    /// in it are the caller's to end first ([`Cgroup::kill_all`]).
    pub fn delete(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(DELETE_TIMEOUT_MS);
        if self.version() == Version::V2 {
            v2::wait_empty(self)?;
        }
        for dir in self.directories() {
            let mut below = tree(&dir, MAX_DEPTH);
            below.reverse();
            for dir in below {
                remove(&dir, &self.path, deadline)?;
            }
        }
        Ok(())
    }

    /// The directory that says which processes are in the cgroup.
    fn process_directory(&self) -> Option<PathBuf> {
        let root = self.hierarchies.controller("freezer").or_else(|| self.hierarchies.roots().into_iter().next())?;
        let dir = join(&root, &self.path);
        dir.is_dir().then_some(dir)
    }

    fn controller(&self, name: &'static str) -> Result<PathBuf> {
        let root = self.hierarchies.controller(name);
        root.map(|root| join(&root, &self.path)).ok_or(CgroupError::NoController { controller: name })
    }
}

fn v1_or_v2_freeze(cgroup: &Cgroup) -> Result<()> {
    match cgroup.version() {
        Version::V1 => v1::freeze(cgroup, Duration::from_millis(200)),
        Version::V2 => v2::freeze(cgroup, true),
    }
}

fn join(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// True when the cgroup went away between two looks at it.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

/// `dir` and the directories below it, parents first.
fn tree(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if !dir.is_dir() {
        return found;
    }
    found.push(dir.to_owned());
    if depth == 0 {
        return found;
    }
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(tree(&entry.path(), depth - 1));
        }
    }
    found
}

/// Version 1 tells nobody when a dying process has left its cgroup for good, so a busy directory
/// is tried again.
fn remove(dir: &Path, cgroup: &str, deadline: Instant) -> Result<()> {
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if gone(&error) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                if Instant::now() >= deadline {
                    return Err(CgroupError::Timeout {
                        path: cgroup.to_owned(),
                        wanted: "deletable",
                        timeout_ms: DELETE_TIMEOUT_MS,
                    });
                }
                pause(Duration::from_millis(1));
            }
            Err(source) => {
                return Err(CgroupError::Io { action: "remove", path: dir.to_owned(), source });
            }
        }
    }
}

/// One step of polling an interface that has no event to wait for.
fn pause(duration: Duration) {
    if let Ok(timeout) = Timespec::try_from(duration) {
        let _ = poll(&mut [], Some(&timeout));
    }
}

/// Waits until all of these processes have ended, and calls `reap` each time one has. `false`: not before the deadline.
fn all_ended(mut pidfds: Vec<OwnedFd>, deadline: Instant, reap: &mut impl FnMut()) -> bool {
    while !pidfds.is_empty() {
        let Ok(left) = Timespec::try_from(deadline.saturating_duration_since(Instant::now())) else { return false };
        let mut fds: Vec<PollFd<'_>> = pidfds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // None ready is the deadline; an error is nothing that another try would mend.
        if !matches!(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left))), Ok(ready) if ready > 0) {
            return false;
        }
        let ended: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ended = ended.into_iter();
        pidfds.retain(|_| !ended.next().unwrap_or(false));
        reap();
    }
    true
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|source| CgroupError::Io { action: "write", path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map(|text| text.trim_end().to_owned()).map_err(|source| CgroupError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

fn read_number(path: &Path) -> Result<u64> {
    let text = read(path)?;
    text.parse().map_err(|_| CgroupError::NotANumber { path: path.to_owned(), text })
}

/// The number after `key` in a file of `key number` lines; 0 when the key is absent.
fn read_key(path: &Path, key: &str) -> Result<u64> {
    let text = read(path)?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0))
}
