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

    /// The oldest that works with the running kernel. From Linux 6.16 on, SO_PASSCRED and SO_PASSSEC of a socket that is
    /// not a unix one cannot be read (EOPNOTSUPP); CRIU before 4.2 takes that for an error and dumps no TCP socket.
    pub fn minimum_here() -> Self {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self::minimum_for(&release)
    }

    fn minimum_for(kernel_release: &str) -> Self {
        let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u32>().ok();
        let mut parts = kernel_release.trim().split('.').filter_map(number);
        match (parts.next(), parts.next()) {
            (Some(major), Some(minor)) if (major, minor) >= (6, 16) => Self { major: 4, minor: 2, patch: 0 },
            _ => Self::MINIMUM,
        }
    }

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
    #[error(
        "CRIU was not found (looked at ${CRIU_VARIABLE}, {PRIVATE_PREFIX} and PATH); run ./dev setup or install criu {} or newer",
        Version::minimum_here()
    )]
    Absent,
    #[error("{} did not say its version; is it CRIU?", path.display())]
    NotCriu { path: PathBuf },
    #[error("{} is CRIU {found}; {needed} or newer is needed with this kernel: run ./dev setup", path.display())]
    TooOld { path: PathBuf, found: Version, needed: Version },
}

/// A usable CRIU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criu {
    pub path: PathBuf,
    pub version: Version,
}

impl Criu {
    /// Lets criu find out what the kernel can do and keep it in `/run/criu.kdat`, so that the first move does not wait for
    /// that. Takes some tens of milliseconds; blocks. Nothing depends on its success.
    pub fn look_at_kernel(&self) {
        let quiet = || std::process::Stdio::null();
        let _ = Command::new(&self.path).arg("check").stdin(quiet()).stdout(quiet()).stderr(quiet()).status();
    }

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
        let needed = Version::minimum_here();
        if version < needed {
            return Err(FindError::TooOld { path: path.to_owned(), found: version, needed });
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
        assert_eq!(Version::minimum_for("6.12.48+deb13-amd64\n"), Version::MINIMUM);
        for new in ["6.16", "6.18.44", "7.0-rc1"] {
            assert_eq!(Version::minimum_for(new).minor, 2, "{new}");
        }
    }
}
