//! The part of a container's mounts that comes from the host: which they are, and how their
//! sources are made.
//!
//! Mounts that stem from outside must be named to CRIU on both sides of a move, so there are
//! few of them and their list follows from the specification alone:
//!
//! | inside | source |
//! |---|---|
//! | `/dev` | `<dir>/dev`: nodes null zero full random urandom tty, links, mount points |
//! | a masked file | `<dir>/dev/null` |
//! | a masked directory | `<dir>/empty` |
//! | a volume | as given |
//!
//! Everything else (`/proc`, `/sys`, `/dev/pts`, `/dev/shm`, further tmpfs, read-only paths of
//! `/proc`) is made inside by the container's own namespaces.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mknodat, open};
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use serde::{Deserialize, Serialize};

use crate::spec::LaunchSpec;
use crate::sys::{self, Cloned, MountAttributes, mount_setattr};

/// Longest sentence taken from a failed child.
const MAX_SENTENCE_BYTES: u64 = 4096;

/// One mount inside a container whose source is outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalMount {
    pub target_in_container: String,
    pub source_on_host: PathBuf,
}

/// All mounts from outside, in the order they are made. `dir` is the container's directory.
pub fn external_mounts(spec: &LaunchSpec, dir: &Path) -> Vec<ExternalMount> {
    plan(spec, dir).into_iter().map(|planned| planned.mount).collect()
}

struct Planned {
    mount: ExternalMount,
    attributes: MountAttributes,
}

fn plan(spec: &LaunchSpec, dir: &Path) -> Vec<Planned> {
    let planned = |target: &str, source: PathBuf, set: u64, clear: u64| Planned {
        mount: ExternalMount { target_in_container: target.to_owned(), source_on_host: source },
        attributes: MountAttributes { set, clear },
    };
    let quiet = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let null = dir.join("dev/null");
    // The host may mount its state directory without devices.
    let mut all = vec![planned("/dev", dir.join("dev"), quiet, libc::MOUNT_ATTR_NODEV)];
    for volume in &spec.mounts {
        let read_only = if volume.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
        let set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | read_only;
        all.push(planned(&volume.target, volume.source.clone(), set, 0));
    }
    for file in &spec.masks.files {
        all.push(planned(file, null.clone(), quiet | libc::MOUNT_ATTR_RDONLY, libc::MOUNT_ATTR_NODEV));
    }
    for directory in &spec.masks.directories {
        let set = quiet | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_RDONLY;
        all.push(planned(directory, dir.join("empty"), set, 0));
    }
    all
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("cannot make {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot take {source_path} as the source of the container's {target}")]
    Clone { source_path: PathBuf, target: String, source: io::Error },
}

/// Makes the sources that are the container's own (`dir/dev`, `dir/empty`); what exists stays.
/// Called before a start and before a restore.
pub fn prepare_sources(dir: &Path, id_base: u32) -> Result<(), PrepareError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PrepareError::Make { path, source }
    };
    let exists = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
    let owner = (Some(Uid::from_raw(id_base)), Some(Gid::from_raw(id_base)));
    let make_directory = |path: &Path, mode: u32, owned: bool| {
        match std::fs::DirBuilder::new().mode(mode).create(path) {
            Err(error) if exists(&error) => {}
            other => other.map_err(failed(path))?,
        }
        if owned {
            chownat(CWD, path, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| failed(path)(error.into()))?;
        }
        Ok(())
    };
    make_directory(&dir.join("empty"), 0o555, false)?;
    let dev = dir.join("dev");
    for path in [dev.clone(), dev.join("pts"), dev.join("shm")] {
        make_directory(&path, 0o755, true)?;
    }
    let nodes = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    for (name, major, minor) in nodes {
        let path = dev.join(name);
        match mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), makedev(major, minor)) {
            Err(rustix::io::Errno::EXIST) => continue,
            other => other.map_err(|error| failed(&path)(error.into()))?,
        }
        // Not by mknod's mode: the umask would cut it.
        rustix::fs::chmod(&path, Mode::from_raw_mode(0o666)).map_err(|error| failed(&path)(error.into()))?;
        chownat(CWD, &path, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed(&path)(error.into()))?;
    }
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ];
    for (name, target) in links {
        let path = dev.join(name);
        match symlink(target, &path) {
            Err(error) if exists(&error) => continue,
            other => other.map_err(failed(&path))?,
        }
        chownat(CWD, &path, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed(&path)(error.into()))?;
    }
    Ok(())
}

/// A failure to give a restored container's mounts their attributes.
#[derive(Debug, thiserror::Error)]
pub enum RestoredMountsError {
    #[error("cannot start a process that sets the restored mounts' attributes")]
    Start { source: io::Error },
    #[error("the restored mounts: {sentence}")]
    Inside { sentence: String },
}

/// Sets the attributes of all mounts from outside again in a restored container, before it runs.
///
/// CRIU (4.2, `do_bind_mount_v2`) leaves out the flags that a mount has in common with an earlier
/// one of the same directory, although both come from the host with the host's flags: a directory
/// mounted read-only in two places came back writable in the second.
pub(crate) fn set_restored_attributes(
    spec: &LaunchSpec,
    dir: &Path,
    container: BorrowedFd<'_>,
) -> Result<(), RestoredMountsError> {
    let start = |source: io::Error| RestoredMountsError::Start { source };
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| start(error.into()))?;
    // SAFETY: the keeper has one thread.
    let pid = match unsafe { sys::clone_process(0) }.map_err(start)? {
        Cloned::Parent { pid, .. } => pid,
        Cloned::Child => {
            let done = set_attributes_inside(spec, dir, container);
            if let Err(sentence) = &done {
                let _ = File::from(write).write_all(sentence.as_bytes());
            }
            sys::exit_now(i32::from(done.is_err()))
        }
    };
    drop(write);
    let mut sentence = String::new();
    let heard = File::from(read).take(MAX_SENTENCE_BYTES).read_to_string(&mut sentence);
    let ended = rustix::io::retry_on_intr(|| waitpid(Pid::from_raw(pid), WaitOptions::empty()));
    heard.map_err(start)?;
    match ended.map_err(|error| start(error.into()))? {
        Some((_, status)) if status.exit_status() == Some(0) => Ok(()),
        _ => Err(RestoredMountsError::Inside { sentence }),
    }
}

/// In a process of its own: it does not come back from the container's mounts.
fn set_attributes_inside(spec: &LaunchSpec, dir: &Path, container: BorrowedFd<'_>) -> Result<(), String> {
    move_into_thread_name_spaces(container, ThreadNameSpaceType::MOUNT)
        .map_err(|error| format!("join the container's mount namespace: {error}"))?;
    for Planned { mount, attributes } in plan(spec, dir) {
        let target = mount.target_in_container;
        // Paths end at the container's root now. What is no mount any more is refused by the kernel.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        open(&target, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|mount| mount_setattr(mount.as_fd(), attributes, None))
            .map_err(|error| format!("set attributes of {target}: {error}"))?;
    }
    Ok(())
}

/// A mount that is attached nowhere yet and where it belongs.
pub(crate) struct Detached {
    pub target: String,
    pub tree: OwnedFd,
}

/// Takes a detached copy of every source, with its flags set, while still in the host's user
/// namespace: the container's root may not reach the sources by path.
pub(crate) fn clone_sources(spec: &LaunchSpec, dir: &Path) -> Result<Vec<Detached>, PrepareError> {
    plan(spec, dir)
        .into_iter()
        .map(|Planned { mount, attributes }| {
            let failed = |source| PrepareError::Clone {
                source_path: mount.source_on_host.clone(),
                target: mount.target_in_container.clone(),
                source,
            };
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = open_tree(CWD, &mount.source_on_host, flags).map_err(|error| failed(error.into()))?;
            mount_setattr(tree.as_fd(), attributes, None).map_err(failed)?;
            Ok(Detached { target: mount.target_in_container.clone(), tree })
        })
        .collect()
}
