//! The unix socket for people on the controller's own machine: its file appears only when somebody answers behind it,
//! and nobody but its owner can ever open it.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// How long a controller that already listens may take to accept, in milliseconds.
const PROBE_TIMEOUT_MS: u64 = 1_000;
/// The socket's name in the private directory it is made in.
const NEW: &str = "new";

#[derive(Debug, Error)]
pub enum SocketError {
    #[error("{} is answered by another process; is a controller running already?", path.display())]
    Taken { path: PathBuf },
    #[error("{} exists and is no socket; remove it or choose another path", path.display())]
    NotASocket { path: PathBuf },
    #[error("{} is no path for a socket", path.display())]
    NoName { path: PathBuf },
    #[error("the socket {} could not be made", path.display())]
    Make { path: PathBuf, source: io::Error },
}

/// A socket that listens, under a name that only we can reach.
pub struct Unpublished {
    path: PathBuf,
    private: PathBuf,
}

/// A socket's file, as long as it is ours.
pub struct UnixSocket {
    path: PathBuf,
    /// Device and inode: a later controller may have put its own in our place.
    file: (u64, u64),
}

impl UnixSocket {
    /// Listens, in a private directory beside `path`. A socket that an ended controller left at `path` is no obstacle.
    pub async fn bind(path: &Path) -> Result<(UnixListener, Unpublished), SocketError> {
        let failed = |source| SocketError::Make { path: path.to_owned(), source };
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(SocketError::NoName { path: path.to_owned() });
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        fs::create_dir_all(parent).map_err(failed)?;
        refuse_if_taken(path).await?;
        let mut private = OsString::from(".");
        private.push(name);
        private.push(format!(".{}", std::process::id()));
        let private = parent.join(private);
        match fs::remove_dir_all(&private) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&private).map_err(failed)?;
        let unpublished = Unpublished { path: path.to_owned(), private };
        let directory = File::open(&unpublished.private).map_err(failed)?;
        // Through the descriptor: an address has 107 bytes, and `path` may use them all.
        let address = format!("/proc/self/fd/{}/{NEW}", directory.as_raw_fd());
        let listener = UnixListener::bind(&address).map_err(failed)?;
        fs::set_permissions(unpublished.private.join(NEW), Permissions::from_mode(0o600)).map_err(failed)?;
        Ok((listener, unpublished))
    }

    /// Removes the file, unless another controller has replaced it.
    pub fn remove(self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket stays behind");
        }
    }
}

impl Unpublished {
    /// Gives the socket its name.
    pub fn publish(self) -> Result<UnixSocket, SocketError> {
        let failed = |source| SocketError::Make { path: self.path.clone(), source };
        let made = self.private.join(NEW);
        let metadata = fs::symlink_metadata(&made).map_err(failed)?;
        fs::rename(&made, &self.path).map_err(failed)?;
        Ok(UnixSocket { path: self.path.clone(), file: (metadata.dev(), metadata.ino()) })
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        // What is left is an empty directory with a telling name; the next start removes it.
        let _ = fs::remove_dir_all(&self.private);
    }
}

async fn refuse_if_taken(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => Err(SocketError::NotASocket { path: path.to_owned() }),
        Ok(_) => match timeout(Duration::from_millis(PROBE_TIMEOUT_MS), UnixStream::connect(path)).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Ok(Err(source)) if source.kind() != io::ErrorKind::NotFound => {
                Err(SocketError::Make { path: path.to_owned(), source })
            }
            Ok(Err(_gone_meanwhile)) => Ok(()),
            Ok(Ok(_)) | Err(_) => Err(SocketError::Taken { path: path.to_owned() }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(SocketError::Make { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_appears_when_published_and_only_its_owner_may_open_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/api.sock");
        let (_listener, unpublished) = UnixSocket::bind(&path).await.unwrap();
        assert!(!path.exists());
        let socket = unpublished.publish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).await.unwrap();
        socket.remove();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_socket_that_is_answered_is_not_taken_and_one_left_behind_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let (listener, unpublished) = UnixSocket::bind(&path).await.unwrap();
        let first = unpublished.publish().unwrap();
        assert!(matches!(UnixSocket::bind(&path).await, Err(SocketError::Taken { .. })));
        drop(listener);
        let (_listener, unpublished) = UnixSocket::bind(&path).await.unwrap();
        let _second = unpublished.publish().unwrap();
        // Not ours any more.
        first.remove();
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_file_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(UnixSocket::bind(&path).await, Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
