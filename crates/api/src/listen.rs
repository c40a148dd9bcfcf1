//! Listening where the one before may still be going.

use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::time::{Instant, sleep};

/// A killed process with much memory takes this long at the most to let go of its sockets, in milliseconds.
pub const PREDECESSOR_MS: u64 = 10_000;
/// The kernel tells nobody that an address has become free: it is tried again after this time, in milliseconds.
const AGAIN_MS: u64 = 50;

/// A listener at `address`. Waits up to [`PREDECESSOR_MS`] while somebody else listens there: whoever is started in the
/// place of a process that was killed comes before that one has ended.
///
/// Errors: those of bind(2) and of looking up a name, `AddrInUse` after the wait.
pub async fn listen(address: impl ToSocketAddrs) -> io::Result<TcpListener> {
    let deadline = Instant::now() + Duration::from_millis(PREDECESSOR_MS);
    loop {
        match TcpListener::bind(&address).await {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                sleep(Duration::from_millis(AGAIN_MS)).await;
            }
            other => return other,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_is_still_there_is_waited_for() {
        let before = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = before.local_addr().unwrap();
        let next = tokio::spawn(listen(address));
        // It has tried at least once by then, and must not have failed.
        sleep(Duration::from_millis(3 * AGAIN_MS)).await;
        assert!(!next.is_finished());
        drop(before);
        assert_eq!(next.await.unwrap().unwrap().local_addr().unwrap(), address);
    }
}
