//! OCI images on one host: pull, verify, unpack, layers.
//!
//! In goes a name of an image (a registry reference or an OCI image layout on disk); out comes an
//! [`Image`]: its configuration and the directories of its layers, ready to be the lower
//! directories of an overlayfs mount. Formats: OCI image-spec 1.1 (manifest, index, configuration,
//! layer change sets), OCI distribution-spec 1.1 (registry), Docker's equivalents of both.
//!
//! What always holds:
//! - A directory in `layers/` is complete and its content has the name's SHA-256 (the diff id);
//!   anything unfinished lives in `tmp/` and is removed when the store is opened.
//! - Nothing is written outside the layer's own directory, whatever an archive says.
//! - Nothing is deleted through a mount.
//! - Files on disk carry the image's own user and group ids; mapping them is the runtime's part.
//!
//! Absent on purpose: pushing and building images, layer encryption, running anything.
//!
//! Reading order: [`source`], [`store`], `pull`, `unpack`, `fetch`.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod config;
mod digest;
mod fetch;
mod limits;
mod manifest;
mod progress;
mod pull;
mod records;
pub mod source;
pub mod store;
mod tree;
mod unpack;

pub use config::ImageConfig;
pub use digest::{Digest, DigestError};
pub use fetch::FetchError;
pub use limits::Limits;
pub use manifest::ManifestError;
pub use progress::{NoProgress, Progress, ProgressSink};
pub use pull::PullError;
pub use source::{ImageSource, PullOptions, PullPolicy, RegistryAuth, RegistryTls, SourceError};
pub use store::{Image, ImageStore, OpenError, RemoveError, Removed};
pub use tree::TreeError;
pub use unpack::{TarError, UnpackError};
