//! Deleting directory trees of unknown depth without following links and without crossing mounts.

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Names held in memory at once while a directory is emptied.
const MAX_BATCH_ENTRIES: usize = 4096;

/// Why a tree is still there, at least in part.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("{path} has a mount on or below it and was left alone; unmount it first (see /proc/self/mountinfo)")]
    Mount { path: PathBuf },
    #[error("cannot delete {path}")]
    Delete { path: PathBuf, source: io::Error },
}

fn error(name: &[u8], errno: Errno) -> TreeError {
    let path = PathBuf::from(OsStr::from_bytes(name));
    match errno {
        Errno::XDEV | Errno::BUSY => TreeError::Mount { path },
        _ => TreeError::Delete { path, source: errno.into() },
    }
}

/// A name that no earlier call or process has used.
pub(crate) fn unique_name(purpose: &str) -> String {
    static START_NS: OnceLock<u128> = OnceLock::new();
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let start = START_NS.get_or_init(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos()));
    format!("{purpose}-{}-{start:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Deletes `name` in the directory `base`, whatever it is; absent is fine. Directories that are not
/// empty are first moved up into `base`, so that neither depth nor open files grow with the tree: a
/// crash leaves more names in `base`, which therefore must hold nothing but such leftovers.
pub(crate) fn remove(base: BorrowedFd<'_>, name: &OsStr) -> Result<(), TreeError> {
    let first = name.as_bytes();
    match fs::unlinkat(base, first, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(error(first, errno)),
    }
    let mut waiting = vec![first.to_vec()];
    while let Some(name) = waiting.pop() {
        empty(base, &name, &mut waiting).map_err(|errno| error(&name, errno))?;
        fs::unlinkat(base, name.as_slice(), AtFlags::REMOVEDIR).map_err(|errno| error(&name, errno))?;
    }
    Ok(())
}

/// Leaves the directory `name` empty; subdirectories with content go to `base` and into `waiting`.
fn empty(base: BorrowedFd<'_>, name: &[u8], waiting: &mut Vec<Vec<u8>>) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let dir = fs::openat2(base, name, flags, Mode::empty(), resolve)?;
    loop {
        let batch = batch(dir.as_fd())?;
        if batch.is_empty() {
            return Ok(());
        }
        for child in batch {
            match fs::unlinkat(&dir, &child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(errno) => return Err(errno),
            }
            match fs::unlinkat(&dir, &child, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    let moved = unique_name("trash");
                    fs::renameat_with(&dir, &child, base, moved.as_str(), RenameFlags::NOREPLACE)?;
                    waiting.push(moved.into_bytes());
                }
                Err(errno) => return Err(errno),
            }
        }
    }
}

fn batch(dir: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
        if names.len() == MAX_BATCH_ENTRIES {
            break;
        }
    }
    Ok(names)
}

/// Names in a directory, without `.` and `..`, and whether each is a directory.
pub(crate) fn list(dir: BorrowedFd<'_>) -> Result<Vec<(CString, bool)>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_owned();
        if name.as_bytes() == b"." || name.as_bytes() == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            known => known,
        };
        names.push((name, kind == FileType::Directory));
    }
    Ok(names)
}
