//! Where an image comes from, as users write it, and how to get at it.

use crate::digest::{Digest, DigestError};
use crate::limits::Limits;
use oci_spec::distribution::Reference;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// An OCI image layout (image-spec, image-layout.md): a directory, or a tar archive of one.
    Layout {
        /// Absolute.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name` in the layout's index.
        tag: Option<String>,
    },
    /// A repository of a registry, with a tag, a digest or both (then the digest counts).
    Registry(Reference),
}

/// Why a text names no image.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("image {text:?}: the path after oci: must be absolute, as in oci:/srv/images/redis:7")]
    RelativePath { text: String },
    #[error("image {text:?} is no image reference; write host[:port]/name[:tag][@sha256:…] or oci:/path[:tag]")]
    Reference { text: String, source: oci_spec::distribution::ParseError },
    #[error("image {text:?} has an unusable digest")]
    Digest { text: String, source: DigestError },
}

impl ImageSource {
    /// The digest that the name itself fixes, if it does.
    pub fn digest(&self) -> Option<Digest> {
        match self {
            ImageSource::Layout { .. } => None,
            ImageSource::Registry(reference) => reference.digest().and_then(|d| d.parse().ok()),
        }
    }
}

impl FromStr for ImageSource {
    type Err = SourceError;

    /// `oci:/path[:tag]`: the tag is what follows the last colon after the last slash. Anything else
    /// is a registry reference; without a host it means docker.io, without tag and digest `latest`.
    fn from_str(text: &str) -> Result<ImageSource, SourceError> {
        if let Some(rest) = text.strip_prefix("oci:") {
            if !rest.starts_with('/') {
                return Err(SourceError::RelativePath { text: text.into() });
            }
            let name_at = rest.rfind('/').map_or(0, |slash| slash + 1);
            let (path, tag) = match rest[name_at..].rfind(':') {
                Some(colon) => (&rest[..name_at + colon], Some(&rest[name_at + colon + 1..])),
                None => (rest, None),
            };
            let tag = tag.filter(|tag| !tag.is_empty()).map(str::to_owned);
            return Ok(ImageSource::Layout { path: path.into(), tag });
        }
        let reference: Reference =
            text.parse().map_err(|source| SourceError::Reference { text: text.into(), source })?;
        if let Some(digest) = reference.digest() {
            let checked: Result<Digest, _> = digest.parse();
            checked.map_err(|source| SourceError::Digest { text: text.into(), source })?;
        }
        Ok(ImageSource::Registry(reference))
    }
}

impl fmt::Display for ImageSource {
    /// The whole name, with every default written out; parses back to the same source.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSource::Layout { path, tag: None } => write!(f, "oci:{}", path.display()),
            ImageSource::Layout { path, tag: Some(tag) } => write!(f, "oci:{}:{tag}", path.display()),
            ImageSource::Registry(reference) => f.write_str(&reference.whole()),
        }
    }
}

/// How to prove to a registry who asks.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum RegistryAuth {
    #[default]
    Anonymous,
    Basic {
        user: String,
        password: String,
    },
}

impl fmt::Debug for RegistryAuth {
    /// Never shows the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegistryAuth::Anonymous => f.write_str("Anonymous"),
            RegistryAuth::Basic { user, .. } => f.debug_struct("Basic").field("user", user).finish_non_exhaustive(),
        }
    }
}

/// How the connection to a registry is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryTls {
    /// HTTPS; the certificate must be signed by an authority of this host or by one of these (PEM).
    Verify { extra_ca_pem: Option<Vec<u8>> },
    /// Plain HTTP: neither secret nor authentic, though digests are still verified.
    Insecure,
}

impl Default for RegistryTls {
    fn default() -> RegistryTls {
        RegistryTls::Verify { extra_ca_pem: None }
    }
}

/// When a registry is asked for a tag that the store knows already. A layout on disk is always read,
/// a digest that is here is never asked for again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    #[default]
    IfMissing,
    Always,
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    pub auth: RegistryAuth,
    pub tls: RegistryTls,
    pub policy: PullPolicy,
    pub limits: Limits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts() {
        let parsed: ImageSource = "oci:/srv/img.tar:7".parse().unwrap();
        assert_eq!(parsed, ImageSource::Layout { path: "/srv/img.tar".into(), tag: Some("7".into()) });
        let parsed: ImageSource = "oci:/a:b/c".parse().unwrap();
        assert_eq!(parsed, ImageSource::Layout { path: "/a:b/c".into(), tag: None });
        assert!(matches!("oci:rel".parse::<ImageSource>(), Err(SourceError::RelativePath { .. })));
    }

    #[test]
    fn registries() {
        let whole = |text: &str| text.parse::<ImageSource>().unwrap().to_string();
        assert_eq!(whole("redis"), "docker.io/library/redis:latest");
        assert_eq!(whole("127.0.0.1:5000/a/b:1"), "127.0.0.1:5000/a/b:1");
        let digest = format!("sha256:{}", "a".repeat(64));
        let parsed: ImageSource = format!("h.example/a:1@{digest}").parse().unwrap();
        assert_eq!(parsed.digest().unwrap().to_string(), digest);
        assert!("UPPER CASE".parse::<ImageSource>().is_err());
    }

    #[test]
    fn password_is_not_shown() {
        let auth = RegistryAuth::Basic { user: "u".into(), password: "hunter2".into() };
        assert!(!format!("{auth:?}").contains("hunter2"));
    }
}
