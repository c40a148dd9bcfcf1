//! Named points at which a process stands still because a test wants it to: a fault can then be put into a phase that
//! is otherwise over in a millisecond.
//!
//! [`VARIABLE`] names a directory and is read once. Where it is absent, as on every real server, a point costs one look
//! at a variable in memory. Where it is there and the directory has a file with the point's name, whoever comes to the
//! point makes `NAME.reached` beside it and goes on when `NAME` is removed, or after [`DEADLINE_S`] seconds whatever
//! happens. A lab gives each of its daemons a directory of its own (`godwit lab up --hold-points`).
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

/// The environment variable that names the directory.
pub const VARIABLE: &str = "GODWIT_HOLD_DIR";
/// Nobody stands still for longer, in seconds.
pub const DEADLINE_S: u64 = 60;
/// Bytes of notifications read at once; what they say is found out by looking.
const NOTIFICATION_BYTES: usize = 4096;

/// The file that says that somebody has come to the point of this name.
pub fn reached_file(directory: &Path, name: &str) -> PathBuf {
    let mut file = OsString::from(name);
    file.push(".reached");
    directory.join(file)
}

fn directory() -> Option<&'static Path> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIRECTORY.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)).as_deref()
}

/// Whether whoever comes to this point now is to stand still.
pub fn wanted(name: &str) -> bool {
    directory().is_some_and(|directory| directory.join(name).exists())
}

/// Says that this point has been reached and goes on: for who has another way of standing still.
pub fn tell_reached(name: &str) {
    if let Some(directory) = directory()
        && let Err(error) = File::create(reached_file(directory, name))
    {
        tracing::error!(%error, name, "a hold point cannot be told");
    }
}

/// Stands still at this point as long as that is wanted. Blocks the thread.
pub fn stop_at(name: &str) {
    let Some(directory) = directory() else { return };
    match wait(directory, name, Duration::from_secs(DEADLINE_S)) {
        Ok(true) => {}
        Ok(false) => tracing::error!(name, "nobody ended a hold within {DEADLINE_S} s; going on"),
        Err(error) => tracing::error!(%error, name, "a hold point is passed by"),
    }
}

/// As [`stop_at`], for tasks. Dropped, it holds nobody.
#[cfg(feature = "tokio")]
pub async fn reach(name: &'static str) {
    if wanted(name) {
        // A panic of it has been told by itself.
        let _ = tokio::task::spawn_blocking(move || stop_at(name)).await;
    }
}

/// Waits for the end of the file `name`; `false` if it is still there after `limit`.
fn wait(directory: &Path, name: &str, limit: Duration) -> io::Result<bool> {
    let file = directory.join(name);
    if !file.exists() {
        return Ok(true);
    }
    let deadline = Instant::now() + limit;
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&changes, directory, inotify::WatchFlags::DELETE | inotify::WatchFlags::MOVED_FROM)?;
    File::create(reached_file(directory, name))?;
    let mut notifications = [0; NOTIFICATION_BYTES];
    while file.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&changes, PollFlags::IN)], Some(&left)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => match rustix::io::read(&changes, &mut notifications) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_when_the_file_goes() {
        let directory = tempfile::tempdir().unwrap();
        let limit = Duration::from_secs(30);
        assert!(wait(directory.path(), "a", limit).unwrap(), "nobody wants it");
        assert!(!reached_file(directory.path(), "a").exists());
        std::fs::write(directory.path().join("a"), "").unwrap();
        std::thread::scope(|scope| {
            let held = scope.spawn(|| wait(directory.path(), "a", limit).unwrap());
            let deadline = Instant::now() + limit;
            while !reached_file(directory.path(), "a").exists() {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
            // Another point's end is not this one's.
            std::fs::write(directory.path().join("b"), "").unwrap();
            std::fs::remove_file(directory.path().join("b")).unwrap();
            assert!(!held.is_finished());
            std::fs::remove_file(directory.path().join("a")).unwrap();
            assert!(held.join().unwrap());
        });
    }

    #[test]
    fn it_goes_on_after_its_time() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), "").unwrap();
        assert!(!wait(directory.path(), "a", Duration::from_millis(5)).unwrap());
    }
}
