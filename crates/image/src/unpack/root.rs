//! The directory a layer is unpacked into: every path of an archive is resolved inside it, as a
//! container with this root would, and never outside.
//!
//! Directory symlinks of the same layer (`lib -> usr/lib`, then `lib/x`) are followed with the root
//! as `/`; the last component of a path never is.

use super::UnpackError;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, XattrFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Symbolic links followed in one path: the kernel's own bound.
const MAX_LINKS: usize = 40;
/// Tries while renames elsewhere on the host make the kernel unsure about a `..` in a link.
const MAX_RESOLVE_TRIES: usize = 16;
/// Overlayfs's mark of a directory that hides those below it.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";

const OPEN_DIR: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

pub(super) struct Root {
    fd: OwnedFd,
}

/// The components of a path inside an archive; `.` and empty ones left out. What could lead out is
/// refused rather than bent: no archive of a layer needs it.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, UnpackError> {
    let escape = |why| Err(UnpackError::Escape { path: shown(path), why });
    if path.starts_with(b"/") {
        return escape("is absolute");
    }
    if path.contains(&0) {
        return escape("contains a zero byte");
    }
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return escape("contains ..");
    }
    Ok(parts)
}

/// A path for messages.
pub(super) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

impl Root {
    pub fn open(path: &Path) -> Result<Root, Errno> {
        Ok(Root { fd: fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())? })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The directory at `parts`; None if it, or something on the way, is not there or no directory.
    pub fn find_dir(&self, parts: &[&[u8]]) -> Result<Option<OwnedFd>, Errno> {
        let path = match parts {
            [] => b".".to_vec(),
            _ => parts.join(&b'/'),
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        for _ in 0..MAX_RESOLVE_TRIES {
            match fs::openat2(&self.fd, path.as_slice(), OPEN_DIR, Mode::empty(), resolve) {
                Ok(fd) => return Ok(Some(fd)),
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::AGAIN)
    }

    /// The directory at `parts`, made where it is missing: mode 0755, owner 0:0, as every runtime
    /// does for parents that a layer does not list.
    pub fn make_dir(&self, parts: &[&[u8]]) -> Result<OwnedFd, UnpackError> {
        match self.find_dir(parts) {
            Ok(Some(fd)) => return Ok(fd),
            Ok(None) => {}
            Err(errno) => return Err(UnpackError::io("open directory", &parts.join(&b'/'), errno)),
        }
        self.walk(parts).map_err(|errno| match errno {
            Errno::NOTDIR => UnpackError::NotDirectory { path: shown(&parts.join(&b'/')) },
            _ => UnpackError::io("make directory", &parts.join(&b'/'), errno),
        })
    }

    /// Goes one component at a time and makes what is missing, also behind a link whose target is
    /// not there. The kernel follows nothing here; `reached` holds no link and no `..`.
    fn walk(&self, parts: &[&[u8]]) -> Result<OwnedFd, Errno> {
        let mut ahead: VecDeque<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let mut reached: Vec<Vec<u8>> = Vec::new();
        let mut current = self.reopen(&reached)?;
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    reached.pop();
                    current = self.reopen(&reached)?;
                    continue;
                }
                _ => {}
            }
            let next = self.step(&current, &name)?;
            let stat = fs::fstat(&next)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    reached.push(name);
                    current = next;
                }
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    let target = fs::readlinkat(&next, "", Vec::new())?.into_bytes();
                    if target.starts_with(b"/") {
                        reached.clear();
                        current = self.reopen(&reached)?;
                    }
                    for part in target.split(|byte| *byte == b'/').rev() {
                        ahead.push_front(part.to_vec());
                    }
                }
                _ => return Err(Errno::NOTDIR),
            }
        }
        Ok(current)
    }

    fn reopen(&self, parts: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
        let path = if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        fs::openat2(&self.fd, path.as_slice(), OPEN_DIR, Mode::empty(), resolve)
    }

    /// What is at `name`, a new directory if nothing is or if it was deleted by this same layer.
    fn step(&self, dir: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let open = || fs::openat2(dir, name, flags, Mode::empty(), resolve);
        match open() {
            Ok(found) if is_whiteout(&fs::fstat(&found)?) => {
                fs::unlinkat(dir, name, AtFlags::empty())?;
                new_dir(dir.as_fd(), name)?;
                set_opaque(dir.as_fd(), name)?;
            }
            Ok(found) => return Ok(found),
            Err(Errno::NOENT) => new_dir(dir.as_fd(), name)?,
            Err(errno) => return Err(errno),
        }
        open()
    }
}

fn new_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    fs::mkdirat(dir, name, Mode::from_raw_mode(0o755))?;
    // Not what a set-group-id parent or the umask would give.
    fs::chownat(dir, name, Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::SYMLINK_NOFOLLOW)?;
    fs::chmodat(dir, name, Mode::from_raw_mode(0o755), AtFlags::empty())
}

/// Marks the directory `name` (`.`: `dir` itself) as hiding what lower layers have there.
pub(super) fn set_opaque(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = fs::openat(dir, name, flags, Mode::empty())?;
    fs::fsetxattr(&opened, OPAQUE, b"y", XattrFlags::empty())
}
