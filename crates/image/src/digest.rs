//! Content addresses: `sha256:` and 64 hexadecimal digits (OCI image-spec, descriptor.md).

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::str::FromStr;

/// A SHA-256 content address. Other algorithms are refused when parsed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Why a text is no digest this store accepts.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DigestError {
    #[error("digest {0:?} has no algorithm; write it as sha256:<64 hexadecimal digits>")]
    NoAlgorithm(String),
    #[error("digest algorithm {0:?} is not supported; only sha256 is")]
    Algorithm(String),
    #[error("digest {0:?} is not 64 lower-case hexadecimal digits after sha256:")]
    Hex(String),
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// 64 lower-case hexadecimal digits, safe as a file name.
    pub fn hex(&self) -> String {
        use fmt::Write;
        self.0.iter().fold(String::with_capacity(64), |mut out, byte| {
            // Writing into a String cannot fail.
            let _ = write!(out, "{byte:02x}");
            out
        })
    }

    /// From 64 lower-case hexadecimal digits, as [`Digest::hex`] writes them.
    pub fn from_hex(hex: &str) -> Result<Digest, DigestError> {
        let bad = || DigestError::Hex(shorten(hex));
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return Err(bad());
        }
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(bad()),
        };
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Digest(out))
    }
}

/// A bounded piece of `text` for a message.
fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Digest, DigestError> {
        match text.split_once(':') {
            None => Err(DigestError::NoAlgorithm(shorten(text))),
            Some(("sha256", hex)) => Digest::from_hex(hex),
            Some((other, _)) => Err(DigestError::Algorithm(shorten(other))),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Digest, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest of bytes that pass by.
#[derive(Default)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn digest(&self) -> Digest {
        Digest(self.0.clone().finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let digest = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
    }

    #[test]
    fn refused() {
        assert!(matches!("abc".parse::<Digest>(), Err(DigestError::NoAlgorithm(_))));
        assert!(matches!("sha512:00".parse::<Digest>(), Err(DigestError::Algorithm(_))));
        for hex in ["sha256:../../etc", &format!("sha256:{}", "A".repeat(64))] {
            assert!(matches!(hex.parse::<Digest>(), Err(DigestError::Hex(_))), "{hex}");
        }
    }
}
