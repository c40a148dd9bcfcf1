//! Post-copy: pages that come after `Final`, and wishes for them on the way back.

use std::collections::HashMap;
use std::future::pending;
use std::time::Duration;

use godwit_memory::{Key, Late, LateFeed, PageRange, PageStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::{ReceiveError, content_of};
use crate::pages::{Head, with_pages};
use crate::wire::{Frame, FrameReader, FrameWriter, Kind, WireError};

/// A source that has pages to send is not silent for so long unless it is lost, in milliseconds: the container stands
/// still meanwhile.
pub(super) const SILENCE_TIMEOUT_MS: u64 = 10_000;
/// Wishes that wait for the wire; each thread of the container has one at most.
const QUEUE_WANTS: usize = 4096;

/// Memory that comes while the processes run. Dropping it ends that: they stand still then where they need what is
/// missing, and must be ended.
#[derive(Debug)]
pub struct Following {
    task: Option<AbortOnDropHandle<Result<(), ReceiveError>>>,
}

impl Following {
    /// Waits until all of it is in the hands of who fills it in. After an error the processes must not go on. May be
    /// given up and asked again.
    pub async fn end(&mut self) -> Result<(), ReceiveError> {
        let Some(task) = &mut self.task else { return Ok(()) };
        let ended = task.await;
        self.task = None;
        // A panic there is a bug of ours; to the container it is a loss.
        ended.unwrap_or_else(|error| Err(ReceiveError::Late(std::io::Error::other(error))))
    }

    /// What went wrong; never, if nothing does.
    pub(super) async fn failed(&mut self) -> ReceiveError {
        match self.end().await {
            Ok(()) => pending().await,
            Err(error) => error,
        }
    }
}

/// The names of pages that come late.
#[derive(Default)]
pub(super) struct LatePages {
    pages: HashMap<Key, Vec<PageRange>>,
}

impl LatePages {
    /// These pages come later: what is here of them is void.
    pub(super) fn named(&mut self, store: &PageStore, frame: &Frame) -> Result<(), ReceiveError> {
        let (head, ranges, _) = Head::split(&frame.payload).map_err(WireError::from)?;
        ranges.iter().try_for_each(|range| store.forget(head.key, *range, head.round))?;
        self.pages.entry(head.key).or_default().extend(ranges);
        Ok(())
    }

    /// Takes the connection over, if anything comes late.
    pub(super) fn follow<R, W>(
        self,
        reader: FrameReader<R>,
        writer: FrameWriter<W>,
    ) -> Result<(Option<Late>, Option<Following>), ReceiveError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        if self.pages.is_empty() {
            return Ok((None, None));
        }
        let pages = self.pages.into_iter().map(|(key, ranges)| (key, ranges.into_iter().collect())).collect();
        let (late, feed) = Late::new(pages).map_err(ReceiveError::Late)?;
        let task = AbortOnDropHandle::new(tokio::spawn(pass_on(reader, writer, feed)));
        Ok((Some(late), Some(Following { task: Some(task) })))
    }
}

async fn pass_on<R, W>(
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
    mut feed: LateFeed,
) -> Result<(), ReceiveError>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    let mut wants = feed.wants().map_err(ReceiveError::Late)?;
    let (tell, mut wanted) = mpsc::channel(QUEUE_WANTS);
    let hear = move || {
        while let Ok(Some(want)) = wants.hear() {
            if tell.blocking_send(want).is_err() {
                return;
            }
        }
    };
    // It ends with the feed.
    let thread = std::thread::Builder::new().name("godwit-wants".to_owned()).stack_size(128 << 10);
    thread.spawn(hear).map_err(ReceiveError::Late)?;
    let forward = async {
        loop {
            let frame = tokio::time::timeout(Duration::from_millis(SILENCE_TIMEOUT_MS), reader.next()).await;
            let frame = frame.map_err(|_| ReceiveError::SilentLate)??;
            if tokio::task::block_in_place(|| pass(&mut feed, &frame))? {
                return Ok::<_, ReceiveError>(());
            }
        }
    };
    let backward = async {
        while let Some((key, page)) = wanted.recv().await {
            writer.send(Kind::Wanted, &Head { key, round: 0 }.begin(&[page], 0)).await?;
            writer.flush().await?;
        }
        // Who fills is gone: the next page cannot be passed on, which says so.
        pending::<Result<(), ReceiveError>>().await
    };
    tokio::select! {
        forwarded = forward => forwarded?,
        failed = backward => failed?,
    }
    writer.send(Kind::Complete, &[]).await?;
    Ok(writer.flush().await?)
}

/// `true`: that was all.
fn pass(feed: &mut LateFeed, frame: &Frame) -> Result<bool, ReceiveError> {
    match frame.kind {
        Kind::LateEnd => feed.complete().map(|()| true),
        Kind::EmptyMemory => {
            let (head, ranges, _) = Head::split(&frame.payload).map_err(WireError::from)?;
            feed.zeroes(head.key, &ranges).map(|()| false)
        }
        Kind::Memory | Kind::PackedMemory => {
            let content = content_of(frame)?;
            let (head, ranges, content) = Head::split(&content).map_err(WireError::from)?;
            feed.pages(head.key, &with_pages(&ranges, content).map_err(WireError::from)?).map(|()| false)
        }
        got => return Err(WireError::Unexpected { got, wanted: "memory that follows" }.into()),
    }
    .map_err(ReceiveError::Late)
}
