//! The images of one host on disk.
//!
//! ```text
//! ROOT/lock                  held while the store is open
//!      blobs/sha256/HEX      manifests and configurations; layer blobs are never kept
//!      layers/HEX/           HEX = diff id: the layer's files in overlayfs's form
//!      images/HEX.json       HEX = manifest digest
//!      tags.json             name of an image → manifest digest
//!      tmp/                  everything unfinished, and what is being deleted
//! ```
//! `layers` is closed to other users: it holds set-user-id programs of strangers.

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::limits::MAX_PARALLEL_LAYERS;
use crate::records::{Record, record_name, write_atomic};
use crate::tree::{self, TreeError};
use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::Semaphore;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("image store {root} is in use by another process; stop that one or choose another directory")]
    InUse { root: PathBuf },
    #[error("cannot {action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is malformed; delete it and pull its images again")]
    Malformed { path: PathBuf, source: serde_json::Error },
}

/// Why an image is still there.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error("no image {0} is here")]
    NotFound(Digest),
    #[error("image {0} is in use by a container; remove that first")]
    InUse(Digest),
    #[error("cannot update the store at {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("image {digest} is removed, but not all of its files are")]
    Files { digest: Digest, source: TreeError },
}

/// What [`ImageStore::remove`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Diff ids of the layers that no image needs any more; their files are gone.
    pub layers: Vec<Digest>,
    /// Names that led to the image.
    pub references: Vec<String>,
}

/// An image that is here, ready to be used.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// The name it was asked for by; the digest if it has none.
    pub reference: String,
    /// Of the manifest for this machine's platform.
    pub digest: Digest,
    pub config: ImageConfig,
    /// Directories to be overlayfs's lower directories, lowest first, each once. Layers that can
    /// have no effect (below one that hides all of them, or repeated higher up) are left out.
    pub layers: Vec<PathBuf>,
    /// Manifest, configuration and compressed layers: what a pull from nothing transfers.
    pub size_bytes: u64,
}

/// All images of one host. Cheap to clone; one process at a time.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    root: PathBuf,
    pub tmp: TmpDir,
    layers: OwnedFd,
    state: Mutex<State>,
    /// Held while files of records, names and blobs change.
    writer: Mutex<()>,
    layer_locks: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    pub slots: Arc<Semaphore>,
    _lock: File,
}

#[derive(Default)]
struct State {
    images: BTreeMap<Digest, Record>,
    tags: BTreeMap<String, Digest>,
    /// Layers that a running pull counts on, and how many do.
    pins: HashMap<Digest, usize>,
}

/// The directory for what is unfinished.
pub(crate) struct TmpDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl TmpDir {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes a new, empty directory; the caller removes it with [`TmpDir::remove`].
    pub fn make(&self, purpose: &str) -> io::Result<(String, PathBuf)> {
        let name = tree::unique_name(purpose);
        fs::mkdirat(&self.fd, name.as_str(), Mode::RWXU)?;
        let path = self.path.join(&name);
        Ok((name, path))
    }

    pub fn remove(&self, name: &str) -> Result<(), TreeError> {
        tree::remove(self.fd(), name.as_ref())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No invariant spans a panic: every change below is a single assignment or can be repeated.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageStore {
    /// Opens the store at `root`, made if it is missing. Removes what a crash has left unfinished
    /// and layers that no image needs. Blocks; the store is closed when the last clone is dropped.
    pub fn open(root: &Path) -> Result<ImageStore, OpenError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { action, path, source }
        };
        for (name, mode) in [
            ("", 0o700),
            ("blobs", 0o700),
            ("blobs/sha256", 0o700),
            ("layers", 0o700),
            ("images", 0o700),
            ("tmp", 0o700),
        ] {
            use std::os::unix::fs::DirBuilderExt;
            let path = root.join(name);
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(&path)
                .map_err(failed("make directory", &path))?;
        }
        let open_dir = |name: &str| {
            let path = root.join(name);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            fs::open(&path, flags, Mode::empty()).map_err(|errno| OpenError::Io {
                action: "open",
                path,
                source: errno.into(),
            })
        };
        let path = root.join("lock");
        let lock =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(failed("open", &path))?;
        match fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(OpenError::InUse { root: root.into() }),
            Err(errno) => return Err(failed("lock", &path)(errno.into())),
        }
        let tmp = TmpDir { fd: open_dir("tmp")?, path: root.join("tmp") };
        for (name, _) in tree::list(tmp.fd()).map_err(|errno| failed("read", &tmp.path)(errno.into()))? {
            if let Err(error) = tree::remove(tmp.fd(), std::os::unix::ffi::OsStrExt::from_bytes(name.as_bytes())) {
                tracing::warn!(store = %root.display(), error = &error as &dyn std::error::Error, "leftovers of an earlier run remain");
            }
        }
        let state = load(root)?;
        let inner = Inner {
            root: root.to_owned(),
            tmp,
            layers: open_dir("layers")?,
            state: Mutex::new(state),
            writer: Mutex::default(),
            layer_locks: Mutex::default(),
            slots: Arc::new(Semaphore::new(MAX_PARALLEL_LAYERS)),
            _lock: lock,
        };
        let store = ImageStore { inner: Arc::new(inner) };
        if let Err(error) = store.inner.sweep() {
            tracing::warn!(store = %root.display(), error = &error as &dyn std::error::Error, "unused layers remain");
        }
        Ok(store)
    }

    /// The image with this manifest digest, if all of it is here.
    pub fn resolve(&self, digest: Digest) -> Option<Image> {
        self.inner.image(digest, None)
    }

    /// All images that are here, ordered by digest.
    pub fn list(&self) -> Vec<Image> {
        let digests: Vec<Digest> = locked(&self.inner.state).images.keys().copied().collect();
        digests.into_iter().filter_map(|digest| self.resolve(digest)).collect()
    }

    /// Removes an image, its names, and those of its layers that no other image and no running pull
    /// needs. `in_use`: digests of images that containers run from. Blocks while files are deleted.
    pub fn remove(&self, digest: Digest, in_use: &[Digest]) -> Result<Removed, RemoveError> {
        let inner = &self.inner;
        if in_use.contains(&digest) {
            return Err(RemoveError::InUse(digest));
        }
        let references = {
            let _writer = locked(&inner.writer);
            let (mut images, tags) = {
                let state = locked(&inner.state);
                (state.images.clone(), state.tags.clone())
            };
            let record = images.remove(&digest).ok_or(RemoveError::NotFound(digest))?;
            let (gone, tags): (BTreeMap<_, _>, BTreeMap<_, _>) = tags.into_iter().partition(|(_, to)| *to == digest);
            // The record last: until then the image is whole.
            inner.write_tags(&tags)?;
            let path = inner.root.join("images").join(record_name(digest));
            std::fs::remove_file(&path).map_err(|source| RemoveError::Io { path, source })?;
            let kept: BTreeSet<Digest> = images.values().map(|record| record.config_digest).collect();
            let config = Some(record.config_digest).filter(|config| !kept.contains(config));
            for blob in config.into_iter().chain([digest]) {
                let path = inner.blob_path(blob);
                match std::fs::remove_file(&path) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(RemoveError::Io { path, source });
                    }
                    _ => {}
                }
            }
            let mut state = locked(&inner.state);
            (state.images, state.tags) = (images, tags);
            gone.into_keys().collect()
        };
        let layers = inner.sweep().map_err(|source| RemoveError::Files { digest, source })?;
        Ok(Removed { layers, references })
    }
}

fn load(root: &Path) -> Result<State, OpenError> {
    let read = |path: &Path| std::fs::read(path);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { action: "read", path, source }
    };
    let mut state = State::default();
    let images = root.join("images");
    for entry in std::fs::read_dir(&images).map_err(failed(&images))? {
        let path = entry.map_err(failed(&images))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let bytes = read(&path).map_err(failed(&path))?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|source| OpenError::Malformed { path, source })?;
        state.images.insert(record.digest, record);
    }
    let path = root.join("tags.json");
    match read(&path) {
        Ok(bytes) => {
            state.tags = serde_json::from_slice(&bytes).map_err(|source| OpenError::Malformed { path, source })?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&path)(error)),
    }
    Ok(state)
}

impl Inner {
    fn blob_path(&self, digest: Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    fn write_tags(&self, tags: &BTreeMap<String, Digest>) -> Result<(), RemoveError> {
        let path = self.root.join("tags.json");
        let written = serde_json::to_vec_pretty(tags)
            .map_err(io::Error::from)
            .and_then(|bytes| write_atomic(self.tmp.fd(), &self.root, "tags.json", &bytes));
        written.map_err(|source| RemoveError::Io { path, source })
    }

    /// The manifest digest that a name led to when it was last pulled.
    pub fn tagged(&self, reference: &str) -> Option<Digest> {
        locked(&self.state).tags.get(reference).copied()
    }

    /// The image, if its record and every one of its layers is here.
    pub fn image(&self, digest: Digest, reference: Option<&str>) -> Option<Image> {
        let (record, reference) = {
            let state = locked(&self.state);
            let record = state.images.get(&digest)?.clone();
            let named = || state.tags.iter().find(|(_, to)| **to == digest).map(|(name, _)| name.clone());
            let reference = reference.map(str::to_owned).or_else(named).unwrap_or_else(|| digest.to_string());
            (record, reference)
        };
        if !record.layers.iter().all(|layer| self.has_layer(*layer)) {
            return None;
        }
        let mut layers = Vec::new();
        let mut seen = BTreeSet::new();
        for layer in record.layers.iter().rev().filter(|layer| seen.insert(**layer)) {
            let path = self.root.join("layers").join(layer.hex());
            let hides_all = fs::lgetxattr(&path, crate::unpack::OPAQUE, &mut [0u8; 1]).is_ok();
            layers.push(path);
            // Overlayfs does not look at this mark on the layers' own roots.
            if hides_all {
                break;
            }
        }
        layers.reverse();
        Some(Image { reference, digest, config: record.config, layers, size_bytes: record.size_bytes })
    }

    pub fn has_layer(&self, diff_id: Digest) -> bool {
        fs::statat(&self.layers, diff_id.hex(), AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Publishes `work/root` as the layer's directory.
    pub fn publish_layer(&self, work: &Path, diff_id: Digest) -> io::Result<()> {
        match fs::renameat_with(fs::CWD, work.join("root"), &self.layers, diff_id.hex(), RenameFlags::NOREPLACE) {
            Ok(()) => Ok(fs::fsync(&self.layers)?),
            // The same content is there already.
            Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// One pull at a time unpacks a layer; the lock lives as long as someone holds or waits for it.
    pub fn layer_lock(&self, diff_id: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = locked(&self.layer_locks);
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(&diff_id).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        locks.insert(diff_id, Arc::downgrade(&lock));
        lock
    }

    /// Records a pulled image, if it is new, and the name it was pulled by. Blocks.
    pub fn publish(&self, record: Option<(Record, &[u8], &[u8])>, reference: String, digest: Digest) -> io::Result<()> {
        let _writer = locked(&self.writer);
        if let Some((record, manifest, config)) = record {
            let blobs = self.root.join("blobs/sha256");
            write_atomic(self.tmp.fd(), &blobs, &record.config_digest.hex(), config)?;
            write_atomic(self.tmp.fd(), &blobs, &digest.hex(), manifest)?;
            let bytes = serde_json::to_vec_pretty(&record)?;
            write_atomic(self.tmp.fd(), &self.root.join("images"), &record_name(digest), &bytes)?;
            locked(&self.state).images.insert(digest, record);
        }
        let mut tags = locked(&self.state).tags.clone();
        if tags.insert(reference, digest) != Some(digest) {
            write_atomic(self.tmp.fd(), &self.root, "tags.json", &serde_json::to_vec_pretty(&tags)?)?;
            locked(&self.state).tags = tags;
        }
        Ok(())
    }

    /// Deletes layers that neither an image nor a running pull needs, and names them.
    fn sweep(&self) -> Result<Vec<Digest>, TreeError> {
        let whole = |errno: Errno| TreeError::Delete { path: self.root.join("layers"), source: errno.into() };
        let mut moved = Vec::new();
        {
            // Held, so that no pull starts to count on a layer that is about to go.
            let state = locked(&self.state);
            let needed: BTreeSet<Digest> =
                state.images.values().flat_map(|record| record.layers.iter().copied()).collect();
            for (name, _) in tree::list(self.layers.as_fd()).map_err(whole)? {
                let Some(layer) = name.to_str().ok().and_then(|hex| Digest::from_hex(hex).ok()) else { continue };
                if needed.contains(&layer) || state.pins.contains_key(&layer) {
                    continue;
                }
                let trash = tree::unique_name("removed");
                match fs::renameat(&self.layers, &name, self.tmp.fd(), trash.as_str()) {
                    Ok(()) => moved.push((layer, trash)),
                    Err(Errno::BUSY) => {
                        return Err(TreeError::Mount { path: self.root.join("layers").join(layer.hex()) });
                    }
                    Err(errno) => return Err(whole(errno)),
                }
            }
        }
        // All are tried; the first failure is told.
        let results: Vec<_> = moved.iter().map(|(_, trash)| self.tmp.remove(trash)).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(moved.into_iter().map(|(layer, _)| layer).collect())
    }
}

/// Layers that must not be swept while this lives.
pub(crate) struct Pins {
    store: Arc<Inner>,
    layers: Vec<Digest>,
}

impl Pins {
    pub fn new(store: Arc<Inner>, layers: Vec<Digest>) -> Pins {
        let mut state = locked(&store.state);
        for layer in &layers {
            *state.pins.entry(*layer).or_default() += 1;
        }
        drop(state);
        Pins { store, layers }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = locked(&self.store.state);
        for layer in &self.layers {
            if let Some(count) = state.pins.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(layer);
                }
            }
        }
    }
}
