//! Settings under `/proc/sys/net`. They belong to the network namespace of the thread that opens the file.

use std::fs;
use std::io;

use crate::error::NetworkError;

/// Writes `value` to `/proc/sys/net/<key>` unless it is there already.
pub(crate) fn set(key: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/{key}");
    let same = |current: String| current.split_whitespace().eq(value.split_whitespace());
    if fs::read_to_string(&path).is_ok_and(same) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| NetworkError::Sysctl { path, value: value.to_owned(), source })
}

/// Like [`set`], for what the kernel may not have or the machine may keep read-only.
pub(crate) fn set_if_there(key: &str, value: &str) {
    if let Err(error) = set(key, value) {
        let missing = matches!(&error, NetworkError::Sysctl { source, .. } if source.kind() == io::ErrorKind::NotFound);
        if !missing {
            tracing::warn!(key, value, %error, "setting left as it is");
        }
    }
}
