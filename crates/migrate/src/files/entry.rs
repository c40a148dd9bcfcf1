//! One file, directory, link or node as it travels.

use serde::{Deserialize, Serialize};

/// A path inside a tree and everything about it but its data, which follows in `Data` frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Which tree, as both agents call it: `root` or `volume:NAME`.
    pub tree: String,
    /// Relative to the tree, bytes as hex only if not UTF-8; the tree itself is the empty path.
    #[serde(with = "path_text")]
    pub path: Vec<u8>,
    pub kind: EntryKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Names and values, sorted by name.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum EntryKind {
    Directory,
    /// `size` bytes in all; what no `Data` frame brings is a hole.
    File {
        size: u64,
    },
    /// A file that was sent before, under this name: `Data` frames bring what changed in it. From version 2 on.
    Patch {
        size: u64,
    },
    Symlink {
        #[serde(with = "path_text")]
        target: Vec<u8>,
    },
    /// Another name of a file that has been sent before, in the same tree.
    HardLink {
        #[serde(with = "path_text")]
        to: Vec<u8>,
    },
    /// Device, fifo or socket node; overlay whiteouts are character devices 0:0.
    Node {
        device: u64,
    },
}

/// Paths are bytes on Linux; in JSON they are text where they can be, `hex:…` otherwise.
mod path_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(path: &[u8], s: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(path) {
            Ok(text) if !text.starts_with("hex:") => s.serialize_str(text),
            _ => {
                let hex: String = path.iter().map(|b| format!("{b:02x}")).collect();
                s.serialize_str(&format!("hex:{hex}"))
            }
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(d)?;
        let Some(hex) = text.strip_prefix("hex:") else { return Ok(text.into_bytes()) };
        let digits = hex.as_bytes();
        if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(D::Error::custom("a path in hex has an even number of hex digits"));
        }
        let nibble = |b: u8| (b as char).to_digit(16).unwrap_or(0) as u8;
        Ok(digits.chunks(2).map(|p| nibble(p[0]) << 4 | nibble(p[1])).collect())
    }
}
