//! Manifests and indexes: from the bytes behind a name to the manifest for this machine.

use crate::digest::Digest;
use crate::limits::{MAX_CONFIG_BYTES, MAX_LAYERS};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Media types to ask a registry for.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

const TAG_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// Points to content: its media type, digest and size in bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    variant: Option<String>,
}

/// A document behind a name: exactly one of its two halves must be there.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u32,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// An image manifest that passed the checks.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Debug)]
pub(crate) enum Parsed {
    Image(Manifest),
    Index(Vec<Descriptor>),
}

/// Why a manifest or index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("{what} is not valid JSON of its kind")]
    Json { what: &'static str, source: serde_json::Error },
    #[error("manifest has schema version {0}; only version 2 is supported: push the image again with a current tool")]
    SchemaVersion(u32),
    #[error("the document is neither an image manifest nor an index")]
    Neither,
    #[error("image has {count} layers, more than the {MAX_LAYERS} allowed; squash some of them")]
    TooManyLayers { count: usize },
    #[error("image configuration is {size} bytes, more than the {MAX_CONFIG_BYTES} allowed")]
    ConfigTooLarge { size: u64 },
    #[error("layer {digest} has media type {media_type:?}, which is no file system layer")]
    LayerType { digest: Digest, media_type: String },
    #[error("manifest lists {layers} layers but the configuration {diff_ids}; the image was built wrongly")]
    LayerCount { layers: usize, diff_ids: usize },
    #[error("image is not offered for {wanted}; it is for: {offered}")]
    Platform { wanted: String, offered: String },
    #[error("layout has no tag {tag:?}; it has: {offered}")]
    NoTag { tag: String, offered: String },
    #[error("layout has several images; name one of its tags: {offered}")]
    Ambiguous { offered: String },
    #[error("layout's index lists no image")]
    Empty,
    #[error("more than {0} indexes point to one another")]
    TooDeep(usize),
}

/// This machine, in the words of images (Go's GOARCH).
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, ManifestError> {
    let document: Document =
        serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what: "the manifest", source })?;
    if document.schema_version != 2 {
        return Err(ManifestError::SchemaVersion(document.schema_version));
    }
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) => Ok(Parsed::Index(manifests)),
        (None, Some(config), Some(layers)) => {
            let manifest = Manifest { config, layers };
            check(&manifest)?;
            Ok(Parsed::Image(manifest))
        }
        _ => Err(ManifestError::Neither),
    }
}

fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    if manifest.layers.len() > MAX_LAYERS {
        return Err(ManifestError::TooManyLayers { count: manifest.layers.len() });
    }
    if manifest.config.size > MAX_CONFIG_BYTES {
        return Err(ManifestError::ConfigTooLarge { size: manifest.config.size });
    }
    for layer in &manifest.layers {
        // Compression is recognised by its first bytes; the name only tells layers from other things.
        let name = layer.media_type.split(';').next().unwrap_or_default().trim();
        let known = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
        let usable = known.iter().any(|start| name.starts_with(start))
            && [".tar", "+gzip", "+zstd", ".gzip", ".zstd"].iter().any(|end| name.ends_with(end));
        if !usable {
            return Err(ManifestError::LayerType { digest: layer.digest, media_type: layer.media_type.clone() });
        }
    }
    Ok(())
}

/// The entry of an index for this machine: Linux, this architecture, its baseline variant.
pub(crate) fn choose_platform(entries: &[Descriptor]) -> Result<&Descriptor, ManifestError> {
    let fits = |entry: &&Descriptor| {
        entry.platform.as_ref().is_some_and(|platform| {
            let baseline = match platform.variant.as_deref().unwrap_or_default() {
                "" => true,
                "v1" => architecture() == "amd64",
                "v8" => architecture() == "arm64",
                _ => false,
            };
            platform.os == "linux" && platform.architecture == architecture() && baseline
        })
    };
    if let Some(entry) = entries.iter().find(fits) {
        return Ok(entry);
    }
    match entries {
        [] => Err(ManifestError::Empty),
        // Nothing said about the platform: the configuration will say it.
        [only] if only.platform.is_none() => Ok(only),
        _ => {
            let offered = listed(entries.iter().filter_map(|entry| {
                let platform = entry.platform.as_ref()?;
                let variant = platform.variant.as_ref().map(|v| format!("/{v}")).unwrap_or_default();
                // Build attestations are listed under this platform.
                (platform.os != "unknown").then(|| format!("{}/{}{variant}", platform.os, platform.architecture))
            }));
            Err(ManifestError::Platform { wanted: format!("linux/{}", architecture()), offered })
        }
    }
}

/// The configuration must not contradict this machine either.
pub(crate) fn check_platform(os: &str, arch: &str) -> Result<(), ManifestError> {
    if (os.is_empty() || os == "linux") && (arch.is_empty() || arch == architecture()) {
        return Ok(());
    }
    Err(ManifestError::Platform { wanted: format!("linux/{}", architecture()), offered: format!("{os}/{arch}") })
}

/// The entry of a layout's `index.json` that `tag` names, or the only sensible one without a tag.
pub(crate) fn choose_tag<'a>(entries: &'a [Descriptor], tag: Option<&str>) -> Result<&'a Descriptor, ManifestError> {
    let name = |entry: &'a Descriptor| entry.annotations.as_ref()?.get(TAG_ANNOTATION).map(String::as_str);
    let offered = || listed(entries.iter().filter_map(name).map(str::to_owned));
    if entries.is_empty() {
        return Err(ManifestError::Empty);
    }
    let Some(tag) = tag else {
        let digests: BTreeSet<_> = entries.iter().map(|entry| entry.digest).collect();
        if digests.len() == 1 {
            return Ok(&entries[0]);
        }
        if entries.iter().all(|entry| name(entry).is_none()) {
            return choose_platform(entries);
        }
        return Err(ManifestError::Ambiguous { offered: offered() });
    };
    let named: Vec<_> = entries.iter().filter(|entry| name(entry) == Some(tag)).collect();
    match named.as_slice() {
        [] => Err(ManifestError::NoTag { tag: tag.into(), offered: offered() }),
        [only] => Ok(only),
        // One tag for several platforms.
        several => {
            let owned: Vec<Descriptor> = several.iter().map(|entry| (*entry).clone()).collect();
            let digest = choose_platform(&owned)?.digest;
            several.iter().find(|entry| entry.digest == digest).copied().ok_or(ManifestError::Empty)
        }
    }
}

/// Names for a message: sorted, each once, bounded.
fn listed(names: impl Iterator<Item = String>) -> String {
    const MAX_NAMES: usize = 20;
    let names: BTreeSet<String> = names.collect();
    let mut text = names.iter().take(MAX_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > MAX_NAMES {
        text.push_str(&format!(", and {} more", names.len() - MAX_NAMES));
    }
    if text.is_empty() { "(nothing)".into() } else { text }
}
