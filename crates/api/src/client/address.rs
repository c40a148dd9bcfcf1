//! Where a controller listens, as people write it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port of the controller's TLS listener where an address names none.
const DEFAULT_PORT: u16 = 7717;

/// A controller's address: `unix:/path` or `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A socket on this machine; who may open the file may do everything.
    Unix(PathBuf),
    /// Mutual TLS.
    Https {
        /// Name or IP address, without brackets.
        host: String,
        /// TCP port.
        port: u16,
    },
}

/// An address that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a controller's address; write unix:/path/to/socket or https://host:port")]
pub struct AddressError {
    text: String,
}

impl Address {
    /// What goes into the `Host` header.
    pub(super) fn host(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            Self::Https { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Https { host, port } => format!("{host}:{port}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Https { .. } => write!(f, "https://{}", self.host()),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let not = || AddressError { text: text.to_owned() };
        if let Some(path) = text.strip_prefix("unix:") {
            // Both `unix:/path` and `unix:///path` are in use elsewhere.
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(not()) };
        }
        let authority = text.strip_prefix("https://").ok_or_else(not)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let parsed: http::uri::Authority = authority.parse().map_err(|_| not())?;
        let host = parsed.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port_is_wrong = parsed.port_u16().is_none() && authority.len() != parsed.host().len();
        if host.is_empty() || authority.contains('@') || port_is_wrong {
            return Err(not());
        }
        Ok(Self::Https { host, port: parsed.port_u16().unwrap_or(DEFAULT_PORT) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for (text, shown) in [
            ("unix:/run/godwit/api.sock", "unix:/run/godwit/api.sock"),
            ("unix:///run/a", "unix:/run/a"),
            ("https://c.example:8443", "https://c.example:8443"),
            ("https://10.0.0.2/", "https://10.0.0.2:7717"),
            ("https://[fd00::1]:9", "https://[fd00::1]:9"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "unix:", "unix:relative", "http://a:1", "https://", "https://a:x", "https://u@a:1", "/run/a"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
