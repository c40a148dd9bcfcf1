//! Post-copy: pages that are sent after `Final`, those first that somebody waits for on the other side.

use std::sync::Arc;
use std::time::Duration;

use godwit_memory::{Key, Outstanding, PageRange, PageReader, Round};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{PartError, Source};
use crate::memory::{Memory, MemoryError, Outgoing};
use crate::pages::Head;
use crate::wire::{Kind, WireError};

/// Less than this is not worth it: it is sent while the container stands still, in bytes.
pub(super) const LATE_FROM_BYTES: u64 = 1 << 20;
/// What is read and sent at once when nobody waits, in bytes: whoever begins to wait waits for one or two of these.
const STEP_BYTES: u64 = 256 << 10;
/// Frames between reading and sending.
const QUEUE_FRAMES: usize = 1;
/// What is sent with a page that somebody waits for, in bytes: it and what follows.
const AROUND_BYTES: u64 = 64 << 10;
/// Pages that are waited for and not read yet; each thread of the container waits for one at most.
const QUEUE_WANTS: usize = 4096;
/// The other side says that it has everything within this time after the last page, in milliseconds.
const COMPLETE_TIMEOUT_MS: u64 = 30_000;

/// Pages of frozen processes that are not on the other side yet.
pub(super) struct Late {
    memory: Memory,
    processes: Vec<LateProcess>,
}

struct LateProcess {
    pid: i32,
    key: Key,
    pages: Outstanding,
}

/// What of the last round may come late: private memory of processes. Shared memory must be there before they run.
pub(super) fn late_bytes(last: &Round) -> u64 {
    last.processes.iter().map(|p| p.pages.bytes()).sum()
}

impl Late {
    pub(super) fn new(memory: Memory, last: &Round) -> Self {
        let process = |p: &godwit_memory::ProcessPages| LateProcess {
            pid: p.pid,
            key: Key::Process(p.inner_pid),
            pages: Outstanding::from(&p.pages),
        };
        Self { memory, processes: last.processes.iter().map(process).collect() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.processes.iter().map(|p| p.pages.bytes()).sum()
    }

    /// Reads everything, wanted pages first; ends early when nobody listens any more. Blocks.
    fn read(
        mut self,
        mut wants: mpsc::Receiver<(Key, PageRange)>,
        out: &mpsc::Sender<Outgoing>,
        link: &crate::packing::LinkMeter,
    ) -> Result<(), MemoryError> {
        while !out.is_closed() {
            let wanted = wants.try_recv().ok();
            let (of, within, bytes) = match wanted {
                Some((key, page)) => {
                    let end = page.start.saturating_add(AROUND_BYTES);
                    let of = self.processes.iter_mut().find(|p| p.key == key && p.pages.contains(page.start));
                    (of, PageRange { start: page.start, end }, AROUND_BYTES)
                }
                None => {
                    let of = self.processes.iter_mut().find(|p| !p.pages.is_empty());
                    (of, PageRange { start: 0, end: u64::MAX }, STEP_BYTES)
                }
            };
            match of {
                Some(process) => {
                    let pages = process.pages.take(within, bytes);
                    let reader = PageReader::of_process(process.pid, pages);
                    self.memory.read_late(process.key, reader, out, link)?;
                }
                // It was on its way already.
                None if wanted.is_some() => {}
                None => break,
            }
        }
        Ok(())
    }
}

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// After `Final`: sends what is late and waits for the word that all of it is there. An error: the other side may
    /// not have all of it, and will not get it.
    pub(super) async fn send_late(&mut self, late: Late) -> Result<(), PartError> {
        let (to_read, wants) = mpsc::channel(QUEUE_WANTS);
        let (out, mut frames) = mpsc::channel(QUEUE_FRAMES);
        let link = Arc::clone(&self.link);
        let reading = tokio::task::spawn_blocking(move || late.read(wants, &out, &link));
        let Self { reader, writer, .. } = self;
        let send = async {
            while let Some(Outgoing { kind, payload }) = frames.recv().await {
                writer.send(kind, &payload).await?;
                writer.flush().await?;
            }
            reading.await??;
            writer.send(Kind::LateEnd, &[]).await?;
            writer.flush().await?;
            Ok::<_, PartError>(())
        };
        let listen = async {
            loop {
                let frame = reader.next().await?;
                match frame.kind {
                    Kind::Wanted => {
                        let (head, ranges, _) = Head::split(&frame.payload).map_err(WireError::from)?;
                        for range in ranges {
                            // Full, or over: it comes in its turn.
                            let _ = to_read.try_send((head.key, range));
                        }
                    }
                    Kind::Complete => return Ok::<_, PartError>(()),
                    got => return Err(WireError::Unexpected { got, wanted: "a wish, or that all is there" }.into()),
                }
            }
        };
        tokio::pin!(listen);
        tokio::select! {
            sent = send => sent?,
            // Before all was sent that can only be an error.
            heard = &mut listen => return heard.and(Err("the destination has all before it was sent".into())),
        }
        timeout(Duration::from_millis(COMPLETE_TIMEOUT_MS), listen).await.map_err(|_| {
            format!("the destination did not say within {} s that all is there", COMPLETE_TIMEOUT_MS / 1000)
        })?
    }
}
