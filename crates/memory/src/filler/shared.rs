//! Content of shared objects that is written past userfaultfd: through the object itself, as a restored process has
//! it mapped (`/proc/PID/map_files`, CAP_CHECKPOINT_RESTORE). These pages are charged to the memory cgroup of who
//! writes, unlike those that come by userfaultfd, which are charged to the process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use super::{FillError, SharedUse};
use crate::pages::{PageRange, PageSet};
use crate::store::Space;

/// What is written at once, in bytes.
const STEP_BYTES: u64 = 1 << 20;
/// One past the last offset an object can have.
const END: u64 = 1 << 63;

/// Writes what is left in `space`, except what is in `later`.
pub(super) fn write_rest(space: &Space, uses: &[&SharedUse], later: Option<PageSet>) -> Result<(), FillError> {
    let all: PageSet = [PageRange { start: 0, end: END }].into_iter().collect();
    let now = later.map_or_else(|| all.clone(), |later| all.difference(&later));
    let mut file: Option<(File, &SharedUse)> = None;
    for range in now.ranges() {
        // Each turn releases a run.
        while let Some(run) = space.first_run(*range, STEP_BYTES, |run| run.range) {
            let (file, through) = match &file {
                Some(open) => open,
                None => file.insert(open(uses)?),
            };
            let failed = |source| FillError::Shared { object: through.object, pid: through.pid, source };
            write_run(space, run, file).map_err(failed)?;
            space.release(run);
        }
    }
    Ok(())
}

fn write_run(space: &Space, run: PageRange, file: &File) -> io::Result<()> {
    let written = space.first_run(run, run.bytes(), |run| {
        // SAFETY: the run stays readable, and nobody writes to it, while this closure runs.
        let bytes = unsafe { std::slice::from_raw_parts(run.data, run.range.bytes() as usize) };
        // The last page of a file may be beyond its end in part.
        let length = file.metadata()?.len();
        let inside = length.saturating_sub(run.range.start).min(bytes.len() as u64) as usize;
        file.write_all_at(&bytes[..inside], run.range.start)
    });
    written.unwrap_or(Ok(()))
}

/// The object, through any mapping that can be opened for writing.
fn open<'a>(uses: &[&'a SharedUse]) -> Result<(File, &'a SharedUse), FillError> {
    let mut last = None;
    for shared_use in uses {
        let (start, end) = (shared_use.range.start, shared_use.range.end);
        let path = format!("/proc/{}/map_files/{start:x}-{end:x}", shared_use.pid);
        match OpenOptions::new().write(true).open(path) {
            Ok(file) => return Ok((file, shared_use)),
            Err(source) => {
                last = Some(FillError::Shared { object: shared_use.object, pid: shared_use.pid, source });
            }
        }
    }
    // There is at least one use: objects are taken from the uses.
    Err(last.unwrap_or(FillError::RestoreFailed))
}
