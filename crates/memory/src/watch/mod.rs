//! Which pages of files are written, told by the kernel as it happens.
//!
//! ```text
//!   watch ─▶ write_back (its pages are clean) ─▶ read ─▶ … ─▶ take, settle ─▶ written ─▶ write_back ─▶ read those
//! ```
//!
//! The kernel tells each page that was clean and becomes dirty, before anybody can see it clean again. A page that is
//! dirty already is not told again; so a look is complete only if the file was written back after what it is compared
//! with was told, and before that was read. Writes through mappings are told too: cleaning a page protects it.
//!
//! What changes a file without a dirty page is seen otherwise: writes past the page cache (O_DIRECT) are told as such,
//! the rest (holes, cut ends, shared blocks) is where the file is on the disk ([`Extents`]).

mod extents;
mod program;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, IFlags, Mode, OFlags, StatxFlags};
use rustix::thread::{MembarrierCommand, membarrier};
use thiserror::Error;

use crate::bpf::{BpfError, Link, Map, MapKind, Ring};
use crate::pages::page_size;
use crate::sys::file;

pub use extents::Extents;

/// Files that are watched at once, at the most.
pub const MAX_WATCHED_FILES: u32 = 16 << 10;
/// Room for records between two looks: 700,000 pages, or as many larger pieces.
const RING_BYTES: u32 = 16 << 20;
/// What is written back in one go, in bytes: even a disk of 10 MB/s needs no more than half a minute for it.
const WRITE_BACK_BYTES: usize = 256 << 20;
/// A folio is no larger than 2^this pages.
const MAX_ORDER: u32 = 20;
/// Spans of one file that are kept before they are put in order and joined.
const MANY_SPANS: usize = 4096;
/// File systems whose ways of changing a file were looked at: ext4, xfs, btrfs.
const KNOWN: [i64; 3] = [EXT4, 0x5846_5342, 0x9123_683e];
const EXT4: i64 = 0xef53;
const STATX_ATTR_DAX: u64 = 0x20_0000;

#[derive(Debug, Error)]
pub enum WatchError {
    #[error("written pages of files cannot be told")]
    Bpf(#[from] BpfError),
    #[error("{what} cannot be looked at")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{path}: {why}")]
    Unfit { path: String, why: &'static str },
}

/// Where a tree of files is: the device as the kernel calls it, and as stat does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    kernel: u32,
    stat: u64,
}

/// A watched file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId(u32);

/// What was written in a file between two looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// These bytes at the most: whole pages, in order, apart from each other.
    Parts(Vec<Range<u64>>),
    /// It could be anything.
    Unknown,
}

/// One file's written pages.
#[derive(Debug, Default)]
struct Told {
    spans: Vec<Range<u64>>,
    /// How many of them are in order and joined.
    joined: usize,
    /// Something else happened since this was last asked for.
    unknown: bool,
    /// Somebody goes past the page cache, or did: what is told of it says nothing any more.
    direct: bool,
    key: Vec<u8>,
}

/// Watches files from its making until it is dropped. What the host's other files cost is one look-up for each page
/// that becomes dirty.
#[derive(Debug)]
pub struct FileWatch {
    files: Map,
    ring: Ring,
    lost: Map,
    lost_before: u64,
    told: Vec<Told>,
    /// The slot of each inode, as `files` has it.
    slots: HashMap<Vec<u8>, u32>,
    /// What writing back has taken so far, waiting for the disk included.
    pub written_back: Duration,
    _links: Vec<Link>,
}

impl FileWatch {
    /// Takes a few milliseconds. Needs what [`crate::bpf`] needs, and kernel 6.6 or newer.
    pub fn new() -> Result<Self, WatchError> {
        Self::with_room(RING_BYTES)
    }

    /// The same with room for so many bytes of records, 24 each: a power of two, and of pages.
    pub fn with_room(ring_bytes: u32) -> Result<Self, WatchError> {
        let files = Map::create(MapKind::Hash, "godwit_files", program::KEY_BYTES, 4, MAX_WATCHED_FILES)?;
        let ring = Ring::create("godwit_written", ring_bytes)?;
        let lost = Map::create(MapKind::Array, "godwit_lost", 4, 8, 1)?;
        let links = program::attach(&program::Tables { files: &files, ring: &ring, lost: &lost })?;
        let (told, slots, written_back) = (Vec::new(), HashMap::new(), Duration::ZERO);
        Ok(Self { files, ring, lost, lost_before: 0, told, slots, written_back, _links: links })
    }

    /// Whether files in this directory can be watched: tried with a file without a name.
    pub fn place(&mut self, directory: &Path) -> Result<Place, WatchError> {
        let path = || directory.display().to_string();
        let failed = |source: io::Error| WatchError::Io { what: path(), source };
        let unfit = |why| WatchError::Unfit { path: path(), why };
        let kind = rustix::fs::statfs(directory).map_err(|e| failed(e.into()))?.f_type;
        if !KNOWN.contains(&kind) {
            return Err(unfit("its file system is none whose writes are all told"));
        }
        let device = kernel_device(directory).map_err(failed)?;
        if kind == EXT4 && !journals_metadata_only(device).map_err(failed)? {
            return Err(unfit("its file system writes content to its journal first"));
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(directory, flags, Mode::RUSR).map_err(|e| failed(e.into()))?);
        let place = Place { kernel: device, stat: file.metadata().map_err(failed)?.dev() };
        let id = self.watch(&file, place).map_err(failed)?.ok_or_else(|| unfit("a new file there is not watched"))?;
        let page = vec![1; page_size() as usize];
        let mut told = true;
        for at in [0, page_size(), 0] {
            file.write_all_at(&page, at).map_err(failed)?;
            self.take()?;
            told &= self.written(id) == Written::Parts(std::iter::once(at..at + page_size()).collect());
            self.write_back(&file, 2 * page_size(), &mut || true).map_err(failed)?;
        }
        self.forget(id);
        if told { Ok(place) } else { Err(unfit("the kernel does not tell what is written there")) }
    }

    /// Watches a file from now on; `None` if it cannot be: on another file system, of a kind that goes other ways, or
    /// one too many. Whoever watched it under an earlier number does so no longer: [`FileWatch::is_watched`].
    pub fn watch(&mut self, file: &File, place: Place) -> io::Result<Option<FileId>> {
        let flags = StatxFlags::BASIC_STATS;
        let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, flags)?;
        // Content in the journal is told when it leaves it, which is too late.
        let journaled = rustix::fs::ioctl_getflags(file)?.contains(IFlags::JOURNALING);
        if file.metadata()?.dev() != place.stat || stat.stx_attributes.bits() & STATX_ATTR_DAX != 0 || journaled {
            return Ok(None);
        }
        let slot = u32::try_from(self.told.len()).map_err(io::Error::other)?;
        let mut key = stat.stx_ino.to_ne_bytes().to_vec();
        key.extend(place.kernel.to_ne_bytes());
        key.extend([0; 4]);
        if self.files.put(&key, &slot.to_ne_bytes()).is_err() {
            return Ok(None);
        }
        self.slots.insert(key.clone(), slot);
        self.told.push(Told { key, ..Told::default() });
        Ok(Some(FileId(slot)))
    }

    /// Watches it no more.
    pub fn forget(&mut self, id: FileId) {
        let Some(told) = self.told.get_mut(id.0 as usize) else { return };
        let told = std::mem::take(told);
        // Its inode may be watched anew under another number.
        if self.slots.get(&told.key) == Some(&id.0) {
            self.slots.remove(&told.key);
            // What comes after would be told of nobody.
            let _ = self.files.remove(&told.key);
        }
    }

    /// Whether what is written to the file is still told under this number.
    pub fn is_watched(&self, id: FileId) -> bool {
        self.told.get(id.0 as usize).is_some_and(|told| self.slots.get(&told.key) == Some(&id.0))
    }

    /// Takes in what was told up to now.
    pub fn take(&mut self) -> Result<(), WatchError> {
        let all = &mut self.told;
        self.ring.take(|record| {
            let (Some(page), Some(slot), Some(order)) = (word(record, 0), half(record, 8), half(record, 12)) else {
                return;
            };
            let Some(told) = all.get_mut(slot as usize) else { return };
            if order > MAX_ORDER {
                (told.unknown, told.direct) = (true, true);
                return;
            }
            told.add(page..page.saturating_add(1 << order));
        });
        let lost = self.lost.get(&[0; 4])?.and_then(|v| word(&v, 0)).unwrap_or(u64::MAX);
        if lost != self.lost_before {
            self.lost_before = lost;
            all.iter_mut().for_each(|told| told.unknown = true);
        }
        Ok(())
    }

    /// Waits until pages that have been told are marked as dirty, too: told a moment before, and written back now, they
    /// could be passed over. Milliseconds, so once for all files; not needed where nobody writes any more.
    pub fn settle(&self) {
        // A grace period of RCU, which a marking under way holds up. Kernels that refuse (nohz_full) are left with a
        // window of some ten nanoseconds.
        let _ = membarrier(MembarrierCommand::Global);
    }

    /// Whether anything of the file has been told since it was last asked for, or could have been under another number.
    pub fn has_written(&self, id: FileId) -> bool {
        let told = self.told.get(id.0 as usize);
        told.is_some_and(|told| !told.spans.is_empty() || told.unknown) || !self.is_watched(id)
    }

    /// What of a file was told since this was last asked for, of what was taken in.
    pub fn written(&mut self, id: FileId) -> Written {
        let Some(told) = self.told.get_mut(id.0 as usize) else { return Written::Unknown };
        told.join();
        told.joined = 0;
        let spans = std::mem::take(&mut told.spans);
        let unknown = std::mem::take(&mut told.unknown) | told.direct;
        if unknown || !self.is_watched(id) {
            return Written::Unknown;
        }
        let page = page_size();
        Written::Parts(spans.into_iter().map(|s| s.start.saturating_mul(page)..s.end.saturating_mul(page)).collect())
    }

    /// Writes the file back up to `size` bytes and waits: every page of it that was dirty has been clean. `alive` is
    /// called in between, so that nobody takes a slow disk for an end; `false` from it ends this as well.
    pub fn write_back(&mut self, file: &File, size: u64, alive: &mut dyn FnMut() -> bool) -> io::Result<()> {
        let begun = Instant::now();
        let mut result = Ok(());
        for start in (0..size).step_by(WRITE_BACK_BYTES) {
            let end = size.min(start + WRITE_BACK_BYTES as u64);
            result = file::write_back(file, start..end);
            if result.is_err() || (end < size && !alive()) {
                break;
            }
        }
        self.written_back += begun.elapsed();
        result
    }
}

impl Told {
    fn add(&mut self, span: Range<u64>) {
        match self.spans.last_mut() {
            Some(last) if span.start >= last.start && span.start <= last.end => last.end = last.end.max(span.end),
            _ => self.spans.push(span),
        }
        if self.spans.len() >= 2 * self.joined + MANY_SPANS {
            self.join();
        }
    }

    /// In order, and those that touch each other joined: no more than the file has pages.
    fn join(&mut self) {
        self.spans.sort_unstable_by_key(|s| s.start);
        self.spans.dedup_by(|next, kept| {
            let touches = next.start <= kept.end;
            if touches {
                kept.end = kept.end.max(next.end);
            }
            touches
        });
        self.joined = self.spans.len();
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_ne_bytes(*b))
}

fn half(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

/// Whether an ext4 is not mounted with data=journal, whose pages are dirty and clean at times of their own. The list of mounts does not say
/// so where that is the file system's own default.
fn journals_metadata_only(device: u32) -> io::Result<bool> {
    let link = std::fs::read_link(format!("/sys/dev/block/{}:{}", device >> 20, device & 0xf_ffff))?;
    let name = link.file_name().unwrap_or_default();
    let options = std::fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options"))?;
    Ok(!options.lines().any(|option| option == "data=journal"))
}

/// The device of a file system as the kernel has it, which stat does not say of btrfs: from the list of mounts.
fn kernel_device(directory: &Path) -> io::Result<u32> {
    let flags = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let mount = rustix::fs::statx(rustix::fs::CWD.as_fd(), directory, AtFlags::empty(), flags)?.stx_mnt_id.to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let device = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (id, _parent, device) = (fields.next()?, fields.next()?, fields.next()?);
        let (major, minor) = device.split_once(':').filter(|_| id == mount)?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    });
    let (major, minor) = device.ok_or_else(|| io::Error::other("its mount is not among those of this process"))?;
    // MKDEV in include/linux/kdev_t.h.
    Ok(major << 20 | minor)
}
