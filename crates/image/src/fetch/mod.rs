//! Reading documents and blobs from where an image comes from.

mod challenge;
mod layout;
mod registry;

use crate::digest::Digest;
use crate::manifest::Descriptor;
use crate::source::{ImageSource, PullOptions};
use bytes::{Buf, Bytes};
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Why something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("the process is shutting down")]
    Stopped,
    #[error("cannot read {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} is no OCI image layout: {why}")]
    NoLayout { path: PathBuf, why: String },
    #[error("{path} is no readable tar archive; a compressed one must be decompressed first")]
    LayoutArchive { path: PathBuf, source: crate::unpack::TarError },
    #[error("layout {path} lacks blob {digest}; copy the image again")]
    NoBlob { path: PathBuf, digest: Digest },
    #[error("the additional certificate authority is no valid PEM certificate")]
    Ca(#[source] reqwest::Error),
    #[error("cannot set up the connection to registry {registry}")]
    Setup { registry: String, source: reqwest::Error },
    #[error(
        "no answer from registry {registry}; check its address, whether it speaks HTTPS or plain HTTP, and its certificate"
    )]
    Transport { registry: String, source: reqwest::Error },
    #[error("registry {registry} was silent for {seconds} s")]
    Timeout { registry: String, seconds: u64 },
    #[error("registry {registry} refused the user name or password of {user:?}")]
    WrongPassword { registry: String, user: String },
    #[error("registry {registry} asks for a login; give a user name and password")]
    LoginNeeded { registry: String },
    #[error("registry {registry} does not allow this user to pull {what}")]
    Denied { registry: String, what: String },
    #[error("registry {registry} has no {what}")]
    NotFound { registry: String, what: String },
    #[error("registry {registry} answered {what} with status {status}: {body}")]
    Status { registry: String, what: String, status: u16, body: String },
    #[error("registry {registry} asks for an authentication that is not supported: {challenge:?}")]
    Challenge { registry: String, challenge: String },
    #[error("{what} is longer than the {max} bytes allowed")]
    TooLong { what: String, max: u64 },
    #[error("{what} has {actual} bytes, not the {expected} that refer to it")]
    Size { what: String, expected: u64, actual: u64 },
    #[error("{what} has digest {actual}, not {expected}: it is damaged or was tampered with")]
    Digest { what: String, expected: Digest, actual: Digest },
}

/// Where this image's bytes come from.
#[derive(Clone)]
pub(crate) enum Fetcher {
    Layout(Arc<layout::Layout>),
    Registry(Arc<registry::Registry>),
}

/// The document that an image's name leads to.
pub(crate) enum Start {
    /// A layout's `index.json`; the tag chooses in it.
    LayoutIndex { bytes: Vec<u8>, tag: Option<String> },
    /// A manifest or index, verified if the name has a digest.
    Document(Vec<u8>),
}

impl Fetcher {
    pub async fn open(source: &ImageSource, options: &PullOptions) -> Result<Fetcher, FetchError> {
        Ok(match source {
            ImageSource::Layout { path, .. } => Fetcher::Layout(Arc::new(layout::Layout::open(path.clone()).await?)),
            ImageSource::Registry(reference) => {
                Fetcher::Registry(Arc::new(registry::Registry::new(reference, &options.auth, &options.tls)?))
            }
        })
    }

    pub async fn start(&self, source: &ImageSource) -> Result<Start, FetchError> {
        match (self, source) {
            (Fetcher::Registry(registry), _) => Ok(Start::Document(registry.start().await?)),
            (Fetcher::Layout(layout), ImageSource::Layout { tag, .. }) => {
                Ok(Start::LayoutIndex { bytes: layout.index().await?, tag: tag.clone() })
            }
            (Fetcher::Layout(layout), _) => Ok(Start::LayoutIndex { bytes: layout.index().await?, tag: None }),
        }
    }

    /// A manifest or index, verified; at most `max` bytes.
    pub async fn manifest(&self, of: &Descriptor, max: u64) -> Result<Vec<u8>, FetchError> {
        self.small(of, "manifests", max).await
    }

    /// A small blob, verified; at most `max` bytes.
    pub async fn small_blob(&self, of: &Descriptor, max: u64) -> Result<Vec<u8>, FetchError> {
        self.small(of, "blobs", max).await
    }

    async fn small(&self, of: &Descriptor, kind: &str, max: u64) -> Result<Vec<u8>, FetchError> {
        let what = format!("{kind}/{}", of.digest);
        if of.size > max {
            return Err(FetchError::TooLong { what, max });
        }
        let bytes = match self {
            Fetcher::Layout(layout) => layout.small(of.digest, max).await?,
            Fetcher::Registry(registry) => registry.document(&what, max).await?,
        };
        if bytes.len() as u64 != of.size {
            return Err(FetchError::Size { what, expected: of.size, actual: bytes.len() as u64 });
        }
        verify(&bytes, of.digest, what)?;
        Ok(bytes)
    }

    /// A layer's bytes, to be read on a blocking thread, and what keeps them coming. Not verified:
    /// the reader does that as they pass.
    pub async fn blob(&self, of: &Descriptor) -> Result<(BlobReader, Feeding), FetchError> {
        match self {
            Fetcher::Layout(layout) => Ok((layout.blob(of.digest).await?, Feeding(None))),
            Fetcher::Registry(registry) => {
                let (sender, receiver) = mpsc::channel(registry::CHANNEL_CHUNKS);
                let task = tokio::spawn(Arc::clone(registry).feed(of.digest, of.size, sender));
                let reader = BlobReader::Stream { receiver, current: Bytes::new() };
                Ok((reader, Feeding(Some(task))))
            }
        }
    }
}

pub(crate) fn verify(bytes: &[u8], expected: Digest, what: String) -> Result<(), FetchError> {
    match Digest::of(bytes) {
        actual if actual == expected => Ok(()),
        actual => Err(FetchError::Digest { what, expected, actual }),
    }
}

/// The task that fills a [`BlobReader`]; it ends with this value.
pub(crate) struct Feeding(Option<JoinHandle<()>>);

impl Drop for Feeding {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// A blob on its way. Reads block.
pub(crate) enum BlobReader {
    File(io::Take<File>),
    Stream { receiver: mpsc::Receiver<Result<Bytes, FetchError>>, current: Bytes },
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            BlobReader::File(file) => file.read(buffer),
            BlobReader::Stream { receiver, current } => {
                while current.is_empty() {
                    match receiver.blocking_recv() {
                        None => return Ok(0),
                        Some(Ok(chunk)) => *current = chunk,
                        Some(Err(error)) => return Err(io::Error::other(error)),
                    }
                }
                let count = buffer.len().min(current.len());
                current.copy_to_slice(&mut buffer[..count]);
                Ok(count)
            }
        }
    }
}
