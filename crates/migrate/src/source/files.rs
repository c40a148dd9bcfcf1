//! A round of files: read by a thread, sent as it comes.

use std::collections::HashSet;
use std::time::Instant;

use godwit_memory::FileWatch;
use godwit_model::migration::Phase;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::{SendError, Source, Workload, ms};
use crate::files::{Entry, Following, ScanStats, Sink};
use crate::wire::{Kind, MEMORY_VERSION, WireError};

/// How many pieces of files may wait between disk and network; one is 1 MiB at most.
const QUEUE_PIECES: usize = 16;

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// Sends what has changed in all trees; `always` (tree, path) whatever its ctime says.
    pub(super) async fn file_round<L: Workload>(
        &mut self,
        phase: Phase,
        always: &[(String, Vec<u8>)],
        mut workload: Option<&mut L>,
    ) -> Result<ScanStats, SendError> {
        let begun = Instant::now();
        let mut total = ScanStats::default();
        let frozen = phase == Phase::Freeze;
        let mut first = true;
        for mut scanner in std::mem::take(&mut self.scanners) {
            let always: HashSet<Vec<u8>> =
                always.iter().filter(|(tree, _)| tree == scanner.tree()).map(|(_, path)| path.clone()).collect();
            let (sink, mut pieces) = mpsc::channel(QUEUE_PIECES);
            let mut watch = self.watch.take();
            let begins = std::mem::take(&mut first);
            let scan = tokio::task::spawn_blocking(move || {
                let following = watch.as_mut().and_then(|watch| follow(watch, frozen, begins));
                let known = following.is_some();
                let result = scanner.round(&always, following, &mut ChannelSink(sink));
                (scanner, watch.filter(|_| known), result)
            });
            let mut broken = None;
            while let Some(piece) = pieces.recv().await {
                if let Err(e) = self.piece(piece).await {
                    broken = Some(e);
                    break;
                }
                self.tell(phase, workload.as_deref_mut());
            }
            drop(pieces);
            // A panic of the scan is a bug of ours; it ends the move like any other error.
            let (scanner, watch, result) =
                scan.await.map_err(|e| SendError::Part { phase, doing: "reading files", source: e.into() })?;
            self.watch = watch;
            if let Some(source) = broken {
                return Err(SendError::Wire { phase, source });
            }
            let stats = result.map_err(|source| SendError::Scan { phase, source })?;
            total.bytes_sent += stats.bytes_sent;
            total.bytes_read += stats.bytes_read;
            total.entries_sent += stats.entries_sent;
            total.removed += stats.removed;
            self.scanners.push(scanner);
        }
        tracing::debug!(%phase, ?total, took_ms = ms(begun), followed = self.watch.is_some(), "round of files");
        Ok(total)
    }

    async fn piece(&mut self, piece: Piece) -> Result<(), WireError> {
        match piece {
            Piece::Entry(entry) => self.writer.send_json(Kind::Entry, &entry).await,
            Piece::Data(payload) => {
                self.writer.send(Kind::Data, &payload).await?;
                // An offset and no data: a sign of life has to leave at once.
                if payload.len() == size_of::<u64>() { self.writer.flush().await } else { Ok(()) }
            }
            Piece::Remove(tree, path) => self.writer.send_json(Kind::Remove, &(tree, path)).await,
        }
    }
}

/// The kernel's word on written pages for one tree's part of a round; without it changed files are read whole.
fn follow(watch: &mut FileWatch, frozen: bool, begins: bool) -> Option<Following<'_>> {
    if !begins {
        return Some(Following::go_on(watch, frozen));
    }
    Following::begin(watch, frozen).inspect_err(|error| tracing::warn!(%error, "changed files are read whole")).ok()
}

/// The means to follow what is written to files; why there are none otherwise.
pub(super) async fn files_followed<L: Workload>(version: u32, workload: &L) -> Result<FileWatch, String> {
    if version < MEMORY_VERSION {
        return Err(format!("the destination speaks version {version} of the migration protocol"));
    }
    if let Some(why) = workload.hidden_writes() {
        return Err(why);
    }
    let made = tokio::task::spawn_blocking(FileWatch::new).await.map_err(|error| error.to_string())?;
    made.map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}

/// `Data` is an offset (8 bytes, little-endian) and the bytes there.
pub(super) fn data_payload(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + bytes.len());
    payload.extend_from_slice(&offset.to_le_bytes());
    payload.extend_from_slice(bytes);
    payload
}

enum Piece {
    Entry(Entry),
    Data(Vec<u8>),
    Remove(String, Vec<u8>),
}

struct ChannelSink(mpsc::Sender<Piece>);

impl Sink for ChannelSink {
    fn entry(&mut self, entry: Entry) -> bool {
        self.0.blocking_send(Piece::Entry(entry)).is_ok()
    }

    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> bool {
        self.0.blocking_send(Piece::Data(data_payload(offset, &bytes))).is_ok()
    }

    fn remove(&mut self, tree: &str, path: Vec<u8>) -> bool {
        self.0.blocking_send(Piece::Remove(tree.to_owned(), path)).is_ok()
    }
}
