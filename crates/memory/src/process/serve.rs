//! The process's end.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::net::sockopt::socket_type;

use super::CONTROL;
use super::message::{Answer, Failure, Request};
use crate::channel::{receive, send};
use crate::filler::{FillError, Filler, Listener};
use crate::late::Awaited;
use crate::store::PageStore;

/// How little the kernel should think of ending this process when memory runs out (-1000: never).
const OOM_SCORE_ADJ: &str = "-1000";

/// Takes the control socket (descriptor 3) that [`FillerProcess::start`](crate::FillerProcess::start) gave this process.
/// To be called first, before anything else opens a descriptor.
///
/// Errors: [`FillError::Process`] if there is none, or if it was taken before.
pub fn filler_control() -> Result<OwnedFd, FillError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let failed = |source| FillError::Process { doing: "descriptor 3 is not a control socket", source };
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    // SAFETY: looks at a number that may be no descriptor at all, which is an error.
    let borrowed = unsafe { libc::fcntl(CONTROL, libc::F_SETFD, libc::FD_CLOEXEC) };
    if borrowed < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open, and whoever started us left it to this function, which hands it out once.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    socket_type(&control).map_err(|e| failed(e.into()))?;
    Ok(control)
}

/// Fills one restore; the body of a process of its own, which changes how this process takes signals. `control` is the
/// socket to [`FillerProcess`](crate::FillerProcess), `work_directory` where criu works.
///
/// Returns when everything is filled, or with an error when there is nothing (more) to be filled; if restored processes
/// exist, not before they are gone or full. When that is:
///
/// - the control socket closes before criu has connected: [`FillError::Cancelled`], nobody will come;
/// - it closes later: everything goes on, filling begins when criu has finished at the latest;
/// - criu's connection closes before the restore is finished: [`FillError::RestoreFailed`], once all processes that
///   were handed over are gone;
/// - all of these are gone before the restore is finished: [`FillError::Gone`].
pub fn serve_filler(control: OwnedFd, work_directory: &Path) -> Result<(), FillError> {
    let control = UnixStream::from(control);
    ignore(&[Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGPIPE]);
    // Not allowed everywhere.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
    let filler = match prepare(&control, work_directory) {
        Ok(filler) => filler,
        Err(error) => {
            tell(&control, Answer::Failed(Failure::new(&error)));
            return Err(error);
        }
    };
    // Held from a request to its answer: what is said unasked comes before or after.
    let talking = Mutex::new(());
    std::thread::scope(|threads| {
        let talk = || {
            obey(&control, &filler, &talking);
            filler.unattended();
        };
        let talk = std::thread::Builder::new().name("godwit-control".to_owned()).spawn_scoped(threads, talk);
        talk.map_err(FillError::Thread)?;
        let result = loop {
            match filler.wait(Duration::from_secs(3600)) {
                Ok(None) => {}
                Ok(Some(report)) => break Ok(report),
                Err(error) => break Err(error),
            }
        };
        {
            let _quiet = talking.lock().unwrap_or_else(PoisonError::into_inner);
            tell(&control, Answer::Ended(result.as_ref().map(|report| *report).map_err(Failure::new)));
        }
        // The processes that cannot go on keep their descriptors as long as they are there.
        filler.linger();
        let _ = control.shutdown(std::net::Shutdown::Both);
        result.map(|_| ())
    })
}

/// Listens, and waits for the pages.
fn prepare(control: &UnixStream, work_directory: &Path) -> Result<Filler, FillError> {
    let listener = Listener::bind(work_directory).map_err(FillError::Listen)?;
    tell(control, Answer::Done);
    let mut late = None;
    loop {
        let (index, file) = match next(control) {
            Some((Request::Load(index), Some(file))) => (index, file),
            Some((Request::Late(pages), Some(socket))) => {
                late = Some(Arc::new(Awaited::new(&pages, socket)));
                tell(control, Answer::Done);
                continue;
            }
            Some((Request::Progress, _)) => {
                tell(control, Answer::Progress(crate::filler::Progress::default()));
                continue;
            }
            Some(_) => {
                tell(control, Answer::Failed(Failure::other("there are no pages yet")));
                continue;
            }
            None => return Err(FillError::Cancelled),
        };
        let broken = |source| FillError::Process { doing: "its pages could not be taken", source };
        let store = PageStore::new().map_err(|e| broken(io::Error::other(e)))?;
        store.adopt(File::from(file), &index).map_err(broken)?;
        ignore(&[Signal::SIGTERM]);
        let filler = Filler::serve(listener, Arc::new(store), late)?;
        tell(control, Answer::Done);
        return Ok(filler);
    }
}

/// Does what it is told until nobody is left to tell.
fn obey(control: &UnixStream, filler: &Filler, talking: &Mutex<()>) {
    while let Some((request, _)) = next(control) {
        let _in_turn = talking.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match request {
            Request::Load(_) | Request::Late(_) => Answer::Failed(Failure::other("it has its pages already")),
            Request::Progress => Answer::Progress(filler.progress()),
            Request::Restored(uses) => match filler.restored(uses) {
                Ok(report) => Answer::Shared(report),
                Err(error) => Answer::Failed(Failure::new(&error)),
            },
        };
        tell(control, answer);
    }
}

/// The next request; `None` once there will be none. Who sends something else is as good as gone.
fn next(control: &UnixStream) -> Option<(Request, Option<OwnedFd>)> {
    let (message, fd) = receive(control).ok()??;
    Some((Request::decode(&message).ok()?, fd))
}

/// If nobody listens, that is seen when nobody asks any more.
fn tell(control: &UnixStream, answer: Answer) {
    let _ = send(control, &answer.encode(), None);
}

fn ignore(signals: &[Signal]) {
    for one in signals {
        // SAFETY: to ignore a signal runs no code of ours.
        let _ = unsafe { signal(*one, SigHandler::SigIgn) };
    }
}
