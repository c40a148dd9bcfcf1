//! Further connections of a move: each takes pages in, and all meet at barriers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use godwit_memory::PageStore;
use tokio::io::AsyncRead;
use tokio::sync::{Barrier, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::{ReceiveError, take_memory};
use crate::wire::{FrameReader, Kind, WireError};

/// Connections that have joined; none follow after the receiver is dropped.
pub type Joined<R> = mpsc::Receiver<FrameReader<R>>;

/// The connections beside the first one. Dropping this ends them.
pub(super) struct Lanes {
    barrier: Arc<Barrier>,
    /// Why one of them has ended.
    ended: mpsc::Receiver<ReceiveError>,
    received_bytes: Arc<AtomicU64>,
    _task: AbortOnDropHandle<()>,
}

impl Lanes {
    /// Waits for all but the first of so many `connections`, and serves them.
    pub(super) fn serve<R>(connections: u32, mut joined: Joined<R>, store: &Arc<PageStore>) -> Self
    where
        R: AsyncRead + Unpin + Send + 'static,
    {
        let barrier = Arc::new(Barrier::new(connections as usize));
        let (tell, ended) = mpsc::channel(connections as usize);
        let received_bytes = Arc::new(AtomicU64::new(0));
        let (meet, store, received) = (Arc::clone(&barrier), Arc::clone(store), Arc::clone(&received_bytes));
        let task = tokio::spawn(async move {
            let mut lanes = Vec::new();
            for _ in 1..connections {
                let Some(reader) = joined.recv().await else { return };
                let (meet, store, received, tell) =
                    (Arc::clone(&meet), Arc::clone(&store), Arc::clone(&received), tell.clone());
                lanes.push(AbortOnDropHandle::new(tokio::spawn(async move {
                    let error = lane(reader, &store, &meet, &received).await;
                    // Nobody listens any more once everything is here.
                    let _ = tell.send(error).await;
                })));
            }
            for lane in lanes {
                let _ = lane.await;
            }
        });
        Self { barrier, ended, received_bytes, _task: AbortOnDropHandle::new(task) }
    }

    pub(super) fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// Returns when all connections are here. An error: one has ended, and never will be.
    pub(super) async fn meet(&mut self) -> Result<(), ReceiveError> {
        tokio::select! {
            biased;
            _ = self.barrier.wait() => Ok(()),
            ended = self.ended.recv() => Err(ended.unwrap_or(WireError::Closed.into())),
        }
    }
}

/// One of them, until it ends: always with an error, which is the connection's end if all went well.
async fn lane<R: AsyncRead + Unpin>(
    mut reader: FrameReader<R>,
    store: &PageStore,
    meet: &Barrier,
    received: &AtomicU64,
) -> ReceiveError {
    loop {
        let frame = match reader.next().await {
            Ok(frame) => frame,
            Err(error) => return error.into(),
        };
        received.fetch_add(frame.bytes(), Ordering::Relaxed);
        match frame.kind {
            Kind::Memory | Kind::PackedMemory | Kind::EmptyMemory => {
                if let Err(error) = tokio::task::block_in_place(|| take_memory(store, &frame)) {
                    return error;
                }
            }
            Kind::Barrier => {
                meet.wait().await;
            }
            got => return WireError::Unexpected { got, wanted: "memory" }.into(),
        }
    }
}
