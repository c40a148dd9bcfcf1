//! A layer blob as it streams in becomes a directory: decompressed, verified twice (the blob against
//! the manifest, the archive against the configuration), unpacked.
//!
//! ```text
//! source ─▶ Meter (size, SHA-256 = blob digest) ─▶ gzip │ zstd │ plain ─▶ Meter (SHA-256 = diff id) ─▶ TarReader ─▶ Unpacker
//! ```

mod apply;
mod header;
mod meter;
mod root;
mod sparse;
mod tar;

use crate::digest::Digest;
use crate::limits::Limits;
use meter::Meter;
use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

pub(crate) use root::OPAQUE;
pub use tar::TarError;
pub(crate) use tar::{Kind, TarReader};

/// Why a layer could not be unpacked. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("the blob could not be read to its end")]
    Fetch(#[source] io::Error),
    #[error("the blob has digest {actual}, not {expected}: it is damaged or was tampered with")]
    BlobDigest { expected: Digest, actual: Digest },
    #[error("the blob ends after {actual} of {expected} bytes")]
    BlobTruncated { expected: u64, actual: u64 },
    #[error("the blob is longer than the {expected} bytes its manifest says")]
    BlobOversize { expected: u64 },
    #[error("the blob cannot be decompressed")]
    Decompress(#[source] io::Error),
    #[error("the unpacked archive has digest {actual}, not the {expected} that the configuration says")]
    DiffId { expected: Digest, actual: Digest },
    #[error("the layer's archive is malformed")]
    Tar(#[source] TarError),
    #[error("entry {path:?} {why}; a layer must not reach outside its root")]
    Escape { path: String, why: &'static str },
    #[error("entry {path:?} {why}")]
    Unusable { path: String, why: &'static str },
    #[error("a component of {path:?} is a file in this layer, not a directory")]
    NotDirectory { path: String },
    #[error(
        "entry {path:?} is a hard link to {target:?}, which this layer does not contain; build the image so that both are in one layer"
    )]
    LinkTarget { path: String, target: String },
    #[error("the layer has more than {max} entries; raise max_layer_entries if it is trusted")]
    TooManyEntries { max: u64 },
    #[error("the layer unpacks to more than {max} bytes; raise max_layer_bytes if it is trusted")]
    TooLarge { max: u64 },
    #[error("cannot {action} {path:?}")]
    Io { action: &'static str, path: String, source: io::Error },
}

impl UnpackError {
    fn io(action: &'static str, path: &[u8], errno: Errno) -> UnpackError {
        UnpackError::Io { action, path: root::shown(path), source: errno.into() }
    }
}

/// What a layer must turn out to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    pub blob: Digest,
    pub blob_bytes: u64,
    pub diff_id: Digest,
}

/// Unpacks the blob that `source` yields into the new directory `work/root`. `work` exists, is empty
/// and belongs to the caller, who deletes it when this fails. When it succeeds, all data is on disk.
pub(crate) fn unpack(source: impl Read, expected: Expected, work: &Path, limits: Limits) -> Result<(), UnpackError> {
    let at = |action, path: &Path| {
        let path = path.display().to_string();
        move |errno: Errno| UnpackError::Io { action, path, source: errno.into() }
    };
    let root = work.join("root");
    fs::mkdir(&root, Mode::from_raw_mode(0o755)).map_err(at("make directory", &root))?;
    fs::chmod(&root, Mode::from_raw_mode(0o755)).map_err(at("set mode of", &root))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let trash = fs::open(work, flags, Mode::empty()).map_err(at("open", work))?;
    let opened = root::Root::open(&root).map_err(at("open", &root))?;

    let blob = Meter::new(source, expected.blob_bytes);
    let archive = match decompress(&blob) {
        Ok(decoder) => Meter::new(decoder, limits.max_layer_bytes),
        Err(error) => return Err(explain(&blob, expected, UnpackError::Decompress(error))),
    };
    let mut reader = TarReader::new(archive.reader());
    let unpacker = apply::Unpacker::new(opened, trash.as_fd(), limits);
    let result = unpacker.run(&mut reader).and_then(|()| {
        // Padding after the end of the archive belongs to both digests.
        archive.drain().map_err(|error| UnpackError::Tar(TarError::Read(error)))
    });
    if let Err(error) = result {
        // The archive's reader carries what its own source, or its own limit, reported.
        let error = match error {
            UnpackError::Tar(TarError::Read(_)) if archive.over_limit() => {
                UnpackError::TooLarge { max: limits.max_layer_bytes }
            }
            UnpackError::Tar(TarError::Read(error)) => UnpackError::Decompress(error),
            error => error,
        };
        return Err(explain(&blob, expected, error));
    }
    verify_blob(&blob, expected)?;
    if archive.digest() != expected.diff_id {
        return Err(UnpackError::DiffId { expected: expected.diff_id, actual: archive.digest() });
    }
    // The rename that publishes the layer must not reach the disk before its files do.
    fs::syncfs(&trash).map_err(at("write to disk", &root))
}

/// The rest of the blob must be what the manifest says: no more, no less, the right digest.
fn verify_blob<R: Read>(blob: &Meter<R>, expected: Expected) -> Result<(), UnpackError> {
    let read = blob.drain();
    if blob.over_limit() {
        return Err(UnpackError::BlobOversize { expected: expected.blob_bytes });
    }
    read.map_err(UnpackError::Fetch)?;
    if blob.bytes() < expected.blob_bytes {
        return Err(UnpackError::BlobTruncated { expected: expected.blob_bytes, actual: blob.bytes() });
    }
    if blob.digest() != expected.blob {
        return Err(UnpackError::BlobDigest { expected: expected.blob, actual: blob.digest() });
    }
    Ok(())
}

/// If reading or decoding failed, the cause is usually the blob: a broken connection or broken bytes.
fn explain<R: Read>(blob: &Meter<R>, expected: Expected, error: UnpackError) -> UnpackError {
    if !matches!(error, UnpackError::Decompress(_) | UnpackError::Tar(_)) {
        return error;
    }
    match (blob.failed(), error) {
        (true, UnpackError::Decompress(cause)) => UnpackError::Fetch(cause),
        (true, error) => error,
        (false, error) => verify_blob(blob, expected).err().unwrap_or(error),
    }
}

/// By the first bytes (RFC 1952, RFC 8878): builders are known to get the media type wrong, and the
/// digests are verified anyway.
fn decompress<'a, R: Read + 'a>(blob: &Meter<R>) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(4);
    blob.reader().take(4).read_to_end(&mut start)?;
    let magic = start.clone();
    let whole = io::Cursor::new(start).chain(blob.reader());
    Ok(if magic.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::read::MultiGzDecoder::new(whole))
    } else if magic == [0x28, 0xb5, 0x2f, 0xfd] {
        Box::new(zstd::stream::read::Decoder::new(whole)?)
    } else {
        Box::new(io::BufReader::with_capacity(128 << 10, whole))
    })
}
