//! Restored memory, filled from a [`PageStore`] while the restored processes already run.
//!
//! CRIU restores with `--lazy-pages`: every private anonymous mapping is registered with a userfaultfd, which is handed
//! to whoever listens on `lazy-pages.socket` in its work directory. That is the thread here. It serves a page that
//! somebody waits for at once, with what follows it, and puts everything else in behind it, up to 1 MiB at a time.
//! What the store does not know is zero.
//!
//! Shared memory CRIU restores empty. [`Filler::restored`] is to be called while the processes are still held (CRIU's
//! post-restore notification): it registers their mappings of shared memory with the same userfaultfds. Memory that can
//! only be reached through mappings (MAP_SHARED | MAP_ANONYMOUS) is then filled like private memory, while everything
//! runs; memory that can be reached past them (descriptors, shmat) is filled before the call returns.
//!
//! Once all is there the userfaultfds are closed, which makes the processes ordinary ones. Until then they must not
//! run without the filler: **the pages still missing would read as zero**. So after an error the descriptors stay open
//! until the processes are gone or the [`Filler`] is dropped, and who drops it early kills the processes first.
//!
//! One case is not told apart: madvise(MADV_REMOVE) of shared memory while it is being filled counts as
//! MADV_DONTNEED, which keeps the content.

mod server;
mod shared;
mod socket;
mod view;

use std::io;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use thiserror::Error;

use crate::late::Awaited;
use crate::pages::PageRange;
use crate::store::PageStore;
use crate::tracker::{ObjectId, ObjectKind};
use server::Server;
pub(crate) use socket::{Listener, socket_path};

/// How long [`Filler::restored`] waits for the content of shared memory, in seconds.
pub(crate) const SHARED_TIMEOUT_S: u64 = 300;

#[derive(Debug, Error)]
pub enum FillError {
    #[error("CRIU's lazy-pages.socket could not be made")]
    Listen(#[source] io::Error),
    #[error("a thread for filling could not be started")]
    Thread(#[source] io::Error),
    #[error("criu closed lazy-pages.socket before the restore was finished: see its restore.log")]
    RestoreFailed,
    #[error("criu sent something else than processes and their userfaultfds")]
    Protocol(#[source] io::Error),
    #[error("the kernel refused to {doing}")]
    Kernel {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("shared memory {object:?} could not be written through process {pid}")]
    Shared {
        object: ObjectId,
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("shared memory was not filled within {SHARED_TIMEOUT_S} s")]
    TimedOut,
    /// [`Filler::restored`] was not called in time.
    #[error("criu finished the restore before anybody said where the content of shared memory belongs")]
    SharedUnplaced,
    /// The processes cannot go on: what they would need is nowhere.
    #[error("memory that was to follow from the source did not come")]
    Late(#[source] io::Error),
    #[error("filling was cancelled")]
    Cancelled,
    #[error("all restored processes have ended before the restore was finished")]
    Gone,
    /// The process that fills could not be started or reached, or it ended without a word.
    #[error("the process that fills: {doing}")]
    Process {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    /// What went wrong in the process that fills, with all its causes.
    #[error("the process that fills: {0}")]
    Remote(String),
}

/// A restored process's mapping of a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedUse {
    /// The process's number in its own pid namespace, as CRIU names it.
    pub inner_pid: i32,
    /// Its number here.
    pub pid: i32,
    pub range: PageRange,
    /// The object as it was called at the source.
    pub object: ObjectId,
    pub kind: ObjectKind,
    /// Of the mapping's start in the object, in bytes.
    pub offset: u64,
}

/// How far filling is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Address spaces that have been handed over and are not full yet.
    pub processes: usize,
    pub filled_bytes: u64,
    pub faults: u64,
}

/// What filling took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Address spaces that were filled, children born meanwhile included.
    pub processes: usize,
    pub filled_bytes: u64,
    /// Pages that somebody waited for.
    pub faults: u64,
    /// Of these, pages that the store did not know.
    pub zero_faults: u64,
    /// Pages that had no place any more, or one that CRIU had not registered.
    pub unplaced_pages: u64,
    /// Pages that belong to nothing that was restored, in bytes.
    pub left_bytes: u64,
    /// From a look for faults to the next one: what a thread waits for a page at most, besides the copy itself.
    pub longest_turn: Duration,
    /// Since the filling in the background began.
    pub elapsed: Duration,
}

/// What [`Filler::restored`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharedReport {
    /// Content that was put in before the call returned.
    pub filled_bytes: u64,
    /// Content that follows while the processes run.
    pub lazy_bytes: u64,
    pub elapsed: Duration,
}

enum Command {
    /// Nobody is left who would start a restore.
    Unattended,
    Restored {
        uses: Vec<SharedUse>,
        answer: Sender<Result<SharedReport, FillError>>,
    },
}

#[derive(Default)]
struct Status {
    progress: Progress,
    result: Option<Result<FillReport, FillError>>,
    /// The thread holds no userfaultfd any more.
    over: bool,
}

#[derive(Default)]
struct Shared {
    status: Mutex<Status>,
    changed: Condvar,
    cancelled: std::sync::atomic::AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one restore.
pub struct Filler {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    /// Listens in `work_directory`, where criu will be told to work; to be called before the restore is started. The
    /// store must hold everything by the time processes are restored.
    pub fn listen(work_directory: &Path, store: Arc<PageStore>) -> Result<Self, FillError> {
        let listener = Listener::bind(work_directory).map_err(FillError::Listen)?;
        Self::serve(listener, store, None)
    }

    /// As [`Filler::listen`], where somebody listens already. Whoever has connected is answered from now on. Of the
    /// pages that are `late` the store knows nothing yet.
    pub(crate) fn serve(
        listener: Listener,
        store: Arc<PageStore>,
        late: Option<Arc<Awaited>>,
    ) -> Result<Self, FillError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|e| FillError::Listen(e.into()))?);
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = channel();
        if let Some(late) = &late {
            let late = crate::late::start(Arc::clone(late), Arc::clone(&store), Arc::clone(&wake));
            late.map_err(FillError::Thread)?;
        }
        let server = Server::new(listener, store, late, Arc::clone(&shared), Arc::clone(&wake), inbox)?;
        let thread = std::thread::Builder::new()
            .name("godwit-filler".to_owned())
            .spawn(move || server.run())
            .map_err(FillError::Thread)?;
        Ok(Self { shared, commands, wake, thread: Some(thread) })
    }

    /// All processes are restored and still held; to be called unless there is no shared memory. `uses` are all their mappings of shared objects. Returns when shared
    /// memory that can be reached past its mappings has its content. Background filling begins.
    pub fn restored(&self, uses: Vec<SharedUse>) -> Result<SharedReport, FillError> {
        let (answer, answered) = channel();
        let sent = self.commands.send(Command::Restored { uses, answer });
        self.wake();
        if sent.is_err() {
            return Err(FillError::Cancelled);
        }
        match answered.recv_timeout(Duration::from_secs(SHARED_TIMEOUT_S)) {
            Ok(result) => result,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Err(FillError::TimedOut),
            // The thread ended with an error, which `wait` tells.
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Err(FillError::Cancelled),
        }
    }

    /// Whoever would start a restore is gone: unless criu has connected, there is nothing to wait for any more.
    pub(crate) fn unattended(&self) {
        let _ = self.commands.send(Command::Unattended);
        self.wake();
    }

    /// Waits until no process is left that needs its userfaultfd: after an error that takes until they are gone.
    pub(crate) fn linger(&self) {
        let mut status = self.shared.lock();
        while !status.over {
            status = self.shared.changed.wait(status).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn progress(&self) -> Progress {
        self.shared.lock().progress
    }

    /// Waits until everything is filled, at most for `limit`; `None` if it is not by then. What went wrong is told
    /// once.
    pub fn wait(&self, limit: Duration) -> Result<Option<FillReport>, FillError> {
        let deadline = Instant::now() + limit;
        let mut status = self.shared.lock();
        loop {
            match status.result.take() {
                Some(Ok(report)) => {
                    status.result = Some(Ok(report));
                    return Ok(Some(report));
                }
                Some(Err(error)) => {
                    status.result = Some(Err(FillError::Cancelled));
                    return Err(error);
                }
                None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            status = self.shared.changed.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn wake(&self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, std::sync::atomic::Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
