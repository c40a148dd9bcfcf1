//! The source's side: walks a tree, remembers what it has sent, finds what changed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use godwit_memory::Place;
use thiserror::Error;

use super::blocks::Blocks;
use super::entry::{Entry, EntryKind};
use super::follow::{Followed, Following};

/// Two writes within one grain of the file system's clock may bear the same ctime, in milliseconds.
pub const CTIME_GRAIN_MS: u64 = 20;
/// The most entries of one tree.
pub const MAX_ENTRIES: usize = 10_000_000;
const MAX_XATTR_BYTES: usize = 64 << 10;

#[derive(Debug, Error)]
pub enum ScanError {
    #[error("{} could not be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} has more than {MAX_ENTRIES} entries", root.display())]
    TooMany { root: PathBuf },
    /// The receiver of entries and data has gone.
    #[error("the destination takes no more files")]
    Stopped,
}

/// What the kernel says of a version of a file: a different stamp is a different version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    ctime_ns: i128,
}

/// What one round did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanStats {
    pub entries_sent: u64,
    pub bytes_sent: u64,
    /// To find these, of files' data.
    pub bytes_read: u64,
    pub removed: u64,
}

/// Takes what a scan finds, in an order in which it can be made: directories before what is in them.
pub trait Sink {
    /// `false` stops the scan.
    fn entry(&mut self, entry: Entry) -> bool;
    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> bool;
    fn remove(&mut self, tree: &str, path: Vec<u8>) -> bool;
}

/// One tree over all rounds of a move.
pub struct Scanner {
    tree: String,
    root: PathBuf,
    /// Everything the destination has, by path.
    sent: BTreeMap<Vec<u8>, Stamp>,
    /// What it has of regular files.
    held: HashMap<Vec<u8>, Held>,
    /// The destination can change a file that it has.
    patches: bool,
    /// Where the tree is, if its files can be followed; unknown before the first round.
    place: Option<Option<Place>>,
}

/// What the destination has of a file, and whether the kernel tells what is written to it since.
#[derive(Default)]
struct Held {
    blocks: Blocks,
    followed: Option<Followed>,
}

/// What one round goes by.
struct Round<'a> {
    sink: &'a mut dyn Sink,
    following: Option<Following<'a>>,
    stats: ScanStats,
}

impl Round<'_> {
    fn has_written(&self, held: Option<&Held>) -> bool {
        let followed = held.and_then(|held| held.followed.as_ref());
        self.following.as_ref().zip(followed).is_some_and(|(following, followed)| following.has_written(followed))
    }

    fn forget(&mut self, held: Option<Held>) {
        let followed = held.and_then(|held| held.followed);
        if let Some((following, followed)) = self.following.as_mut().zip(followed) {
            following.forget(&followed);
        }
    }
}

impl Scanner {
    pub fn new(tree: impl Into<String>, root: impl Into<PathBuf>) -> Self {
        let (tree, root) = (tree.into(), root.into());
        Self { tree, root, sent: BTreeMap::new(), held: HashMap::new(), patches: false, place: None }
    }

    /// From now on a changed file costs what changed in it: for destinations that know [`EntryKind::Patch`].
    pub fn send_patches(&mut self) {
        self.patches = true;
    }

    pub fn tree(&self) -> &str {
        &self.tree
    }

    /// One round. `always` names paths (relative to the tree) that are looked at whatever their ctime says. With
    /// `following`, of files that it follows only what was written is read; a round without it ends that.
    ///
    /// A file that vanishes between being listed and being read is no error while the container runs.
    pub fn round(
        &mut self,
        always: &HashSet<Vec<u8>>,
        following: Option<Following<'_>>,
        sink: &mut dyn Sink,
    ) -> Result<ScanStats, ScanError> {
        let mut round = Round { sink, following, stats: ScanStats::default() };
        if self.patches && self.place.is_none() {
            self.place = round.following.as_mut().map(|following| {
                let place = following.place(&self.root);
                place.inspect_err(|why| tracing::debug!(tree = self.tree, %why, "changed files are read whole")).ok()
            });
        }
        let mut seen: BTreeMap<Vec<u8>, Stamp> = BTreeMap::new();
        let mut links: HashMap<u64, Vec<u8>> = HashMap::new();
        let mut resent: HashSet<u64> = HashSet::new();
        let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
        let mut todo: Vec<Vec<u8>> = vec![Vec::new()];
        while let Some(path) = todo.pop() {
            let full = self.full(&path);
            let Some(meta) = present(&full, std::fs::symlink_metadata(&full))? else { continue };
            if seen.len() >= MAX_ENTRIES {
                return Err(ScanError::TooMany { root: self.root.clone() });
            }
            let ctime_ns = i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec());
            let mut stamp = Stamp { inode: meta.ino(), size: meta.size(), ctime_ns };
            if now_ns - ctime_ns < i128::from(CTIME_GRAIN_MS) * 1_000_000 {
                // May change again without showing it: never equal to the next look.
                stamp.ctime_ns = -1;
            }
            let file = meta.file_type().is_file();
            let first_name = if file && meta.nlink() > 1 { links.get(&meta.ino()).cloned() } else { None };
            let changed = self.sent.get(&path) != Some(&stamp)
                || stamp.ctime_ns < 0
                || always.contains(&path)
                || round.has_written(self.held.get(&path));
            let stale_link = first_name.is_some() && resent.contains(&meta.ino());
            if (changed || stale_link) && self.send(&path, &full, &meta, first_name.as_deref(), &mut round)? {
                resent.insert(meta.ino());
            }
            if file && meta.nlink() > 1 && first_name.is_none() {
                links.insert(meta.ino(), path.clone());
            }
            if meta.is_dir() {
                for name in self.names(&full)? {
                    let mut child = path.clone();
                    if !child.is_empty() {
                        child.push(b'/');
                    }
                    child.extend_from_slice(&name);
                    todo.push(child);
                }
            }
            seen.insert(path, stamp);
        }
        // Deepest first, so that a directory is empty when its turn comes.
        let gone: Vec<Vec<u8>> = self.sent.keys().rev().filter(|p| !seen.contains_key(*p)).cloned().collect();
        for path in gone {
            round.stats.removed += 1;
            round.forget(self.held.remove(&path));
            if !round.sink.remove(&self.tree, path) {
                return Err(ScanError::Stopped);
            }
        }
        self.sent = seen;
        Ok(round.stats)
    }

    fn full(&self, path: &[u8]) -> PathBuf {
        if path.is_empty() { self.root.clone() } else { self.root.join(std::ffi::OsStr::from_bytes(path)) }
    }

    /// Sorted, last first, because the walk takes from the end.
    fn names(&self, dir: &Path) -> Result<Vec<Vec<u8>>, ScanError> {
        let read = |source| ScanError::Read { path: dir.to_owned(), source };
        let Some(list) = present(dir, std::fs::read_dir(dir))? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for item in list {
            names.push(item.map_err(read)?.file_name().as_bytes().to_vec());
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(names)
    }

    /// Whether the destination makes it anew.
    fn send(
        &mut self,
        path: &[u8],
        full: &Path,
        meta: &std::fs::Metadata,
        first_name: Option<&[u8]>,
        round: &mut Round<'_>,
    ) -> Result<bool, ScanError> {
        let kind = meta.file_type();
        let file = if kind.is_file() && first_name.is_none() {
            match present(full, File::open(full))? {
                Some(file) => Some(file),
                None => return Ok(true),
            }
        } else {
            None
        };
        // An older version of this very file under this name; nothing else that had it is of use.
        let mut held = self.held.remove(path);
        if file.is_none() || self.sent.get(path).is_none_or(|stamp| stamp.inode != meta.ino()) {
            round.forget(held.take());
        }
        let entry_kind = if kind.is_dir() {
            EntryKind::Directory
        } else if kind.is_symlink() {
            let Some(target) = present(full, std::fs::read_link(full))? else { return Ok(true) };
            EntryKind::Symlink { target: target.as_os_str().as_bytes().to_vec() }
        } else if let Some(to) = first_name {
            EntryKind::HardLink { to: to.to_vec() }
        } else if held.is_some() {
            EntryKind::Patch { size: meta.size() }
        } else if kind.is_file() {
            EntryKind::File { size: meta.size() }
        } else {
            EntryKind::Node { device: meta.rdev() }
        };
        let entry = Entry {
            tree: self.tree.clone(),
            path: path.to_vec(),
            kind: entry_kind,
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            modified_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            xattrs: xattrs(full)?,
        };
        round.stats.entries_sent += 1;
        if !round.sink.entry(entry) {
            return Err(ScanError::Stopped);
        }
        let anew = held.is_none();
        if let Some(file) = file {
            let Held { mut blocks, mut followed } = held.unwrap_or_default();
            let sink = &mut *round.sink;
            let parts = match &mut round.following {
                Some(following) => {
                    // Data without bytes: nothing but a sign of life.
                    let alive = &mut || sink.data(0, Vec::new());
                    following.parts(&mut followed, self.place.flatten(), &file, meta, alive)
                }
                None => {
                    followed = None;
                    None
                }
            };
            let sent = blocks.send(&file, meta.size(), parts.as_deref(), &mut |offset, bytes| sink.data(offset, bytes));
            let sent = sent.map_err(|source| ScanError::Read { path: full.to_owned(), source })?;
            round.stats.bytes_sent += sent.sent_bytes;
            round.stats.bytes_read += sent.read_bytes;
            if !sent.open {
                return Err(ScanError::Stopped);
            }
            if self.patches {
                self.held.insert(path.to_vec(), Held { blocks, followed });
            }
        }
        Ok(anew)
    }
}

/// Overlay's own notes that are about the source host's lower layers and would be wrong elsewhere.
const OVERLAY_NOTES: [&str; 4] =
    ["trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.nlink", "trusted.overlay.uuid"];

fn xattrs(path: &Path) -> Result<Vec<(String, Vec<u8>)>, ScanError> {
    let read = |e: rustix::io::Errno| ScanError::Read { path: path.to_owned(), source: e.into() };
    let mut names = vec![0u8; MAX_XATTR_BYTES];
    let n = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(n) => n,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(read(e)),
    };
    let mut out = Vec::new();
    for name in names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = String::from_utf8_lossy(name).into_owned();
        if OVERLAY_NOTES.contains(&name.as_str()) {
            continue;
        }
        let mut value = vec![0u8; MAX_XATTR_BYTES];
        match rustix::fs::lgetxattr(path, name.as_str(), &mut value[..]) {
            Ok(n) => {
                value.truncate(n);
                out.push((name, value));
            }
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(read(e)),
        }
    }
    out.sort();
    Ok(out)
}

/// `None` where the file has vanished, which happens under a running container.
fn present<T>(path: &Path, result: io::Result<T>) -> Result<Option<T>, ScanError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ScanError::Read { path: path.to_owned(), source }),
    }
}
