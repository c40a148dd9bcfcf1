//! Which pages of a set of processes were written, from outside, while they run.
//!
//! Private memory is followed by the processes' page tables: asynchronous write protection of userfaultfd
//! (`UFFD_FEATURE_WP_ASYNC`) and ioctl(PAGEMAP_SCAN), which tells written pages and protects them again in one step
//! (Documentation/admin-guide/mm/pagemap.rst and userfaultfd.rst, kernel ≥ 6.7); where the kernel lacks these, by
//! soft-dirty bits, see [`soft`](Pause). Shared memory is followed by object, see [`object`](ObjectId).
//!
//! Nothing is lost, because every doubt counts as "written": memory that is new, or that cannot be tracked, is told
//! whole in every round. What a round tells must be read and sent after it, in the order of rounds; a page that changes
//! while it is read is told again. The last round is made while all processes stand still.
//!
//! One thing page tables do not tell: a device that was given a page to write to (O_DIRECT, libaio) before it was
//! protected, and writes after it was read. Where such files are open, processes must be frozen for each [`Tracker::round`]
//! (not for reading): then no read(2) is under way.

mod forks;
mod means;
mod object;
mod process;
mod shared;
mod soft;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::inject::InjectError;
use crate::maps::LeftToCriu;
use crate::pages::{PageRange, PageSet};
use crate::read::PageReader;
use crate::sys::softdirty;
use forks::ForkWatch;
use means::Look;
pub use means::{Means, check};
pub(crate) use object::Object;
pub use object::{ObjectId, ObjectKind};
pub use process::inner_pid;
use process::{Layout, Process, is_gone};
use shared::Objects;
use soft::Never;
pub use soft::Pause;

/// Processes in one tracker.
const MAX_PROCESSES: usize = 4096;
/// Mappings of one process; the kernel's own default limit is 65,530 (vm.max_map_count).
const MAX_MAPPINGS: usize = 262_144;

#[derive(Debug, Error)]
pub enum TrackError {
    #[error(
        "this kernel cannot tell written pages: neither by PAGEMAP_SCAN with userfaultfd WP_ASYNC (Linux 6.7 or newer: \
         {protection}) nor by soft-dirty bits ({marks})"
    )]
    Kernel { protection: io::Error, marks: io::Error },
    #[error(
        "this kernel tells written pages by soft-dirty bits, which are lost where it merges pages; switch that off: \
         echo 2 > /sys/kernel/mm/ksm/run"
    )]
    Merging,
    #[error("which pages a process has could not be read in /proc/PID/pagemap")]
    PageMap(#[source] io::Error),
    #[error("the processes could not be made to stand still for a look at which pages they have written")]
    Pause(#[source] io::Error),
    #[error("a thread for watching forks could not be started")]
    Thread(#[source] io::Error),
    #[error("{count} processes are more than one tracker takes ({MAX_PROCESSES})")]
    TooManyProcesses { count: usize },
    #[error("process {pid} has more than {MAX_MAPPINGS} mappings")]
    TooManyMappings { pid: i32 },
    #[error("process {pid} could not be read")]
    Process {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error(
        "process {pid} has {gib} GiB of address space with hardly anything in it, which takes too long to read on this \
         kernel; Linux 6.7 or newer skips it, --mode stop-and-copy leaves it to CRIU"
    )]
    Sparse { pid: i32, gib: u64 },
    #[error("shared memory {id:?} could not be read")]
    Object {
        id: ObjectId,
        #[source]
        source: io::Error,
    },
}

/// Whether the processes run while a round is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// They run: new processes are armed.
    Running,
    /// All stand still (frozen cgroup, SIGSTOP). Nobody can be armed; new processes are told whole.
    Frozen,
}

/// What is to be sent of one process.
#[derive(Debug)]
pub struct ProcessPages {
    pub pid: i32,
    /// Its number in its own pid namespace: the one CRIU uses.
    pub inner_pid: i32,
    /// New since the last round, or another program by exec(2): what was sent for this number before is void.
    pub reset: bool,
    /// Written or never sent, present, not the kernel's page of zeroes. Not tracked memory is here each time.
    pub pages: PageSet,
    /// Sent before, and zero (or unmapped) now.
    pub gone: PageSet,
    /// Every mapping that we carry, whether or not anything is in it. CRIU is to leave out exactly these.
    pub carried: PageSet,
    /// Its mappings of objects that we carry: where their content must appear after a restore.
    pub shared: Vec<SharedMapping>,
    pub left: Vec<(PageRange, LeftToCriu)>,
    /// Why its writes are not tracked, if they are not.
    pub untracked: Option<InjectError>,
    /// How long one of its threads stood still for arming, if it was armed now.
    pub stopped: Option<Duration>,
}

/// A mapping of a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMapping {
    pub range: PageRange,
    pub object: ObjectId,
    /// Of the mapping's start in the object, in bytes.
    pub offset: u64,
}

/// What is to be sent of one shared object; ranges are offsets in it.
#[derive(Debug)]
pub struct ObjectPages {
    pub id: ObjectId,
    pub kind: ObjectKind,
    /// Rounded up to whole pages.
    pub size_bytes: u64,
    /// New since the last round: what was sent for this object before is void.
    pub reset: bool,
    pub pages: PageSet,
    pub gone: PageSet,
    /// Its content had to be compared with what was sent; the time for that grows with its size.
    pub compared: bool,
}

/// One round.
#[derive(Debug, Default)]
pub struct Round {
    pub processes: Vec<ProcessPages>,
    pub objects: Vec<ObjectPages>,
    /// Numbers in their own pid namespace of processes that have ended since the last round.
    pub ended: Vec<i32>,
    /// Objects that nobody has mapped any more.
    pub dropped: Vec<ObjectId>,
    /// For how long all processes stood still for it, by the tracker's own doing.
    pub paused: Duration,
}

impl Round {
    /// Bytes to be sent.
    pub fn bytes(&self) -> u64 {
        let private: u64 = self.processes.iter().map(|p| p.pages.bytes()).sum();
        private + self.objects.iter().map(|o| o.pages.bytes()).sum::<u64>()
    }
}

/// Follows a set of processes. Dropping it ends all tracking; the processes run on.
pub struct Tracker {
    processes: HashMap<i32, Process>,
    objects: Objects,
    forks: ForkWatch,
    look: Look,
    means: Option<Means>,
    pause: Arc<dyn Pause>,
    incarnations: u64,
}

/// A process that was found, before the look at its memory.
struct Met {
    pid: i32,
    /// Its number in its own pid namespace, as the last round told it.
    before: Option<i32>,
    reset: bool,
    untracked: Option<InjectError>,
    stopped: Option<Duration>,
}

fn pids_of(met: &[Met]) -> Vec<i32> {
    met.iter().map(|m| m.pid).collect()
}

impl Tracker {
    /// A tracker that knows no process yet; where the kernel needs it, `pause` is how all of them are made to stand still
    /// for a moment. Needs CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_CHECKPOINT_RESTORE.
    pub fn new(pause: Arc<dyn Pause>) -> Result<Self, TrackError> {
        let (look, means) = Look::choose()?;
        Self::by(look, Some(means), pause)
    }

    /// A tracker for one round over processes that stand still, which tells all that is there: on kernels that cannot
    /// tell written pages, too. Needs CAP_SYS_PTRACE and CAP_SYS_ADMIN.
    pub fn for_one_round() -> Result<Self, TrackError> {
        Self::by(Look::everything()?, None, Arc::new(Never))
    }

    fn by(look: Look, means: Option<Means>, pause: Arc<dyn Pause>) -> Result<Self, TrackError> {
        Ok(Self {
            processes: HashMap::new(),
            objects: Objects::default(),
            forks: ForkWatch::start().map_err(TrackError::Thread)?,
            look,
            means,
            pause,
            incarnations: 0,
        })
    }

    /// How it tells written pages; `None`: it does not.
    pub fn means(&self) -> Option<Means> {
        self.means
    }

    /// Makes a round over exactly the processes `pids` (numbers here): what was written since the last one. New
    /// processes are armed and told whole, those not named any more are dropped. Processes that end meanwhile are left
    /// out. Takes a few milliseconds per GiB, more where shared objects must be compared.
    pub fn round(&mut self, pids: &[i32], target: Target) -> Result<Round, TrackError> {
        if pids.len() > MAX_PROCESSES {
            return Err(TrackError::TooManyProcesses { count: pids.len() });
        }
        let mut round = Round::default();
        let ended: Vec<i32> = self.processes.keys().copied().filter(|pid| !pids.contains(pid)).collect();
        for pid in ended {
            round.ended.extend(self.processes.remove(&pid).map(|p| p.inner_pid));
        }
        self.objects.begin(pids);
        let result =
            self.processes_round(pids, target, &mut round).and_then(|()| self.objects.round(&mut round, target));
        if result.is_err() {
            // What was told so far is lost with this error: the next round must tell all of it again.
            self.processes.clear();
            self.objects = Objects::default();
        }
        result.map(|()| round)
    }

    fn processes_round(&mut self, pids: &[i32], target: Target, round: &mut Round) -> Result<(), TrackError> {
        let mut met = Vec::with_capacity(pids.len());
        for &pid in pids {
            let before = self.processes.get(&pid).map(|p| p.inner_pid);
            let found = self.meet(pid, before, target);
            met.extend(self.unless_gone(pid, before, found, round)?);
        }
        let marks = target == Target::Running && self.means == Some(Means::SoftDirty);
        if !marks {
            return self.look_at_all(met, target, round);
        }
        if softdirty::are_pages_merged() {
            return Err(TrackError::Merging);
        }
        if met.iter().all(|m| m.reset) {
            // Nothing of theirs is known: what is there after the marks were taken is told.
            self.take_marks(&pids_of(&met))?;
            self.look_at_all(met, target, round)?;
        } else {
            let (begun, pause) = (Instant::now(), Arc::clone(&self.pause));
            let (mut met, mut looked) = (Some(met), Ok(()));
            let mut work = || {
                let met = met.take().unwrap_or_default();
                let pids = pids_of(&met);
                // After all looks: processes can share an address space.
                looked = self.look_at_all(met, target, round).and_then(|()| self.take_marks(&pids));
            };
            pause.still(&mut work).map_err(TrackError::Pause)?;
            looked?;
            round.paused = begun.elapsed();
        }
        for told in &round.processes {
            if let Some(process) = self.processes.get(&told.pid) {
                process.split(&told.pages);
            }
        }
        Ok(())
    }

    /// `None`, and noted in the round with the number it had `before`, if the process is gone.
    fn unless_gone<T>(
        &mut self,
        pid: i32,
        before: Option<i32>,
        found: Result<Option<T>, TrackError>,
        round: &mut Round,
    ) -> Result<Option<T>, TrackError> {
        let found = match found {
            Err(TrackError::Process { source, .. }) if is_gone(&source) => None,
            other => other?,
        };
        if found.is_none() {
            self.processes.remove(&pid);
            round.ended.extend(before);
        }
        Ok(found)
    }

    /// Opens a process that is not known, and arms it if it is not yet; `None` if it is gone.
    fn meet(&mut self, pid: i32, before: Option<i32>, target: Target) -> Result<Option<Met>, TrackError> {
        let mut met = Met { pid, before, reset: false, untracked: None, stopped: None };
        let known = self.processes.get_mut(&pid).is_some_and(Process::is_alive);
        if !known {
            met.reset = true;
            self.incarnations += 1;
            self.processes.insert(pid, Process::open(pid, self.incarnations)?);
        }
        let features = self.look.features();
        let Some(process) = self.processes.get_mut(&pid) else { return Ok(None) };
        if process.watched.is_none() && target == Target::Running {
            let Some(layout) = process.layout()? else { return Ok(None) };
            match process.arm(&layout.all, features, &mut self.forks) {
                Ok(time) => met.stopped = Some(time),
                Err(InjectError::Gone { .. }) => return Ok(None),
                Err(error) => met.untracked = Some(error),
            }
        }
        Ok(Some(met))
    }

    fn look_at_all(&mut self, met: Vec<Met>, target: Target, round: &mut Round) -> Result<(), TrackError> {
        for met in met {
            let (pid, before) = (met.pid, met.before);
            let looked = self.look_at(met, target);
            let pages = self.unless_gone(pid, before, looked, round)?;
            round.processes.extend(pages);
        }
        Ok(())
    }

    fn take_marks(&self, pids: &[i32]) -> Result<(), TrackError> {
        pids.iter().filter_map(|pid| self.processes.get(pid)).try_for_each(Process::take_marks)
    }

    /// Looks at one process; `None` if it is gone.
    fn look_at(&mut self, met: Met, target: Target) -> Result<Option<ProcessPages>, TrackError> {
        let Met { pid, reset, untracked, stopped, .. } = met;
        let Some(process) = self.processes.get_mut(&pid) else { return Ok(None) };
        // If it is still the same program, what was armed is what is looked at.
        let Some(layout) = process.layout()? else { return Ok(None) };
        let changes = match &mut self.look {
            Look::Protection { scanner, present } => process.changes(&layout.private, scanner, present, target)?,
            Look::SoftDirty { map } | Look::Everything { map } => {
                let registered = process.register(&layout.private);
                process.marked(&layout.private, &registered, map)?
            }
        };
        let Layout { private, shared, mut left, .. } = layout;
        let scanner = match &mut self.look {
            Look::Protection { scanner, .. } => Some(scanner),
            Look::SoftDirty { .. } | Look::Everything { .. } => None,
        };
        let shared = self.objects.look_at(process, &shared, scanner, target, &mut left)?;
        Ok(Some(ProcessPages {
            pid,
            inner_pid: process.inner_pid,
            reset,
            pages: changes.pages,
            gone: changes.gone,
            carried: private.into_iter().collect(),
            shared,
            left,
            untracked,
            stopped,
        }))
    }

    /// Reads pages of a process that a round has told.
    pub fn read_process(&self, pid: i32, pages: PageSet) -> PageReader {
        PageReader::of_process(pid, pages)
    }

    /// Reads pages of a shared object that a round has told; `None` if it is not known.
    pub fn read_object(&self, id: ObjectId, pages: PageSet) -> Option<PageReader> {
        self.objects.get(id).map(|object| PageReader::of_object(Arc::clone(object), pages))
    }
}
