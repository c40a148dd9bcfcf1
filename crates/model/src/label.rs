//! Labels of hosts: what a host says of itself, and what a container can require of its host.

use std::str::FromStr;

use thiserror::Error;

/// The longest key or value, in characters.
pub const MAX_LABEL_CHARS: usize = 63;
/// The most labels of one host, and of what one layer requires.
pub const MAX_LABELS: usize = 64;

/// Why a label was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LabelError {
    #[error("{text:?} is not a label; write KEY=VALUE, for example zone=east")]
    NotALabel { text: String },
    #[error(
        "the {what} of a label is empty; use 1 to {MAX_LABEL_CHARS} characters a-z, A-Z, 0-9, '-', '_', '.' and '/'"
    )]
    Empty { what: &'static str },
    #[error("the {what} {text:?} of a label has {chars} characters; it has {MAX_LABEL_CHARS} at most")]
    TooLong { what: &'static str, text: String, chars: usize },
    #[error(
        "the {what} {text:?} of a label has the character {bad:?}; a-z, A-Z, 0-9, '-', '_', '.' and '/' are allowed"
    )]
    BadCharacter { what: &'static str, text: String, bad: char },
}

/// One label of a host, as `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    pub key: String,
    pub value: String,
}

impl Label {
    /// A checked label; errors say which part is wrong and what is allowed.
    pub fn new(key: impl Into<String>, value: impl Into<String>) -> Result<Self, LabelError> {
        let (key, value) = (key.into(), value.into());
        check("key", &key)?;
        check("value", &value)?;
        Ok(Self { key, value })
    }
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let not = || LabelError::NotALabel { text: text.to_owned() };
        let (key, value) = text.split_once('=').ok_or_else(not)?;
        Self::new(key, value)
    }
}

fn check(what: &'static str, text: &str) -> Result<(), LabelError> {
    let chars = text.chars().count();
    if chars == 0 {
        return Err(LabelError::Empty { what });
    }
    if chars > MAX_LABEL_CHARS {
        return Err(LabelError::TooLong { what, text: text.to_owned(), chars });
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    match text.chars().find(|c| !allowed(*c)) {
        Some(bad) => Err(LabelError::BadCharacter { what, text: text.to_owned(), bad }),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_checked() {
        let label: Label = "example.org/zone=East_1".parse().unwrap();
        assert_eq!((label.key.as_str(), label.value.as_str()), ("example.org/zone", "East_1"));
        for bad in ["", "zone", "=east", "zone=", "zone=a=b", "zo ne=east", "zone=ä", &format!("k={}", "x".repeat(64))]
        {
            assert!(bad.parse::<Label>().is_err(), "{bad:?}");
        }
        assert!(format!("k={}", "x".repeat(MAX_LABEL_CHARS)).parse::<Label>().is_ok());
    }
}
