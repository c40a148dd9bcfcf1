//! Typed ids and names. A name is a DNS label (RFC 1123), because every name is also answered by DNS.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest name of an environment, layer or host, in characters.
pub const MAX_NAME_CHARS: usize = 40;

/// Why a name or id was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    #[error("the name is empty; use 1 to {MAX_NAME_CHARS} characters a-z, 0-9 and '-'")]
    Empty,
    #[error("{name:?} has {chars} characters; a name has {MAX_NAME_CHARS} at most")]
    TooLong { name: String, chars: usize },
    #[error(
        "{name:?} has the character {bad:?}; a name is made of a-z, 0-9 and '-' and neither starts nor ends with '-'"
    )]
    BadCharacter { name: String, bad: char },
    #[error("{text:?} is not a container; write ENVIRONMENT/LAYER-NUMBER, for example shop/db-1")]
    NotAContainer { text: String },
    #[error("{text:?} is not an id; an id is 12 characters 0-9 and a-f")]
    NotAnId { text: String },
}

fn check_label(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let chars = name.chars().count();
    if chars > MAX_NAME_CHARS {
        return Err(NameError::TooLong { name: name.to_owned(), chars });
    }
    let edge = |c: Option<char>| c == Some('-');
    let bad = name
        .chars()
        .find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-'))
        .or_else(|| (edge(name.chars().next()) || edge(name.chars().last())).then_some('-'));
    match bad {
        Some(bad) => Err(NameError::BadCharacter { name: name.to_owned(), bad }),
        None => Ok(()),
    }
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A checked name; errors say which character is wrong and what is allowed.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                check_label(&name)?;
                Ok(Self(name))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(s: &str) -> Result<Self, NameError> {
                Self::new(s)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(s: String) -> Result<Self, NameError> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(n: $name) -> String {
                n.0
            }
        }
    };
}

label!(
    /// The name of an environment: the layers that form one application.
    EnvName
);
label!(
    /// The name of a layer: the containers of one role of an environment.
    LayerName
);
label!(
    /// The name of a host: a Linux server that runs an agent.
    HostName
);

/// What a person calls a container: `shop/db-1`. Numbers start at 1 and are stable for the container's life.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerName {
    pub env: EnvName,
    pub layer: LayerName,
    pub number: u32,
}

impl ContainerName {
    /// The container's own name inside its environment, also its host name: `db-1`.
    pub fn local(&self) -> String {
        format!("{}-{}", self.layer, self.number)
    }
}

impl fmt::Display for ContainerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}-{}", self.env, self.layer, self.number))
    }
}

impl FromStr for ContainerName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let not = || NameError::NotAContainer { text: text.to_owned() };
        let (env, rest) = text.split_once('/').ok_or_else(not)?;
        let (layer, number) = rest.rsplit_once('-').ok_or_else(not)?;
        let number: u32 = number.parse().ok().filter(|n| *n > 0).ok_or_else(not)?;
        Ok(Self { env: EnvName::new(env)?, layer: LayerName::new(layer)?, number })
    }
}

impl TryFrom<String> for ContainerName {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<ContainerName> for String {
    fn from(n: ContainerName) -> String {
        n.to_string()
    }
}

macro_rules! short_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new random id: 48 bits as 12 hex digits, short enough for a Linux link name (15 characters).
            pub fn random() -> Self {
                let bytes = *uuid::Uuid::new_v4().as_bytes();
                Self(bytes[..6].iter().map(|b| format!("{b:02x}")).collect())
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let hex = text.len() == 12 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if hex { Ok(Self(text.to_owned())) } else { Err(NameError::NotAnId { text: text.to_owned() }) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(s: String) -> Result<Self, NameError> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

short_id!(
    /// The id of a container: names its directory, cgroup and links on every host it lives on.
    ContainerId
);
short_id!(
    /// The id of one move of one container.
    MoveId
);

/// Who may run a container: the copy whose generation equals the store's. It only ever grows; an agent that
/// holds an older generation may not run, write or announce the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_names_round_trip_and_refuse_nonsense() {
        let name: ContainerName = "shop/web-front-12".parse().unwrap();
        assert_eq!((name.layer.as_str(), name.number), ("web-front", 12));
        assert_eq!(name.to_string(), "shop/web-front-12");
        for bad in ["", "db-1", "shop/db", "shop/db-0", "shop/db-x", "Shop/db-1", "shop/-1", "shop/db-1/x"] {
            assert!(bad.parse::<ContainerName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_dns_labels() {
        assert!(EnvName::new("a").is_ok());
        assert!(EnvName::new("a".repeat(41)).is_err());
        for bad in ["-a", "a-", "a_b", "ä", "a.b"] {
            assert!(EnvName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_are_twelve_hex_digits() {
        let id = ContainerId::random();
        assert_eq!(id.to_string().parse::<ContainerId>().unwrap(), id);
        assert!("0123456789AB".parse::<ContainerId>().is_err());
    }
}
