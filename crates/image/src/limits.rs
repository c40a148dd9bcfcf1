//! Bounds on what an image may ask of this host.

/// Most layers of one image. Overlayfs itself stops at 500 lower directories.
pub const MAX_LAYERS: usize = 128;
/// Largest manifest or index, bytes (the distribution-spec asks registries to accept 4 MiB).
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Largest image configuration, bytes.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Most indexes between a name and its manifest.
pub const MAX_INDEX_DEPTH: usize = 3;
/// Largest single extended attribute, bytes: Linux's own XATTR_SIZE_MAX.
pub const MAX_XATTR_BYTES: usize = 64 << 10;
/// Largest PAX or GNU extension record before an entry, bytes.
pub const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Most data pieces of one sparse file.
pub const MAX_SPARSE_PIECES: usize = 1 << 20;
/// Longest path or link target of an entry, bytes: Linux's PATH_MAX without the final zero.
pub const MAX_PATH_BYTES: usize = 4095;
/// Layers fetched and unpacked at the same time, for the whole store.
pub const MAX_PARALLEL_LAYERS: usize = 3;

/// Bounds an operator may want to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest layer when unpacked: both its archive and the files it declares, bytes.
    pub max_layer_bytes: u64,
    /// Most entries (files, directories, links, deletions) of one layer.
    pub max_layer_entries: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_layer_bytes: 64 << 30, max_layer_entries: 5_000_000 }
    }
}
