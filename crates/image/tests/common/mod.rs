//! Images made on the fly: archives entry by entry, layouts, and stores of their own.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use godwit_image::{Digest, Image, ImageSource, ImageStore, NoProgress, PullError, PullOptions, UnpackError};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An archive entry; written as ustar with PAX records where given.
#[derive(Clone)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: u8,
    pub link: Vec<u8>,
    pub data: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub device: (u32, u32),
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
}

fn entry(kind: u8, path: impl AsRef<[u8]>, mode: u32) -> Entry {
    Entry {
        path: path.as_ref().to_vec(),
        kind,
        link: vec![],
        data: vec![],
        mode,
        uid: 0,
        gid: 0,
        mtime: 1_000_000_000,
        device: (0, 0),
        pax: vec![],
    }
}

pub fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Entry {
    Entry { data: data.as_ref().to_vec(), ..entry(b'0', path, 0o644) }
}

pub fn dir(path: impl AsRef<[u8]>) -> Entry {
    entry(b'5', path, 0o755)
}

pub fn symlink(path: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Entry {
    Entry { link: to.as_ref().to_vec(), ..entry(b'2', path, 0o777) }
}

pub fn hardlink(path: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Entry {
    Entry { link: to.as_ref().to_vec(), ..entry(b'1', path, 0o644) }
}

/// `kind`: 3 character, 4 block, 6 fifo.
pub fn node(kind: u8, path: &str, device: (u32, u32)) -> Entry {
    Entry { device, ..entry(b'0' + kind, path, 0o666) }
}

impl Entry {
    pub fn mode(self, mode: u32) -> Entry {
        Entry { mode, ..self }
    }
    pub fn owner(self, uid: u64, gid: u64) -> Entry {
        Entry { uid, gid, ..self }
    }
    pub fn mtime(self, mtime: u64) -> Entry {
        Entry { mtime, ..self }
    }
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Entry {
        self.pax.push((key.into(), value.as_ref().to_vec()));
        self
    }
    pub fn xattr(self, key: &str, value: impl AsRef<[u8]>) -> Entry {
        self.pax(&format!("SCHILY.xattr.{key}"), value)
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut pax = self.pax.clone();
        if self.path.len() > 100 {
            pax.push((b"path".to_vec(), self.path.clone()));
        }
        if self.link.len() > 100 {
            pax.push((b"linkpath".to_vec(), self.link.clone()));
        }
        if !pax.is_empty() {
            let records: Vec<u8> = pax.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            member(out, &entry(b'x', "PaxHeaders/x", 0o644), &records);
        }
        member(out, self, &self.data);
    }
}

fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn member(out: &mut Vec<u8>, entry: &Entry, data: &[u8]) {
    let mut header = tar::Header::new_ustar();
    let cut = |bytes: &[u8]| bytes[..bytes.len().min(100)].to_vec();
    header.as_old_mut().name[..entry.path.len().min(100)].copy_from_slice(&cut(&entry.path));
    header.as_old_mut().linkname[..entry.link.len().min(100)].copy_from_slice(&cut(&entry.link));
    header.as_old_mut().linkflag = [entry.kind];
    header.set_mode(entry.mode);
    header.set_uid(entry.uid);
    header.set_gid(entry.gid);
    header.set_mtime(entry.mtime);
    header.set_size(data.len() as u64);
    header.set_device_major(entry.device.0).unwrap();
    header.set_device_minor(entry.device.1).unwrap();
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
}

pub fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    entries.iter().for_each(|entry| entry.write(&mut out));
    out.resize(out.len() + 1024, 0);
    out
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer as an image refers to it; tests damage the parts.
#[derive(Clone)]
pub struct Layer {
    pub blob: Vec<u8>,
    pub digest: Digest,
    pub size: u64,
    pub diff_id: Digest,
    pub media_type: &'static str,
}

pub fn layer(entries: &[Entry]) -> Layer {
    let tar = archive(entries);
    from_blob(tar.clone(), &tar, "application/vnd.oci.image.layer.v1.tar")
}

pub fn from_blob(blob: Vec<u8>, tar: &[u8], media_type: &'static str) -> Layer {
    Layer { digest: Digest::of(&blob), size: blob.len() as u64, diff_id: Digest::of(tar), blob, media_type }
}

pub fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An OCI image layout under construction.
pub struct Layout {
    pub dir: TempDir,
    index: Vec<serde_json::Value>,
}

impl Default for Layout {
    fn default() -> Layout {
        Layout::new()
    }
}

impl Layout {
    pub fn new() -> Layout {
        let dir = TempDir::with_prefix("godwit-layout-").unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout { dir, index: vec![] }
    }

    pub fn source(&self, tag: &str) -> ImageSource {
        format!("oci:{}:{tag}", self.dir.path().display()).parse().unwrap()
    }

    pub fn blob_path(&self, digest: Digest) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.hex())
    }

    pub fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blob_path(digest), bytes).unwrap();
        digest
    }

    /// A document's descriptor.
    pub fn put_json(&self, media_type: &str, value: &serde_json::Value) -> serde_json::Value {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = self.put(&bytes);
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    pub fn manifest(&self, layers: &[Layer], architecture: &str, run: serde_json::Value) -> serde_json::Value {
        for layer in layers {
            std::fs::write(self.blob_path(layer.digest), &layer.blob).unwrap();
        }
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let config = json!({"architecture": architecture, "os": "linux", "config": run, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = self.put_json("application/vnd.oci.image.config.v1+json", &config);
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| json!({"mediaType": layer.media_type, "digest": layer.digest.to_string(), "size": layer.size}))
            .collect();
        let kind = "application/vnd.oci.image.manifest.v1+json";
        self.put_json(kind, &json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}))
    }

    /// Adds a descriptor to `index.json`, as `tag`.
    pub fn tag(&mut self, tag: &str, mut descriptor: serde_json::Value) {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.index.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.index});
        std::fs::write(self.dir.path().join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    }

    pub fn image(&mut self, tag: &str, layers: &[Layer]) {
        let manifest = self.manifest(layers, arch(), json!({"Cmd": ["run"]}));
        self.tag(tag, manifest);
    }
}

/// A store in a directory of its own.
pub struct Fixture {
    pub dir: TempDir,
    pub store: ImageStore,
}

pub fn fixture() -> Fixture {
    let dir = TempDir::with_prefix("godwit-store-").unwrap();
    let store = ImageStore::open(&dir.path().join("store")).unwrap();
    Fixture { dir, store }
}

impl Fixture {
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub async fn ensure(&self, source: &ImageSource, options: &PullOptions) -> Result<Image, PullError> {
        self.store.ensure(source, options, &NoProgress).await
    }

    /// Names in a directory of the store, sorted.
    pub fn names(&self, dir: &str) -> Vec<String> {
        names(&self.root().join(dir))
    }

    /// Nothing unfinished is left, whatever happened.
    pub fn assert_clean(&self) {
        assert_eq!(self.names("tmp"), [""; 0], "tmp");
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Pulls an image with these layers into a store of its own.
pub async fn pull(layers: &[Layer]) -> (Fixture, Result<Image, PullError>) {
    let (fixture, mut layout) = (fixture(), Layout::new());
    layout.image("t", layers);
    let result = fixture.ensure(&layout.source("t"), &PullOptions::default()).await;
    fixture.assert_clean();
    (fixture, result)
}

/// Unpacks one layer and gives its directory.
pub async fn unpacked(entries: &[Entry]) -> (Fixture, PathBuf) {
    let (fixture, image) = pull(&[layer(entries)]).await;
    let path = image.unwrap_or_else(|error| panic!("{}", chain(&error))).layers[0].clone();
    (fixture, path)
}

/// Why one layer with these entries is refused; afterwards nothing of it is there.
pub async fn refusal(entries: &[Entry]) -> UnpackError {
    refused(layer(entries)).await
}

pub async fn refused(layer: Layer) -> UnpackError {
    let (fixture, image) = pull(&[layer]).await;
    assert_eq!(fixture.names("layers"), [""; 0]);
    assert_eq!(fixture.names("images"), [""; 0]);
    match image {
        Err(PullError::Unpack { source, .. }) => source,
        other => panic!("not refused while unpacking: {other:?}"),
    }
}

pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}

/// Says so and gives true when the test cannot run.
pub fn not_root() -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        eprintln!("skipped: needs root");
    }
    skip
}
