//! The destination's side: makes what arrives, and never outside of the tree.
//!
//! Every path is resolved beneath the tree's own directory without following a link (openat2, RESOLVE_BENEATH and
//! RESOLVE_NO_SYMLINKS), so neither a wrong nor a hostile source can write elsewhere.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, linkat, mkdirat,
    mknodat, openat2, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use thiserror::Error;

use super::entry::{Entry, EntryKind};

#[derive(Debug, Error)]
pub enum WriteError {
    #[error("the source sent a file for {tree:?}, which this container does not have")]
    UnknownTree { tree: String },
    #[error("{tree}: {path:?} could not be written")]
    Write { tree: String, path: String, source: io::Error },
    #[error("the source sent data without a file")]
    NoFile,
    #[error("the path {path:?} leads out of its tree")]
    Escapes { path: String },
}

/// All trees of one move.
pub struct Writer {
    trees: BTreeMap<String, OwnedFd>,
    current: Option<Current>,
    /// Directories get their times last, because making what is in them changes them.
    directory_times: BTreeMap<(String, Vec<u8>), i64>,
    pub written_bytes: u64,
}

struct Current {
    file: std::fs::File,
    entry: Entry,
}

impl Writer {
    /// `trees`: name and directory of each; the directories exist.
    pub fn open(trees: &[(String, PathBuf)]) -> Result<Self, WriteError> {
        let mut open = BTreeMap::new();
        for (name, path) in trees {
            let fd = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty());
            let fd = fd.map_err(|e| WriteError::Write {
                tree: name.clone(),
                path: path.display().to_string(),
                source: e.into(),
            })?;
            open.insert(name.clone(), fd);
        }
        Ok(Self { trees: open, current: None, directory_times: BTreeMap::new(), written_bytes: 0 })
    }

    /// Begins an entry; the one before is complete with this.
    pub fn entry(&mut self, entry: Entry) -> Result<(), WriteError> {
        self.finish_file()?;
        let tree = self.tree(&entry.tree)?;
        let wrap = |e: Errno| failed(&entry, e.into());
        if entry.path.is_empty() {
            set_attributes_fd(tree, &entry).map_err(|e| failed(&entry, e))?;
            self.directory_times.insert((entry.tree.clone(), Vec::new()), entry.modified_ns);
            return Ok(());
        }
        let (dir, name) = parent(tree, &entry.path).map_err(|e| e.unwrap_or_else(|e| failed(&entry, e)))?;
        // What is made in it changes its time, which the source's directory may have kept.
        let holder = entry.path.iter().rposition(|b| *b == b'/').map_or(&[][..], |at| &entry.path[..at]).to_vec();
        let before = rustix::fs::fstat(&dir).map_err(wrap)?;
        let before_ns = before.st_mtime.saturating_mul(1_000_000_000).saturating_add(before.st_mtime_nsec as i64);
        let holder = (entry.tree.clone(), holder);
        let mode = Mode::from_raw_mode(entry.mode & 0o7777);
        match &entry.kind {
            EntryKind::Directory => {
                match mkdirat(&dir, name, Mode::RWXU) {
                    Err(Errno::EXIST) if !is_directory(&dir, name) => {
                        unlinkat(&dir, name, AtFlags::empty()).map_err(wrap)?;
                        mkdirat(&dir, name, Mode::RWXU).map_err(wrap)?;
                    }
                    Err(Errno::EXIST) | Ok(()) => {}
                    Err(e) => return Err(wrap(e)),
                }
                let fd = open_at(&dir, name, OFlags::DIRECTORY | OFlags::RDONLY).map_err(wrap)?;
                set_attributes_fd(&fd, &entry).map_err(|e| failed(&entry, e))?;
                self.directory_times.insert((entry.tree.clone(), entry.path.clone()), entry.modified_ns);
            }
            EntryKind::File { .. } => {
                clear(&dir, name).map_err(wrap)?;
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
                let fd =
                    openat2(&dir, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR, RESOLVE).map_err(wrap)?;
                self.current = Some(Current { file: fd.into(), entry });
            }
            EntryKind::Patch { .. } => {
                let fd = open_at(&dir, name, OFlags::WRONLY).map_err(wrap)?;
                if rustix::fs::fstat(&fd).map_err(wrap)?.st_mode & 0o170_000 != 0o100_000 {
                    return Err(failed(&entry, io::Error::other("what changed is no file here")));
                }
                self.current = Some(Current { file: fd.into(), entry });
            }
            EntryKind::Symlink { target } => {
                clear(&dir, name).map_err(wrap)?;
                symlinkat(OsStr::from_bytes(target), &dir, name).map_err(wrap)?;
                set_attributes_at(&dir, name, &entry).map_err(wrap)?;
            }
            EntryKind::HardLink { to } => {
                let (to_dir, to_name) = parent(tree, to).map_err(|e| e.unwrap_or_else(|e| failed(&entry, e)))?;
                if same_file(&to_dir, to_name, &dir, name) {
                    return Ok(());
                }
                clear(&dir, name).map_err(wrap)?;
                linkat(&to_dir, to_name, &dir, name, AtFlags::empty()).map_err(wrap)?;
            }
            EntryKind::Node { device } => {
                clear(&dir, name).map_err(wrap)?;
                mknodat(&dir, name, FileType::from_raw_mode(entry.mode), mode, *device).map_err(wrap)?;
                set_attributes_at(&dir, name, &entry).map_err(wrap)?;
            }
        }
        self.directory_times.entry(holder).or_insert(before_ns);
        Ok(())
    }

    /// Data of the current file.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let current = self.current.as_ref().ok_or(WriteError::NoFile)?;
        current.file.write_all_at(bytes, offset).map_err(|e| failed(&current.entry, e))?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Removes a path; one that is absent already is fine.
    pub fn remove(&mut self, tree: &str, path: &[u8]) -> Result<(), WriteError> {
        self.finish_file()?;
        let wrap = |source: io::Error| WriteError::Write { tree: tree.to_owned(), path: lossy(path), source };
        let fd = self.tree(tree)?;
        match parent(fd, path) {
            Ok((dir, name)) => clear(&dir, name).map_err(|e| wrap(e.into())),
            Err(Err(e)) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(Err(e)) => Err(wrap(e)),
            Err(Ok(e)) => Err(e),
        }
    }

    /// The end of a round: everything is complete and bears the source's times.
    pub fn end_round(&mut self) -> Result<(), WriteError> {
        self.finish_file()?;
        for ((tree, path), modified_ns) in std::mem::take(&mut self.directory_times) {
            let fd = self.tree(&tree)?;
            let result = if path.is_empty() {
                utimensat(fd, ".", &times(modified_ns), AtFlags::empty())
            } else {
                match parent(fd, &path) {
                    Ok((dir, name)) => utimensat(&dir, name, &times(modified_ns), AtFlags::SYMLINK_NOFOLLOW),
                    Err(_) => continue,
                }
            };
            match result {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(WriteError::Write { tree, path: lossy(&path), source: e.into() }),
            }
        }
        Ok(())
    }

    fn finish_file(&mut self) -> Result<(), WriteError> {
        let Some(Current { file, entry }) = self.current.take() else { return Ok(()) };
        if let EntryKind::File { size } | EntryKind::Patch { size } = entry.kind {
            file.set_len(size).map_err(|e| failed(&entry, e))?;
        }
        let fd = OwnedFd::from(file);
        set_attributes_fd(&fd, &entry).map_err(|e| failed(&entry, e))?;
        rustix::fs::futimens(&fd, &times(entry.modified_ns)).map_err(|e| failed(&entry, e.into()))
    }

    fn tree(&self, name: &str) -> Result<&OwnedFd, WriteError> {
        self.trees.get(name).ok_or_else(|| WriteError::UnknownTree { tree: name.to_owned() })
    }
}

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

fn failed(entry: &Entry, source: io::Error) -> WriteError {
    WriteError::Write { tree: entry.tree.clone(), path: lossy(&entry.path), source }
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn open_at(dir: &OwnedFd, name: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat2(dir, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), RESOLVE)
}

/// The directory a path is in, opened beneath the tree, and its last name.
fn parent<'a>(tree: &OwnedFd, path: &'a [u8]) -> Result<(OwnedFd, &'a Path), Result<WriteError, io::Error>> {
    let escapes = || Ok(WriteError::Escapes { path: lossy(path) });
    let path_ref = Path::new(OsStr::from_bytes(path));
    let plain = path_ref.components().all(|c| matches!(c, std::path::Component::Normal(_)));
    if path.is_empty() || !plain {
        return Err(escapes());
    }
    let name = path_ref.file_name().map(Path::new).ok_or_else(escapes)?;
    let dir = match path_ref.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    match open_at(tree, dir, OFlags::DIRECTORY | OFlags::RDONLY) {
        Ok(fd) => Ok((fd, name)),
        Err(Errno::XDEV | Errno::LOOP) => Err(escapes()),
        Err(e) => Err(Err(e.into())),
    }
}

fn same_file(one_dir: &OwnedFd, one: &Path, other_dir: &OwnedFd, other: &Path) -> bool {
    let stat = |dir: &OwnedFd, name: &Path| rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok();
    let (one, other) = (stat(one_dir, one), stat(other_dir, other));
    one.zip(other).is_some_and(|(a, b)| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

fn is_directory(dir: &OwnedFd, name: &Path) -> bool {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory)
}

/// Makes room for a new entry: nothing of this name is left. Directories are emptied first, bounded by their content.
fn clear(dir: &OwnedFd, name: &Path) -> Result<(), Errno> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    match unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    let inner = openat2(
        dir,
        name,
        OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
        RESOLVE.union(ResolveFlags::NO_XDEV),
    )?;
    for item in rustix::fs::Dir::read_from(&inner)? {
        let item = item?;
        let bytes = item.file_name().to_bytes();
        if bytes != b"." && bytes != b".." {
            clear(&inner, Path::new(OsStr::from_bytes(bytes)))?;
        }
    }
    unlinkat(dir, name, AtFlags::REMOVEDIR)
}

fn times(modified_ns: i64) -> Timestamps {
    let stamp =
        Timespec { tv_sec: modified_ns.div_euclid(1_000_000_000), tv_nsec: modified_ns.rem_euclid(1_000_000_000) };
    Timestamps { last_access: stamp, last_modification: stamp }
}

/// Owner first: changing it clears the set-id bits and file capabilities that come after.
fn set_attributes_fd(fd: &OwnedFd, entry: &Entry) -> io::Result<()> {
    rustix::fs::fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode & 0o7777))?;
    for (name, value) in &entry.xattrs {
        rustix::fs::fsetxattr(fd, name.as_str(), value, XattrFlags::empty())?;
    }
    Ok(())
}

/// For links and nodes, which cannot be opened.
fn set_attributes_at(dir: &OwnedFd, name: &Path, entry: &Entry) -> Result<(), Errno> {
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    rustix::fs::chownat(dir, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
    if !matches!(entry.kind, EntryKind::Symlink { .. }) {
        rustix::fs::chmodat(dir, name, Mode::from_raw_mode(entry.mode & 0o7777), AtFlags::empty())?;
    }
    utimensat(dir, name, &times(entry.modified_ns), AtFlags::SYMLINK_NOFOLLOW)
}
