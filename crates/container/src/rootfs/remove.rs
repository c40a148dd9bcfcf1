//! Recursive removal that never leaves the file system mount it starts in.
//!
//! A bind mount of another directory of the same device looks like an ordinary directory to
//! device numbers; only the kernel's path walk knows. openat2(2) with RESOLVE_NO_XDEV refuses
//! to enter any mount, and the kernel refuses to unlink what is mounted on.

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, ResolveFlags, openat2, unlinkat};

/// Deepest directory tree that is removed; a path of the kernel's limit has fewer levels.
const MAX_DEPTH: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error("{path} has {mount} mounted in it: unmount it first")]
    Mounted { path: PathBuf, mount: PathBuf },
    #[error("cannot remove {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot read the list of mounts")]
    Mounts { source: io::Error },
    #[error("{path} has more than {MAX_DEPTH} levels of directories")]
    TooDeep { path: PathBuf },
}

/// Mount points at or below `dir`, in the order of their mounting, from this process' view.
pub fn mount_points_below(dir: &Path) -> Result<Vec<PathBuf>, RemoveError> {
    let text = std::fs::read("/proc/self/mountinfo").map_err(|source| RemoveError::Mounts { source })?;
    // mountinfo has resolved paths; a directory that is gone has no mounts.
    let Ok(dir) = dir.canonicalize() else { return Ok(Vec::new()) };
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|mount| mount.starts_with(&dir))
        .collect())
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Removes a directory with all it holds; one that is not there is fine. Refuses as a whole
/// when something is mounted at or below it, and stops at a mount that appears meanwhile. Links are
/// removed, never followed.
pub fn remove_dir_all_no_xdev(path: &Path) -> Result<(), RemoveError> {
    let failed = |source: io::Error| RemoveError::Io { path: path.to_owned(), source };
    if let Some(mount) = mount_points_below(path)?.into_iter().next() {
        return Err(RemoveError::Mounted { path: path.to_owned(), mount });
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match rustix::fs::openat(CWD, parent, flags, Mode::empty()) {
        Ok(parent) => parent,
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed(error.into())),
    };
    let name = CString::new(name.as_bytes()).map_err(|error| failed(error.into()))?;
    remove_directory(&parent, &name, path)
}

/// One level of the walk: the open directory, its name in the level above, what it held.
struct Level {
    fd: OwnedFd,
    name: CString,
    entries: Vec<CString>,
}

/// Depth first with a stack of our own, so that a deep tree cannot exhaust the thread's.
fn remove_directory(parent: &OwnedFd, name: &CStr, path: &Path) -> Result<(), RemoveError> {
    let failed = |error: rustix::io::Errno| RemoveError::Io { path: path.to_owned(), source: error.into() };
    let mut stack: Vec<Level> = match enter(parent, name) {
        Ok(level) => vec![level],
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    while let Some(level) = stack.last_mut() {
        let Some(entry) = level.entries.pop() else {
            let done = stack.pop();
            let above = stack.last().map_or(parent, |level| &level.fd);
            if let Some(done) = done {
                unlinkat(above, &done.name, AtFlags::REMOVEDIR).or_else(absent_is_fine).map_err(failed)?;
            }
            continue;
        };
        match unlinkat(&level.fd, &entry, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(rustix::io::Errno::ISDIR) => {
                let next = enter(&level.fd, &entry).map_err(failed)?;
                if stack.len() >= MAX_DEPTH {
                    return Err(RemoveError::TooDeep { path: path.to_owned() });
                }
                stack.push(next);
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

fn absent_is_fine(error: rustix::io::Errno) -> rustix::io::Result<()> {
    if error == rustix::io::Errno::NOENT { Ok(()) } else { Err(error) }
}

fn enter(above: &OwnedFd, name: &CStr) -> rustix::io::Result<Level> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let fd = openat2(above, name, flags, Mode::empty(), resolve)?;
    let mut entries = Vec::new();
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            entries.push(entry.file_name().to_owned());
        }
    }
    Ok(Level { fd, name: name.to_owned(), entries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_go_and_links_are_not_followed() {
        let base = std::env::temp_dir().join(format!("godwit-remove-{}", std::process::id()));
        let (tree, kept) = (base.join("tree"), base.join("kept"));
        std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
        std::fs::create_dir_all(&kept).unwrap();
        std::fs::write(kept.join("file"), "x").unwrap();
        std::fs::write(tree.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("a/link")).unwrap();
        remove_dir_all_no_xdev(&tree).unwrap();
        assert!(!tree.exists());
        assert!(kept.join("file").exists());
        remove_dir_all_no_xdev(&tree).unwrap();
        remove_dir_all_no_xdev(&base).unwrap();
        assert!(!base.exists());
    }

    #[test]
    fn mount_names_are_read_as_written() {
        assert_eq!(unescape(b"/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape(b"/plain\\"), PathBuf::from("/plain\\"));
    }
}
