//! Where CRIU is and which one it is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

/// Set to use another CRIU than the one found by itself.
pub const CRIU_VARIABLE: &str = "GODWIT_CRIU";
/// The private prefix `./dev setup` unpacks CRIU into where the distribution's own is too old.
pub const PRIVATE_PREFIX: &str = "/opt/godwit/criu/criu";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    /// The oldest that works: older ones cannot skip the network lock or find the vDSO of current kernels.
    pub const MINIMUM: Version = Version { major: 4, minor: 1, patch: 0 };

    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|l| l.strip_prefix("Version: "))?;
        let mut parts = line.trim().split('.').map(|p| p.parse::<u32>().ok());
        let major = parts.next()??;
        Some(Self { major, minor: parts.next().flatten().unwrap_or(0), patch: parts.next().flatten().unwrap_or(0) })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[derive(Debug, Error)]
pub enum FindError {
    #[error("CRIU was not found (looked at ${CRIU_VARIABLE}, {PRIVATE_PREFIX} and PATH); run ./dev setup or install criu {} or newer", Version::MINIMUM)]
    Absent,
    #[error("{} did not say its version; is it CRIU?", path.display())]
    NotCriu { path: PathBuf },
    #[error("{} is CRIU {found}; {} or newer is needed: run ./dev setup", path.display(), Version::MINIMUM)]
    TooOld { path: PathBuf, found: Version },
}

/// A usable CRIU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criu {
    pub path: PathBuf,
    pub version: Version,
}

impl Criu {
    /// The CRIU named by `$GODWIT_CRIU`, else the private prefix's, else the first in `PATH`.
    pub fn find() -> Result<Self, FindError> {
        if let Some(path) = std::env::var_os(CRIU_VARIABLE) {
            return Self::at(Path::new(&path));
        }
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        let in_path = std::env::split_paths(&dirs).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
        let path = std::iter::once(PathBuf::from(PRIVATE_PREFIX))
            .chain(in_path.map(|d| d.join("criu")))
            .find(|p| p.is_file())
            .ok_or(FindError::Absent)?;
        Self::at(&path)
    }

    /// The CRIU at `path`, checked to be new enough.
    pub fn at(path: &Path) -> Result<Self, FindError> {
        let output = Command::new(path).arg("--version").output();
        let version = output.ok().and_then(|o| Version::parse(&String::from_utf8_lossy(&o.stdout)));
        let version = version.ok_or_else(|| FindError::NotCriu { path: path.to_owned() })?;
        if version < Version::MINIMUM {
            return Err(FindError::TooOld { path: path.to_owned(), found: version });
        }
        Ok(Self { path: path.to_owned(), version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let v = Version::parse("Version: 4.1.1\nGitID: v4.1.1\n").unwrap();
        assert_eq!(v.to_string(), "4.1.1");
        assert!(Version::parse("Version: 3.17").unwrap() < Version::MINIMUM);
        assert!(Version::parse("criu?").is_none());
    }
}
