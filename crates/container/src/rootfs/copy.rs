//! Filling a new named volume with what the image has at its place.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, chownat, fchmod,
    fstat, futimens, mkdirat, openat, openat2, readlinkat, statat, symlinkat, unlinkat,
};

/// Most files and directories copied.
pub const MAX_ENTRIES: u64 = 1_000_000;
/// Most bytes copied.
pub const MAX_BYTES: u64 = 64 << 30;
const MAX_DEPTH: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("cannot open {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot copy {name:?} from {path} of the image")]
    Entry { path: PathBuf, name: String, source: io::Error },
    #[error("{path} of the image has more than {what}")]
    TooMuch { path: PathBuf, what: String },
}

/// Copies the image's directory `path` (inside `rootfs`, which is mounted) into the empty
/// directory `volume_dir`: contents, owners as the host sees them, modes, times, links. The
/// volume's root takes over the directory's owner and mode. Sockets, FIFOs and devices are left
/// out. A path that the image does not have, or a volume that holds something, changes nothing.
pub fn copy_image_dir_to_volume(rootfs: &Path, path: &str, volume_dir: &Path) -> Result<(), CopyError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |path: &Path| {
        openat(CWD, path, flags, Mode::empty())
            .map_err(|error| CopyError::Open { path: path.to_owned(), source: error.into() })
    };
    let (root, target) = (open(rootfs)?, open(volume_dir)?);
    let source = match openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
        Ok(source) => source,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(CopyError::Open { path: path.into(), source: error.into() }),
    };
    let mut copy = Copy { path: path.into(), entries: 0, bytes: 0 };
    let own = |source: rustix::io::Errno| CopyError::Open { path: volume_dir.to_owned(), source: source.into() };
    // Directories of a fresh ext4 volume aside, what is there is somebody's.
    if !names(&target).map_err(own)?.is_empty() {
        return Ok(());
    }
    copy.directory(&source, &target, 0)?;
    let stat = fstat(&source).map_err(own)?;
    take_over(&target, &stat).map_err(own)
}

struct Copy {
    path: PathBuf,
    entries: u64,
    bytes: u64,
}

impl Copy {
    fn directory(&mut self, source: &OwnedFd, target: &OwnedFd, depth: usize) -> Result<(), CopyError> {
        if depth > MAX_DEPTH {
            return Err(self.too_much(format!("{MAX_DEPTH} levels of directories")));
        }
        for name in names(source).map_err(self.failed(c"."))? {
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(self.too_much(format!("{MAX_ENTRIES} entries")));
            }
            self.entry(source, target, &name, depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, source: &OwnedFd, target: &OwnedFd, name: &CStr, depth: usize) -> Result<(), CopyError> {
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW).map_err(self.failed(name))?;
        let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(target, name, Mode::RWXU).map_err(self.failed(name))?;
                let open = |at| openat(at, name, flags | OFlags::DIRECTORY, Mode::empty());
                let from = open(source).map_err(self.failed(name))?;
                let to = open(target).map_err(self.failed(name))?;
                self.directory(&from, &to, depth + 1)?;
                take_over(&to, &stat).map_err(self.failed(name))
            }
            FileType::RegularFile => {
                let from = openat(source, name, flags | OFlags::RDONLY, Mode::empty()).map_err(self.failed(name))?;
                let create = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let to = openat(target, name, create, Mode::RUSR).map_err(self.failed(name))?;
                let (mut from, mut to) = (File::from(from), File::from(to));
                // One byte over the rest shows that it is too much.
                let left = MAX_BYTES - self.bytes;
                let copied = io::copy(&mut io::Read::take(&mut from, left + 1), &mut to).map_err(self.failed(name))?;
                self.bytes += copied;
                if copied > left {
                    return Err(self.too_much(format!("{MAX_BYTES} bytes")));
                }
                self.attributes(&from, &to, name)?;
                take_over(&to.into(), &stat).map_err(self.failed(name))
            }
            FileType::Symlink => {
                let link = readlinkat(source, name, Vec::new()).map_err(self.failed(name))?;
                symlinkat(&link, target, name).map_err(self.failed(name))?;
                let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
                chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(self.failed(name))
            }
            // Their meaning ends with the program or host that made them.
            _ => {
                let _ = unlinkat(target, name, AtFlags::empty());
                Ok(())
            }
        }
    }

    /// Extended attributes of the user's own; the kernel's (capabilities, labels) are of the image.
    fn attributes(&self, from: &File, to: &File, name: &CStr) -> Result<(), CopyError> {
        let mut list = [MaybeUninit::uninit(); 4096];
        let Ok((list, _)) = rustix::fs::flistxattr(from, &mut list) else { return Ok(()) };
        for key in list.split(|byte| *byte == 0).filter(|key| key.starts_with(b"user.")) {
            let mut value = vec![0; 64 * 1024];
            let key = OsStr::from_bytes(key);
            let length = rustix::fs::fgetxattr(from, key, value.as_mut_slice()).map_err(self.failed(name))?;
            rustix::fs::fsetxattr(to, key, &value[..length], rustix::fs::XattrFlags::empty())
                .map_err(self.failed(name))?;
        }
        Ok(())
    }

    fn failed<E: Into<io::Error>>(&self, name: &CStr) -> impl FnOnce(E) -> CopyError {
        let (path, name) = (self.path.clone(), name.to_string_lossy().into_owned());
        move |source| CopyError::Entry { path, name, source: source.into() }
    }

    fn too_much(&self, what: String) -> CopyError {
        CopyError::TooMuch { path: self.path.clone(), what }
    }
}

fn names(directory: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        // A volume that is the root of a file system of its own may have this one.
        if !matches!(entry.file_name().to_bytes(), b"." | b".." | b"lost+found") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Owner, mode and times, in the order in which they do not undo each other.
fn take_over(target: &OwnedFd, stat: &Stat) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(target, Some(uid), Some(gid))?;
    fchmod(target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
    };
    futimens(target, &times)
}
