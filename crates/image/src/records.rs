//! What the store remembers about its images: small JSON files, each written whole and atomically.

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::tree::unique_name;
use rustix::fs::{self, AtFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// One image: `images/<manifest digest>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Of the manifest.
    pub digest: Digest,
    pub config_digest: Digest,
    /// Diff ids, lowest first, as the configuration lists them.
    pub layers: Vec<Digest>,
    pub size_bytes: u64,
    pub config: ImageConfig,
}

pub(crate) fn record_name(digest: Digest) -> String {
    format!("{}.json", digest.hex())
}

/// Replaces `dir/name` by `bytes` so that a crash leaves the old or the new content, never a part.
/// `tmp` is on the same file system and is emptied after a crash.
pub(crate) fn write_atomic(tmp: BorrowedFd<'_>, dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let part = unique_name("file");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let written = (|| {
        let mut file = File::from(fs::openat(tmp, part.as_str(), flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(bytes)?;
        file.sync_all()?;
        let dir = fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        fs::renameat(tmp, part.as_str(), &dir, name)?;
        fs::fsync(dir.as_fd())?;
        Ok(())
    })();
    if written.is_err() {
        // Gone already if the rename was done; otherwise the next opening removes it.
        let _ = fs::unlinkat(tmp, part.as_str(), AtFlags::empty());
    }
    written
}
