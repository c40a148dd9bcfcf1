//! Work inside another network namespace: on a thread of its own, because a thread is what is in a namespace.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

use crate::error::NetworkError;

/// A handle on the network namespace of process `pid`.
pub(crate) fn of_process(pid: u32) -> Result<OwnedFd, NetworkError> {
    let file = File::open(format!("/proc/{pid}/ns/net")).map_err(|source| NetworkError::Namespace { pid, source })?;
    Ok(file.into())
}

/// Runs `work` on a new thread in `namespace` and returns what it returns.
pub(crate) async fn inside<F>(namespace: OwnedFd, pid: u32, work: F) -> Result<(), NetworkError>
where
    F: AsyncFnOnce() -> Result<(), NetworkError> + Send + 'static,
{
    let (done, result) = oneshot::channel();
    let body = move || {
        let enter = || -> Result<(), NetworkError> {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| NetworkError::Namespace { pid, source: error.into() })?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|source| NetworkError::Thread { what: "network settings", source })?;
            runtime.block_on(work())
        };
        // Nobody waits any more: the caller was cancelled.
        let _ = done.send(enter());
    };
    let thread = thread::Builder::new().name("gw-namespace".into()).spawn(body);
    thread.map_err(|source| NetworkError::Thread { what: "network settings", source })?;
    let gone = std::io::Error::other("the thread ended without a result");
    result.await.unwrap_or(Err(NetworkError::Thread { what: "network settings", source: gone }))
}
