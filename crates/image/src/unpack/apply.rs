//! Entries of a layer archive become files, in overlayfs's form: a deletion is a character device
//! 0:0, a directory that hides those below it carries an attribute (image-spec, layer.md; kernel
//! documentation, overlayfs.rst, "whiteouts and opaque directories").

use super::UnpackError;
use super::root::{Root, components, is_whiteout, set_opaque, shown};
use super::tar::{Entry, Kind, Skip, TarReader};
use crate::limits::Limits;
use crate::tree::unique_name;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const COPY_BUFFER_BYTES: usize = 256 << 10;
const DEFAULT_ACL: &str = "system.posix_acl_default";

/// Unpacks one layer into an empty directory.
pub(super) struct Unpacker<'a> {
    root: Root,
    /// Where replaced directories go, on the same file system.
    trash: BorrowedFd<'a>,
    limits: Limits,
    entries: u64,
    bytes: u64,
    /// Set at the end, because entries inside would change the time and inherit the access list.
    late: HashMap<Vec<u8>, Late>,
    buffer: Vec<u8>,
}

struct Late {
    mtime: (i64, u32),
    default_acl: Option<Vec<u8>>,
}

/// The kind of place an entry found.
#[derive(PartialEq)]
enum Place {
    Free,
    /// A directory, for a directory.
    Kept,
    /// There was a deletion by this same layer.
    Deleted,
}

impl<'a> Unpacker<'a> {
    pub fn new(root: Root, trash: BorrowedFd<'a>, limits: Limits) -> Unpacker<'a> {
        let buffer = vec![0; COPY_BUFFER_BYTES];
        Unpacker { root, trash, limits, entries: 0, bytes: 0, late: HashMap::new(), buffer }
    }

    /// Unpacks every entry of `archive`, then what had to wait.
    pub fn run<R: Skip>(mut self, archive: &mut TarReader<R>) -> Result<(), UnpackError> {
        while let Some(entry) = archive.next().map_err(UnpackError::Tar)? {
            self.entries += 1;
            if self.entries > self.limits.max_layer_entries {
                return Err(UnpackError::TooManyEntries { max: self.limits.max_layer_entries });
            }
            self.bytes = self.bytes.saturating_add(entry.size);
            if self.bytes > self.limits.max_layer_bytes {
                return Err(UnpackError::TooLarge { max: self.limits.max_layer_bytes });
            }
            self.apply(&entry, archive)?;
        }
        self.finish()
    }

    fn apply<R: Skip>(&mut self, entry: &Entry, archive: &mut TarReader<R>) -> Result<(), UnpackError> {
        let parts = components(&entry.path)?;
        let io = |action| move |errno| UnpackError::io(action, &entry.path, errno);
        let Some((&name, dir)) = parts.split_last() else {
            if entry.kind != Kind::Directory {
                return Err(UnpackError::Unusable {
                    path: shown(&entry.path),
                    why: "names the root but is no directory",
                });
            }
            return self.directory_attributes(
                entry,
                b".".to_vec(),
                self.root.fd().try_clone_to_owned().map_err(|source| UnpackError::Io {
                    action: "open",
                    path: shown(&entry.path),
                    source,
                })?,
            );
        };
        // Bookkeeping of AUFS that old images carry.
        let opaque = name == b".wh..wh..opq";
        if dir.iter().any(|part| part.starts_with(b".wh..wh.")) || (name.starts_with(b".wh..wh.") && !opaque) {
            return Ok(());
        }
        let parent = self.root.make_dir(dir)?;
        if opaque {
            return set_opaque(parent.as_fd(), b".").map_err(io("mark directory as opaque"));
        }
        if let Some(deleted) = name.strip_prefix(b".wh.") {
            return self.whiteout(parent.as_fd(), deleted, entry);
        }
        if entry.kind == Kind::HardLink {
            return self.hard_link(parent.as_fd(), name, entry);
        }
        let place = self.clear(parent.as_fd(), name, entry.kind).map_err(io("replace"))?;
        let mode = Mode::from_raw_mode(entry.mode);
        match entry.kind {
            Kind::Directory => {
                if place != Place::Kept {
                    fs::mkdirat(&parent, name, Mode::RWXU).map_err(io("make directory"))?;
                }
                if place == Place::Deleted {
                    set_opaque(parent.as_fd(), name).map_err(io("mark directory as opaque"))?;
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = fs::openat(&parent, name, flags, Mode::empty()).map_err(io("open directory"))?;
                return self.directory_attributes(entry, parts.join(&b'/'), opened);
            }
            Kind::File => return self.file(&parent, name, entry, archive),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(UnpackError::Unusable {
                        path: shown(&entry.path),
                        why: "is a symbolic link without a valid target",
                    });
                }
                fs::symlinkat(entry.link.as_slice(), &parent, name).map_err(io("make symbolic link"))?;
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let (kind, device) = match entry.kind {
                    Kind::CharDevice => (FileType::CharacterDevice, entry.device),
                    Kind::BlockDevice => (FileType::BlockDevice, entry.device),
                    _ => (FileType::Fifo, (0, 0)),
                };
                if entry.kind == Kind::CharDevice && device == (0, 0) {
                    let why = "is a character device 0:0, which overlayfs takes for a deletion";
                    return Err(UnpackError::Unusable { path: shown(&entry.path), why });
                }
                fs::mknodat(&parent, name, kind, mode, fs::makedev(device.0, device.1)).map_err(io("make device"))?;
            }
            Kind::HardLink => return Ok(()),
        }
        // Links, devices and fifos: by name, because opening them would do something else.
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(io("set owner of"))?;
        if entry.kind != Kind::Symlink {
            fs::chmodat(&parent, name, mode, AtFlags::empty()).map_err(io("set mode of"))?;
        }
        let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
        for (key, value) in wanted_xattrs(entry)? {
            fs::lsetxattr(path.as_slice(), key, value, XattrFlags::empty()).map_err(io("set extended attribute of"))?;
        }
        fs::utimensat(&parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(io("set time of"))
    }

    /// Makes sure that `name` can be created, or kept if directory meets directory.
    fn clear(&self, parent: BorrowedFd<'_>, name: &[u8], kind: Kind) -> Result<Place, Errno> {
        let stat = match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(Place::Free),
            result => result?,
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            if kind == Kind::Directory {
                return Ok(Place::Kept);
            }
            fs::renameat(parent, name, self.trash, unique_name("replaced").as_str())?;
            return Ok(Place::Free);
        }
        fs::unlinkat(parent, name, AtFlags::empty())?;
        Ok(if is_whiteout(&stat) { Place::Deleted } else { Place::Free })
    }

    /// A deletion touches lower layers only: what this layer itself has at that name stays, and if
    /// that is a directory it must hide the lower one.
    fn whiteout(&self, parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(UnpackError::Escape { path: shown(&entry.path), why: "deletes no proper name" });
        }
        let io = |errno| UnpackError::io("record the deletion", &entry.path, errno);
        match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {
                fs::mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), fs::makedev(0, 0)).map_err(io)
            }
            Err(errno) => Err(io(errno)),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                set_opaque(parent, name).map_err(io)
            }
            Ok(_) => Ok(()),
        }
    }

    fn hard_link(&self, parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let io = |errno| UnpackError::io("make hard link", &entry.path, errno);
        let missing = || UnpackError::LinkTarget { path: shown(&entry.path), target: shown(&entry.link) };
        let parts = components(&entry.link)?;
        let (&last, dir) = parts.split_last().ok_or_else(missing)?;
        let from = self.root.find_dir(dir).map_err(io)?.ok_or_else(missing)?;
        let target = match fs::statat(&from, last, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Err(missing()),
            result => result.map_err(io)?,
        };
        if is_whiteout(&target) {
            return Err(missing());
        }
        if FileType::from_raw_mode(target.st_mode) == FileType::Directory {
            return Err(UnpackError::Unusable { path: shown(&entry.path), why: "is a hard link to a directory" });
        }
        if let Ok(there) = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            && (there.st_dev, there.st_ino) == (target.st_dev, target.st_ino)
        {
            return Ok(());
        }
        self.clear(parent, name, Kind::HardLink).map_err(io)?;
        // Without AT_SYMLINK_FOLLOW: a link to a symbolic link is one to the link itself.
        fs::linkat(&from, last, parent, name, AtFlags::empty()).map_err(io)
    }

    fn file<R: Skip>(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        archive: &mut TarReader<R>,
    ) -> Result<(), UnpackError> {
        let io = |action| move |errno| UnpackError::io(action, &entry.path, errno);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let file = fs::openat2(parent, name, flags, Mode::RUSR | Mode::WUSR, resolve).map_err(io("create"))?;
        let whole = [(0, entry.stored)];
        for &(offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let want = (end - at).min(self.buffer.len() as u64) as usize;
                let got = archive.read_data(&mut self.buffer[..want]).map_err(UnpackError::Tar)?;
                if got == 0 {
                    return Err(UnpackError::Tar(super::TarError::Truncated));
                }
                let mut written = 0;
                while written < got {
                    written += rustix::io::pwrite(&file, &self.buffer[written..got], at + written as u64)
                        .map_err(io("write"))?;
                }
                at += got as u64;
            }
        }
        if entry.sparse.is_some() {
            fs::ftruncate(&file, entry.size).map_err(io("write"))?;
        }
        attributes(file.as_fd(), entry)?;
        fs::futimens(&file, &times(entry.mtime)).map_err(io("set time of"))
    }

    fn directory_attributes(&mut self, entry: &Entry, path: Vec<u8>, dir: OwnedFd) -> Result<(), UnpackError> {
        attributes(dir.as_fd(), entry)?;
        let acl = entry.xattrs.iter().find(|(key, _)| key == DEFAULT_ACL.as_bytes());
        self.late.insert(path, Late { mtime: entry.mtime, default_acl: acl.map(|(_, value)| value.clone()) });
        Ok(())
    }

    /// Times and default access lists of directories; those that were replaced since are passed over.
    fn finish(self) -> Result<(), UnpackError> {
        for (path, late) in &self.late {
            let io = |errno| UnpackError::io("set time of", path, errno);
            let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
            let Some((&name, dir)) = parts.split_last() else { continue };
            let Some(parent) = self.root.find_dir(dir).map_err(io)? else { continue };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = match fs::openat(&parent, name, flags, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                result => result.map_err(io)?,
            };
            if let Some(acl) = &late.default_acl {
                fs::fsetxattr(&opened, DEFAULT_ACL, acl, XattrFlags::empty()).map_err(io)?;
            }
            fs::futimens(&opened, &times(late.mtime)).map_err(io)?;
        }
        Ok(())
    }
}

/// Owner, mode and attributes of an open file or directory. The order matters: a change of owner
/// clears the set-id bits and the file capabilities.
fn attributes(fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), UnpackError> {
    let io = |action| move |errno| UnpackError::io(action, &entry.path, errno);
    fs::fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).map_err(io("set owner of"))?;
    fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(io("set mode of"))?;
    for (key, value) in wanted_xattrs(entry)?.filter(|(key, _)| *key != DEFAULT_ACL.as_bytes()) {
        fs::fsetxattr(fd, key, value, XattrFlags::empty()).map_err(io("set extended attribute of"))?;
    }
    Ok(())
}

/// The attributes that belong to the image. Overlayfs's own would let an image rewrite how its
/// layers are merged and are refused; labels of the host's security modules are left out.
fn wanted_xattrs(entry: &Entry) -> Result<impl Iterator<Item = (&[u8], &[u8])>, UnpackError> {
    let overlay = |key: &[u8]| key.starts_with(b"trusted.overlay.") || key.starts_with(b"user.overlay.");
    if entry.xattrs.iter().any(|(key, _)| overlay(key) || key.contains(&0)) {
        let why = "carries an extended attribute that controls overlayfs";
        return Err(UnpackError::Unusable { path: shown(&entry.path), why });
    }
    let wanted = |key: &[u8]| {
        key.starts_with(b"user.")
            || key == b"security.capability"
            || key == b"system.posix_acl_access"
            || key == DEFAULT_ACL.as_bytes()
    };
    Ok(entry.xattrs.iter().map(|(key, value)| (key.as_slice(), value.as_slice())).filter(move |(key, _)| wanted(key)))
}

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}
