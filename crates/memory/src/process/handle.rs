//! The agent's end.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::message::{Answer, Failure, Request};
use super::start::{Started, start};
use crate::channel::{receive, send};
use crate::filler::{FillError, FillReport, Progress, SHARED_TIMEOUT_S, SharedReport, SharedUse, socket_path};
use crate::late::Late;
use crate::store::PageStore;

/// How long the process may take until it listens.
const START: Duration = Duration::from_secs(5);
/// How long it may take for an answer that needs no work, or for the pages.
const ANSWER: Duration = Duration::from_secs(30);
/// How long an ended process may take to be gone, in milliseconds.
const END_MS: i64 = 5_000;
/// How long the reason of a failure may come after the failure.
const REASON: Duration = Duration::from_secs(2);

/// A running process that fills one restore. Dropping this closes the connection to it and does not end it: what it
/// does then is told at [`serve_filler`](crate::serve_filler). Can be shared between threads.
pub struct FillerProcess {
    started: Started,
    socket: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How it ended; nothing is asked any more.
    ended: Option<Result<FillReport, Failure>>,
    progress: Progress,
}

impl FillerProcess {
    /// Starts `command`, which is to call [`serve_filler`](crate::serve_filler) with
    /// [`filler_control`](crate::filler_control) and the same directory, and returns when it listens on
    /// `lazy-pages.socket` in `work_directory`, where criu will be told to work. To be called before the restore is
    /// started.
    ///
    /// The process gets a session of its own and no descriptor but the control socket (3) and its standard ones; those
    /// of them that the caller has left as they are here are /dev/null.
    ///
    /// Errors: [`FillError::Process`] if it cannot be started, ends, or does not listen within 5 s;
    /// [`FillError::Remote`] if it says why.
    pub fn start(command: Command, work_directory: &Path) -> Result<Self, FillError> {
        let started = start(command)?;
        let process = Self { started, socket: socket_path(work_directory), state: Mutex::default() };
        let answer = process.answer(&mut process.lock(), START);
        let error = match answer {
            Ok(Answer::Done) => return Ok(process),
            Ok(Answer::Failed(failure)) => failure.error(),
            Ok(_) => unexpected(),
            Err(error) => error,
        };
        process.abandon();
        Err(error)
    }

    /// Its number here.
    pub fn pid(&self) -> i32 {
        self.started.pid
    }

    /// Hands the pages over: afterwards `store` holds none, takes none, and memory is given back by the process alone.
    /// Takes some milliseconds. Must come once, before the restore is started; a criu that connects earlier waits.
    ///
    /// Errors: as [`FillerProcess::progress`], and if it was called before. The pages of `store` are lost then.
    pub fn load(&self, store: Arc<PageStore>) -> Result<(), FillError> {
        let state = &mut *self.lock();
        let given = store.hand_over();
        let (file, index) = given.map_err(|source| FillError::Process { doing: "no pages to give to it", source })?;
        match self.ask(state, &Request::Load(index), Some(file.as_fd()), ANSWER)? {
            Answer::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Some pages will come while the processes run already, by the feed of `late`. Must come before
    /// [`FillerProcess::load`], and the store must not have these pages. If the feed ends early, so does the process,
    /// with [`FillError::Late`], once the restored processes are gone: they stand still where they need what is missing.
    ///
    /// Errors: as [`FillerProcess::progress`].
    pub fn expect(&self, late: Late) -> Result<(), FillError> {
        match self.ask(&mut self.lock(), &Request::Late(late.pages), Some(late.socket.as_fd()), ANSWER)? {
            Answer::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// As [`Filler::restored`](crate::Filler::restored): all processes are restored and still held; `uses` are all
    /// their mappings of shared objects. Returns when shared memory that can be reached past its mappings has its
    /// content. From the answer on the process goes on without us.
    ///
    /// Errors: those of [`Filler::restored`](crate::Filler::restored), and as [`FillerProcess::progress`].
    pub fn restored(&self, uses: Vec<SharedUse>) -> Result<SharedReport, FillError> {
        // The process itself gives up first.
        let limit = Duration::from_secs(SHARED_TIMEOUT_S) + ANSWER;
        let answer = self.ask(&mut self.lock(), &Request::Restored(uses), None, limit);
        match answer {
            Ok(Answer::Shared(report)) => Ok(report),
            Ok(_) => Err(unexpected()),
            // Why follows.
            Err(FillError::Cancelled) => Err(self.wait(REASON).err().unwrap_or(FillError::Cancelled)),
            Err(error) => Err(error),
        }
    }

    /// How far it is. Waits while another thread is in [`FillerProcess::restored`].
    ///
    /// Errors: what went wrong there ([`FillError::RestoreFailed`], [`FillError::Gone`], [`FillError::Remote`] with all
    /// causes, ...), every time; [`FillError::Process`] if it cannot be reached or ended without a word.
    pub fn progress(&self) -> Result<Progress, FillError> {
        let state = &mut *self.lock();
        if let Some(Ok(report)) = &state.ended {
            return Ok(end_of(report));
        }
        let answer = self.ask(state, &Request::Progress, None, ANSWER);
        if let (Err(_), Some(Ok(report))) = (&answer, &state.ended) {
            return Ok(end_of(report));
        }
        match answer? {
            Answer::Progress(progress) => {
                state.progress = progress;
                Ok(progress)
            }
            _ => Err(unexpected()),
        }
    }

    /// Waits until everything is filled, at most for `limit`; `None` if it is not by then.
    ///
    /// Errors: as [`FillerProcess::progress`].
    pub fn wait(&self, limit: Duration) -> Result<Option<FillReport>, FillError> {
        let began = Instant::now();
        loop {
            {
                let state = &mut *self.lock();
                if state.ended.is_none() && self.has_message(Duration::ZERO) {
                    // Unasked it says one thing only.
                    self.answer(state, ANSWER)?;
                }
                if let Some(ended) = &state.ended {
                    return ended.clone().map(Some).map_err(|failure| failure.error());
                }
            }
            let left = limit.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            // Without the lock: others may ask meanwhile.
            self.has_message(left);
        }
    }

    /// Ends it, whatever it does, and waits up to 5 s for its end. For a restore that is given up: the restored
    /// processes must be gone before, or their missing pages would read as zero.
    pub fn abandon(&self) {
        self.started.kill(END_MS);
        let _ = std::fs::remove_file(&self.socket);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_message(&self, limit: Duration) -> bool {
        // A second at most: what it is waited for may be taken by another thread.
        let limit = limit.min(Duration::from_secs(1));
        let limit = rustix::time::Timespec::try_from(limit).unwrap_or_default();
        let mut fds = [PollFd::new(&self.started.control, PollFlags::IN)];
        poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
    }

    fn ask(
        &self,
        state: &mut State,
        request: &Request,
        fd: Option<std::os::fd::BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Answer, FillError> {
        if state.ended.is_none() {
            // It may be over already: then it cannot be sent to, and what it said last is there to be read.
            let sent = send(&self.started.control, &request.encode(), fd);
            match self.answer(state, limit) {
                Ok(Answer::Failed(failure)) => return Err(failure.error()),
                Ok(Answer::Ended(_)) => {}
                Ok(answer) => return Ok(answer),
                Err(error) => return Err(sent.err().map_or(error, |e| self.lost(state, e))),
            }
        }
        match &state.ended {
            Some(Err(failure)) => Err(failure.error()),
            _ => Err(FillError::Cancelled),
        }
    }

    /// The next message; remembers if it is the last one.
    fn answer(&self, state: &mut State, limit: Duration) -> Result<Answer, FillError> {
        let control = &self.started.control;
        let received = control.set_read_timeout(Some(limit)).and_then(|()| receive(control));
        let answer = received.and_then(|message| {
            let (message, _) = message.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            Answer::decode(&message)
        });
        match answer {
            Ok(answer) => {
                if let Answer::Ended(ended) = &answer {
                    state.ended = Some(ended.clone());
                }
                Ok(answer)
            }
            Err(source) => Err(self.lost(state, source)),
        }
    }

    /// Nothing sensible comes from it any more.
    fn lost(&self, state: &mut State, source: io::Error) -> FillError {
        let error = FillError::Process { doing: "it does not answer", source };
        state.ended = Some(Err(Failure::new(&error)));
        error
    }
}

fn end_of(report: &FillReport) -> Progress {
    Progress { processes: 0, filled_bytes: report.filled_bytes, faults: report.faults }
}

fn unexpected() -> FillError {
    let source = io::Error::new(io::ErrorKind::InvalidData, "an answer to something else");
    FillError::Process { doing: "it said something unexpected", source }
}
