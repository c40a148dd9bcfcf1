//! Which pages of a set of processes were written, from outside, while they run.
//!
//! Private memory is followed by the processes' page tables: asynchronous write protection of userfaultfd
//! (`UFFD_FEATURE_WP_ASYNC`) and ioctl(PAGEMAP_SCAN), which tells written pages and protects them again in one step
//! (Documentation/admin-guide/mm/pagemap.rst and userfaultfd.rst, kernel ≥ 6.7). Shared memory is followed by object,
//! see [`object`](ObjectId).
//!
//! Nothing is lost, because every doubt counts as "written": memory that is new, or that cannot be tracked, is told
//! whole in every round. What a round tells must be read and sent after it, in the order of rounds; a page that changes
//! while it is read is told again. The last round is made while all processes stand still.
//!
//! One thing page tables do not tell: a device that was given a page to write to (O_DIRECT, libaio) before it was
//! protected, and writes after it was read. Where such files are open, processes must be frozen for each [`Tracker::round`]
//! (not for reading): then no read(2) is under way.

mod forks;
mod object;
mod process;
mod shared;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::inject::InjectError;
use crate::maps::LeftToCriu;
use crate::pages::{PageRange, PageSet};
use crate::read::PageReader;
use crate::sys::pagemap::Scanner;
use crate::sys::uffd::{FEATURE_EVENT_FORK, FEATURE_WP_ASYNC, Userfaultfd};
use forks::ForkWatch;
pub(crate) use object::Object;
pub use object::{ObjectId, ObjectKind};
pub use process::inner_pid;
use process::{Layout, Present, Process, is_gone};
use shared::Objects;

/// Processes in one tracker.
const MAX_PROCESSES: usize = 4096;
/// Mappings of one process; the kernel's own default limit is 65,530 (vm.max_map_count).
const MAX_MAPPINGS: usize = 262_144;

#[derive(Debug, Error)]
pub enum TrackError {
    #[error("this kernel cannot tell written pages (PAGEMAP_SCAN with userfaultfd WP_ASYNC, Linux 6.7 or newer)")]
    Kernel(#[source] io::Error),
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
    scanner: Scanner,
    present: Present,
    incarnations: u64,
}

/// Whether this kernel can tell written pages of running processes, tried on this one. Starts no thread.
pub fn check() -> Result<(), TrackError> {
    can_track().map(drop)
}

/// Both halves are tried: PAGEMAP_SCAN, and write protection that waits for nobody, which not every architecture has.
fn can_track() -> Result<Present, TrackError> {
    let protects = |uffd: Userfaultfd| uffd.enable(FEATURE_WP_ASYNC | FEATURE_EVENT_FORK);
    Userfaultfd::of_this_process().and_then(protects).map_err(TrackError::Kernel)?;
    Present::new().map_err(TrackError::Kernel)
}

impl Tracker {
    /// A tracker that knows no process yet. Needs CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_CHECKPOINT_RESTORE.
    pub fn new() -> Result<Self, TrackError> {
        let present = can_track()?;
        Ok(Self {
            processes: HashMap::new(),
            objects: Objects::default(),
            forks: ForkWatch::start().map_err(TrackError::Thread)?,
            scanner: Scanner::new(),
            present,
            incarnations: 0,
        })
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
        for &pid in pids {
            let known = self.processes.get(&pid).map(|p| p.inner_pid);
            match self.look_at(pid, target) {
                Ok(Some(pages)) => round.processes.push(pages),
                Ok(None) => {
                    self.processes.remove(&pid);
                    round.ended.extend(known);
                }
                Err(TrackError::Process { source, .. }) if is_gone(&source) => {
                    self.processes.remove(&pid);
                    round.ended.extend(known);
                }
                Err(error) => {
                    // What was told so far is lost with this error: the next round must tell all of it again.
                    self.processes.clear();
                    self.objects = Objects::default();
                    return Err(error);
                }
            }
        }
        let result = self.objects.round(&mut round, target);
        if result.is_err() {
            self.processes.clear();
            self.objects = Objects::default();
        }
        result.map(|()| round)
    }

    /// Looks at one process; `None` if it is gone.
    fn look_at(&mut self, pid: i32, target: Target) -> Result<Option<ProcessPages>, TrackError> {
        let mut reset = false;
        let (mut untracked, mut stopped) = (None, None);
        let known = self.processes.get_mut(&pid).is_some_and(Process::is_alive);
        if !known {
            reset = true;
            self.incarnations += 1;
            self.processes.insert(pid, Process::open(pid, self.incarnations)?);
        }
        let Some(process) = self.processes.get_mut(&pid) else { return Ok(None) };
        let Some(mut layout) = process.layout()? else { return Ok(None) };
        if process.watched.is_none() && target == Target::Running {
            match process.arm(&layout.all, &mut self.forks) {
                Ok(time) => stopped = Some(time),
                Err(InjectError::Gone { .. }) => return Ok(None),
                Err(error) => untracked = Some(error),
            }
            // If it is still the same program, what was armed is what was looked at.
            let Some(now) = process.layout()? else { return Ok(None) };
            layout = now;
        }
        let changes = process.changes(&layout.private, &mut self.scanner, &self.present, target)?;
        let Layout { private, shared, mut left, .. } = layout;
        let shared = self.objects.look_at(process, &shared, &mut self.scanner, target, &mut left)?;
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
