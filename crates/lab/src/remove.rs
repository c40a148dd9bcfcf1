//! Deleting a directory tree without ever crossing a mount.
//!
//! Looking at device numbers is not enough: a bind mount of the same file system has the same
//! device. `openat2` with `RESOLVE_NO_XDEV` refuses to enter any mount (openat2(2)).

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;

/// Directories nested deeper than this are left and reported: each level holds a file descriptor.
const MAX_DEPTH: usize = 512;
/// Most complaints that are collected; a tree that cannot be deleted would otherwise repeat itself.
const MAX_PROBLEMS: usize = 20;
/// Tries per directory: something still running may add entries while they are deleted.
const MAX_PASSES: usize = 4;

/// Deletes `path` and what is below it. Mount points are left, with what is on them, and reported.
///
/// Returns what could not be deleted; a path that does not exist is no problem.
pub(crate) fn remove_tree(path: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return vec![format!("{} is not a directory inside another one", path.display())];
    };
    let parent_fd = match openat2(
        CWD,
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::empty(),
    ) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return problems,
        Err(error) => return vec![format!("cannot open {}: {error}", parent.display())],
    };
    let Ok(name) = CString::new(name.as_encoded_bytes()) else { return problems };
    remove_directory(parent_fd.as_fd(), &name, path, 0, &mut problems);
    problems
}

fn remove_directory(parent: impl AsFd, name: &CStr, path: &Path, depth: usize, problems: &mut Vec<String>) {
    let complain = |problems: &mut Vec<String>, what: String| {
        if problems.len() < MAX_PROBLEMS {
            problems.push(what);
        }
    };
    if depth >= MAX_DEPTH {
        return complain(problems, format!("{} is nested deeper than {MAX_DEPTH} directories", path.display()));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let directory: OwnedFd = match openat2(&parent, name, flags, Mode::empty(), resolve) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return,
        Err(Errno::XDEV) => {
            return complain(problems, format!("{} is still a mount point: left as it is", path.display()));
        }
        Err(error) => return complain(problems, format!("cannot open {}: {error}", path.display())),
    };
    for _ in 0..MAX_PASSES {
        let before = problems.len();
        if let Err(error) = empty_directory(&directory, path, depth, problems) {
            return complain(problems, format!("cannot list {}: {error}", path.display()));
        }
        match unlinkat(&parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return,
            Err(Errno::NOTEMPTY | Errno::EXIST) if problems.len() == before => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => return,
            Err(error) => return complain(problems, format!("cannot delete {}: {error}", path.display())),
        }
    }
    complain(problems, format!("{} is being filled while it is deleted", path.display()));
}

fn empty_directory(directory: &OwnedFd, path: &Path, depth: usize, problems: &mut Vec<String>) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let below = path.join(String::from_utf8_lossy(name.to_bytes()).as_ref());
        if entry.file_type() == FileType::Directory {
            remove_directory(directory, name, &below, depth + 1, problems);
            continue;
        }
        match unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            // The file system did not tell the type.
            Err(Errno::ISDIR) => remove_directory(directory, name, &below, depth + 1, problems),
            Err(Errno::BUSY) => problems.push(format!("{} is still a mount point: left as it is", below.display())),
            Err(error) if problems.len() < MAX_PROBLEMS => {
                problems.push(format!("cannot delete {}: {error}", below.display()))
            }
            Err(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn deletes_a_tree_and_follows_no_symlink() {
        let directory = tempfile::tempdir().unwrap();
        let canary = directory.path().join("canary");
        fs::write(&canary, "alive").unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(directory.path(), tree.join("a/link")).unwrap();
        assert_eq!(remove_tree(&tree), Vec::<String>::new());
        assert!(!tree.exists());
        assert_eq!(fs::read_to_string(&canary).unwrap(), "alive");
        assert_eq!(remove_tree(&tree), Vec::<String>::new(), "a second time");
    }
}
