//! From a name to an image on disk.
//!
//! Name → manifest (through indexes, for this platform) → configuration → layers in parallel, each
//! fetched and unpacked once however many pulls want it → record. A failed pull keeps the layers it
//! finished for the next try; they are swept when the store is opened or an image is removed.

use crate::config::ConfigDocument;
use crate::digest::Digest;
use crate::fetch::{BlobReader, FetchError, Fetcher, Start};
use crate::limits::{Limits, MAX_CONFIG_BYTES, MAX_INDEX_DEPTH, MAX_MANIFEST_BYTES, MAX_PARALLEL_LAYERS};
use crate::manifest::{self, Descriptor, Manifest, ManifestError, Parsed};
use crate::progress::{Progress, ProgressSink};
use crate::records::Record;
use crate::source::{ImageSource, PullOptions, PullPolicy};
use crate::store::{Image, ImageStore, Inner, Pins};
use crate::unpack::{self, Expected, UnpackError};
use futures_util::StreamExt;
use std::io::{self, Read};
use std::sync::Arc;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, watch};

/// Why an image is not here. What was there before is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("cannot fetch image {image}")]
    Fetch { image: String, source: FetchError },
    #[error("cannot use image {image}")]
    Manifest { image: String, source: ManifestError },
    #[error("cannot fetch layer {layer} of image {image}")]
    FetchLayer { image: String, layer: Digest, source: FetchError },
    #[error("cannot unpack layer {layer} of image {image}")]
    Unpack { image: String, layer: Digest, source: UnpackError },
    #[error("cannot store image {image}")]
    Store { image: String, source: io::Error },
    #[error("pull of image {image} was stopped")]
    Stopped { image: String },
}

struct Resolved {
    digest: Digest,
    manifest: Manifest,
    bytes: Vec<u8>,
}

impl ImageStore {
    /// Makes sure that the image is here, complete and verified. Dropping the future stops the pull;
    /// what it was unpacking is removed.
    pub async fn ensure(
        &self,
        source: &ImageSource,
        options: &PullOptions,
        progress: &dyn ProgressSink,
    ) -> Result<Image, PullError> {
        let image = source.to_string();
        if let Some(here) = self.known(source, &image, options.policy) {
            return Ok(here);
        }
        let fetch = |source| PullError::Fetch { image: image.clone(), source };
        let unusable = |source| PullError::Manifest { image: image.clone(), source };

        let fetcher = Fetcher::open(source, options).await.map_err(fetch)?;
        let resolved = resolve(&fetcher, source, &image).await?;
        let layers = &resolved.manifest.layers;
        let total_bytes = layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        progress.report(Progress::Resolved { manifest: resolved.digest, layers: layers.len(), total_bytes });
        if self.resolve(resolved.digest).is_some() {
            return self.finish(None, image, resolved.digest).await;
        }
        let bytes = fetcher.small_blob(&resolved.manifest.config, MAX_CONFIG_BYTES).await.map_err(fetch)?;
        let config: ConfigDocument = serde_json::from_slice(&bytes)
            .map_err(|source| unusable(ManifestError::Json { what: "the image configuration", source }))?;
        manifest::check_platform(&config.os, &config.architecture).map_err(unusable)?;
        let diff_ids = config.rootfs.diff_ids.clone();
        if diff_ids.len() != layers.len() {
            return Err(unusable(ManifestError::LayerCount { layers: layers.len(), diff_ids: diff_ids.len() }));
        }
        let _pins = Pins::new(Arc::clone(&self.inner), diff_ids.clone());
        let job = Job { store: &self.inner, fetcher: &fetcher, image: &image, limits: options.limits, progress };
        job.layers(layers, &diff_ids).await?;

        let size_bytes =
            total_bytes.saturating_add(resolved.manifest.config.size).saturating_add(resolved.bytes.len() as u64);
        let config_digest = resolved.manifest.config.digest;
        let record = Record {
            digest: resolved.digest,
            config_digest,
            layers: diff_ids,
            size_bytes,
            config: config.into_config(),
        };
        self.finish(Some((record, resolved.bytes, bytes)), image, resolved.digest).await
    }

    /// The image, if what is here answers the question without asking anyone.
    fn known(&self, source: &ImageSource, image: &str, policy: PullPolicy) -> Option<Image> {
        let ImageSource::Registry(_) = source else { return None };
        if let Some(here) = source.digest().and_then(|digest| self.inner.image(digest, Some(image))) {
            return Some(here);
        }
        // A digest in the name may be that of an index; the name then leads to one manifest for ever.
        let fixed = source.digest().is_some() || policy == PullPolicy::IfMissing;
        let digest = self.inner.tagged(image).filter(|_| fixed)?;
        self.inner.image(digest, Some(image))
    }

    async fn finish(
        &self,
        new: Option<(Record, Vec<u8>, Vec<u8>)>,
        image: String,
        digest: Digest,
    ) -> Result<Image, PullError> {
        let (store, name) = (Arc::clone(&self.inner), image.clone());
        let publish = move || {
            let new =
                new.as_ref().map(|(record, manifest, config)| (record.clone(), manifest.as_slice(), config.as_slice()));
            store.publish(new, name, digest)
        };
        match tokio::task::spawn_blocking(publish).await {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(PullError::Store { image, source }),
            Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
            Err(_) => return Err(PullError::Stopped { image }),
        }
        let gone = || io::Error::other("it was removed while it was pulled");
        self.inner.image(digest, Some(&image)).ok_or_else(|| PullError::Store { image, source: gone() })
    }
}

/// The manifest that the name leads to on this platform.
async fn resolve(fetcher: &Fetcher, source: &ImageSource, image: &str) -> Result<Resolved, PullError> {
    let fetch = |source| PullError::Fetch { image: image.into(), source };
    let unusable = |source| PullError::Manifest { image: image.into(), source };
    let mut bytes = match fetcher.start(source).await.map_err(fetch)? {
        Start::Document(bytes) => bytes,
        Start::LayoutIndex { bytes, tag } => {
            let Parsed::Index(entries) = manifest::parse(&bytes).map_err(unusable)? else {
                return Err(unusable(ManifestError::Neither));
            };
            let chosen = manifest::choose_tag(&entries, tag.as_deref()).map_err(unusable)?;
            fetcher.manifest(chosen, MAX_MANIFEST_BYTES).await.map_err(fetch)?
        }
    };
    for _ in 0..=MAX_INDEX_DEPTH {
        match manifest::parse(&bytes).map_err(unusable)? {
            Parsed::Image(manifest) => return Ok(Resolved { digest: Digest::of(&bytes), manifest, bytes }),
            Parsed::Index(entries) => {
                let chosen = manifest::choose_platform(&entries).map_err(unusable)?;
                bytes = fetcher.manifest(chosen, MAX_MANIFEST_BYTES).await.map_err(fetch)?;
            }
        }
    }
    Err(unusable(ManifestError::TooDeep(MAX_INDEX_DEPTH)))
}

/// What the layers of one pull have in common.
struct Job<'a> {
    store: &'a Arc<Inner>,
    fetcher: &'a Fetcher,
    image: &'a str,
    limits: Limits,
    progress: &'a dyn ProgressSink,
}

impl Job<'_> {
    /// All layers, or the first error once none of them is being worked on any more.
    async fn layers(&self, layers: &[Descriptor], diff_ids: &[Digest]) -> Result<(), PullError> {
        let (stop, stopped) = watch::channel(false);
        let work: Vec<_> =
            layers.iter().zip(diff_ids).map(|(layer, diff_id)| self.layer(layer, *diff_id, stopped.clone())).collect();
        let mut running = futures_util::stream::iter(work).buffer_unordered(MAX_PARALLEL_LAYERS);
        let mut first = None;
        while let Some(result) = running.next().await {
            if let (Err(error), None) = (result, &first) {
                first = Some(error);
                stop.send_replace(true);
            }
        }
        first.map_or(Ok(()), Err)
    }

    async fn layer(
        &self,
        layer: &Descriptor,
        diff_id: Digest,
        mut stopped: watch::Receiver<bool>,
    ) -> Result<(), PullError> {
        let (guard, slot) = {
            let ready = self.turn(diff_id);
            tokio::select! {
                biased;
                () = stop_asked(&mut stopped) => return Err(PullError::Stopped { image: self.image.into() }),
                ready = ready => ready,
            }
        };
        if self.store.has_layer(diff_id) {
            self.progress.report(Progress::LayerDone { diff_id, reused: true });
            return Ok(());
        }
        let failed = |source| PullError::FetchLayer { image: self.image.into(), layer: layer.digest, source };
        let (reader, feeding) = self.fetcher.blob(layer).await.map_err(failed)?;
        let (bytes, mut seen) = watch::channel(0);
        let expected = Expected { blob: layer.digest, blob_bytes: layer.size, diff_id };
        let (store, limits) = (Arc::clone(self.store), self.limits);
        let mut unpacking = tokio::task::spawn_blocking(move || {
            // Held until the directory is published or gone, also when nobody waits for it any more.
            let _held = (guard, slot);
            unpack_layer(&store, Counted { reader, bytes }, expected, limits)
        });
        let joined = loop {
            tokio::select! {
                joined = &mut unpacking => break joined,
                changed = seen.changed() => match changed {
                    Ok(()) => {
                        let done_bytes = *seen.borrow_and_update();
                        self.progress.report(Progress::Layer { diff_id, done_bytes, total_bytes: layer.size });
                    }
                    Err(_) => break unpacking.await,
                },
                () = stop_asked(&mut stopped) => {
                    // The end of the feeding wakes the reader, which then sees that nobody listens.
                    drop(seen);
                    drop(feeding);
                    break unpacking.await;
                }
            }
        };
        match joined {
            Ok(Ok(())) => self.progress.report(Progress::LayerDone { diff_id, reused: false }),
            Ok(Err(source)) => return Err(PullError::Unpack { image: self.image.into(), layer: layer.digest, source }),
            Err(panic) if panic.is_panic() => std::panic::resume_unwind(panic.into_panic()),
            Err(_) => return Err(PullError::Stopped { image: self.image.into() }),
        }
        Ok(())
    }

    /// Waits until no other pull works on this layer and not too many layers are worked on.
    async fn turn(&self, diff_id: Digest) -> (OwnedMutexGuard<()>, Option<OwnedSemaphorePermit>) {
        let guard = self.store.layer_lock(diff_id).lock_owned().await;
        // Never closed.
        (guard, Arc::clone(&self.store.slots).acquire_owned().await.ok())
    }
}

/// Returns when the pull is to stop. A function, so that no guard of the value is held meanwhile.
async fn stop_asked(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

fn unpack_layer(store: &Inner, source: Counted, expected: Expected, limits: Limits) -> Result<(), UnpackError> {
    let io = |action| move |source| UnpackError::Io { action, path: format!("layer {}", expected.diff_id), source };
    let (name, work) = store.tmp.make("layer").map_err(io("make a directory for"))?;
    let unpacked = unpack::unpack(source, expected, &work, limits)
        .and_then(|()| store.publish_layer(&work, expected.diff_id).map_err(io("publish")));
    if let Err(error) = store.tmp.remove(&name) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "an unfinished layer is left until the store is opened again"
        );
    }
    unpacked
}

/// Tells how many bytes were read, and stops when nobody wants to know any more.
struct Counted {
    reader: BlobReader,
    bytes: watch::Sender<u64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_closed() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "stopped"));
        }
        let got = self.reader.read(buffer)?;
        self.bytes.send_modify(|bytes| *bytes += got as u64);
        Ok(got)
    }
}
