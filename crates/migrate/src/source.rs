//! The source of a move, mirror image of [`crate::destination`].

use std::collections::HashSet;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use godwit_model::migration::{Phase, Progress};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::files::{Entry, ScanError, ScanStats, Scanner, Sink};
use crate::wire::{
    Accept, Final, FrameReader, FrameWriter, Image, Kind, OLDEST_VERSION, Offer, Refuse, RoundEnd, VERSION, WireError,
};

/// Rounds of files while the container runs, at the most.
pub const MAX_ROUNDS: u32 = 6;
/// A round that sends less than this is the last before the freeze, in bytes.
pub const SMALL_ROUND_BYTES: u64 = 8 << 20;
/// How many pieces of files may wait between disk and network; one is 1 MiB at most.
const QUEUE_PIECES: usize = 16;
/// Pages are passed on in pieces of this size, in bytes.
const PAGE_PIECE_BYTES: usize = 1 << 20;
/// The other side answers the offer within this time, in milliseconds.
const OFFER_TIMEOUT_MS: u64 = 10_000;
/// Progress is told at most this often, in milliseconds.
const PROGRESS_EVERY_MS: u64 = 100;

/// Any error of the agent's part of a phase.
pub type PartError = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Error)]
pub enum SendError {
    #[error("{phase}: the destination refused: {reason}")]
    Refused { phase: Phase, reason: String },
    #[error("{phase}: the connection to the destination failed")]
    Wire { phase: Phase, source: WireError },
    #[error("{phase}: files could not be read")]
    Scan { phase: Phase, source: ScanError },
    #[error("{phase}: {doing} failed")]
    Part { phase: Phase, doing: &'static str, source: PartError },
}

impl SendError {
    pub fn phase(&self) -> Phase {
        match self {
            Self::Refused { phase, .. } | Self::Wire { phase, .. } => *phase,
            Self::Scan { phase, .. } | Self::Part { phase, .. } => *phase,
        }
    }
}

/// What CRIU wrote besides pages, and what the destination has to know.
#[derive(Debug)]
pub struct Dumped {
    pub images_dir: PathBuf,
    pub detail: serde_json::Value,
}

/// The container that moves. Paused on success, resumed on failure: [`Workload::thaw`] is called on every error after
/// [`Workload::freeze`] was tried, and never after success.
pub trait Workload: Send {
    /// Name and directory of every tree of files that moves along.
    fn trees(&self) -> Vec<(String, PathBuf)>;
    /// Called when a phase begins and when the numbers grow; must not block.
    fn progress(&mut self, phase: Phase, progress: Progress);
    /// Processes stand still, frames go to the destination. Returns what must be sent again whatever its ctime says:
    /// tree and path of files that are mapped shared and writable.
    fn freeze(&mut self) -> impl Future<Output = Result<Vec<(String, Vec<u8>)>, PartError>> + Send;
    /// Everything but pages into files, pages into `pages`, which is closed at the end.
    fn dump(&mut self, pages: UnixStream) -> impl Future<Output = Result<Dumped, PartError>> + Send;
    /// As before the freeze.
    fn thaw(&mut self) -> impl Future<Output = ()> + Send;
}

/// What a successful send was; the container is frozen and everything is on the other side.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    pub bytes: u64,
    pub fin: Final,
}

/// Runs the source's side up to and including `Final`.
///
/// On `Err` the container runs as before. On `Ok` it is frozen and only the store's verdict may free or thaw it.
pub async fn send<R, W, L>(
    reader: R,
    writer: W,
    move_id: &str,
    container: &str,
    workload: &mut L,
) -> Result<Sent, SendError>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
    L: Workload,
{
    let mut source = Source {
        reader: FrameReader::new(reader),
        writer: FrameWriter::new(writer),
        scanners: workload.trees().into_iter().map(|(name, dir)| Scanner::new(name, dir)).collect(),
        progress: Progress::default(),
        told: Instant::now(),
    };
    source.handshake(move_id, container).await?;
    source.rounds(workload).await?;
    match source.frozen_part(workload).await {
        Ok(fin) => Ok(Sent { bytes: source.writer.sent_bytes, fin }),
        Err(error) => {
            workload.thaw().await;
            Err(error)
        }
    }
}

struct Source<R, W> {
    reader: FrameReader<R>,
    writer: FrameWriter<W>,
    scanners: Vec<Scanner>,
    progress: Progress,
    told: Instant,
}

fn wire(phase: Phase) -> impl Fn(WireError) -> SendError {
    move |source| SendError::Wire { phase, source }
}

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    async fn handshake(&mut self, move_id: &str, container: &str) -> Result<(), SendError> {
        let phase = Phase::Prepare;
        let offer = Offer {
            oldest: OLDEST_VERSION,
            newest: VERSION,
            move_id: move_id.to_owned(),
            container: container.to_owned(),
        };
        self.writer.send_json(Kind::Offer, &offer).await.map_err(wire(phase))?;
        self.writer.flush().await.map_err(wire(phase))?;
        let answer = tokio::time::timeout(Duration::from_millis(OFFER_TIMEOUT_MS), self.reader.next())
            .await
            .map_err(|_| SendError::Wire { phase, source: WireError::Io(std::io::ErrorKind::TimedOut.into()) })?
            .map_err(wire(phase))?;
        match answer.kind {
            Kind::Accept => {
                let accept: Accept = answer.json().map_err(wire(phase))?;
                tracing::debug!(version = accept.version, move_id, "the destination takes the container");
                Ok(())
            }
            Kind::Refuse => {
                let refuse: Refuse = answer.json().map_err(wire(phase))?;
                Err(SendError::Refused { phase, reason: refuse.reason })
            }
            got => {
                Err(SendError::Wire { phase, source: WireError::Unexpected { got, wanted: "an answer to the offer" } })
            }
        }
    }

    /// Files while the container runs, until a round is small or there have been enough.
    async fn rounds<L: Workload>(&mut self, workload: &mut L) -> Result<(), SendError> {
        let mut before = u64::MAX;
        for round in 1..=MAX_ROUNDS {
            self.progress.rounds = round;
            let stats = self.file_round(Phase::Copy, &[], workload).await?;
            self.writer.send_json(Kind::RoundEnd, &RoundEnd { round }).await.map_err(wire(Phase::Copy))?;
            self.writer.flush().await.map_err(wire(Phase::Copy))?;
            tracing::debug!(round, bytes = stats.bytes_sent, entries = stats.entries_sent, "round of files");
            // Not shrinking any more: further rounds would only repeat this one.
            if stats.bytes_sent < SMALL_ROUND_BYTES || stats.bytes_sent > before / 2 {
                break;
            }
            before = stats.bytes_sent;
        }
        Ok(())
    }

    async fn file_round<L: Workload>(
        &mut self,
        phase: Phase,
        always: &[(String, Vec<u8>)],
        workload: &mut L,
    ) -> Result<ScanStats, SendError> {
        let mut total = ScanStats::default();
        for mut scanner in std::mem::take(&mut self.scanners) {
            let always: HashSet<Vec<u8>> =
                always.iter().filter(|(tree, _)| tree == scanner.tree()).map(|(_, path)| path.clone()).collect();
            let (sink, mut pieces) = mpsc::channel(QUEUE_PIECES);
            let scan = tokio::task::spawn_blocking(move || {
                let result = scanner.round(&always, &mut ChannelSink(sink));
                (scanner, result)
            });
            let mut broken = None;
            while let Some(piece) = pieces.recv().await {
                if let Err(e) = self.piece(piece).await {
                    broken = Some(e);
                    break;
                }
                self.tell(phase, workload);
            }
            drop(pieces);
            // A panic of the scan is a bug of ours; it ends the move like any other error.
            let (scanner, result) =
                scan.await.map_err(|e| SendError::Part { phase, doing: "reading files", source: e.into() })?;
            if let Some(source) = broken {
                return Err(SendError::Wire { phase, source });
            }
            let stats = result.map_err(|source| SendError::Scan { phase, source })?;
            total.bytes_sent += stats.bytes_sent;
            total.entries_sent += stats.entries_sent;
            total.removed += stats.removed;
            self.scanners.push(scanner);
        }
        Ok(total)
    }

    async fn piece(&mut self, piece: Piece) -> Result<(), WireError> {
        match piece {
            Piece::Entry(entry) => self.writer.send_json(Kind::Entry, &entry).await,
            Piece::Data(payload) => self.writer.send(Kind::Data, &payload).await,
            Piece::Remove(tree, path) => self.writer.send_json(Kind::Remove, &(tree, path)).await,
        }
    }

    fn tell<L: Workload>(&mut self, phase: Phase, workload: &mut L) {
        self.progress.bytes_sent = self.writer.sent_bytes;
        if self.told.elapsed() >= Duration::from_millis(PROGRESS_EVERY_MS) {
            self.told = Instant::now();
            workload.progress(phase, self.progress);
        }
    }

    async fn frozen_part<L: Workload>(&mut self, workload: &mut L) -> Result<Final, SendError> {
        let phase = Phase::Freeze;
        let part = |doing| move |source| SendError::Part { phase, doing, source };
        let file_bytes_before = self.writer.sent_bytes;
        workload.progress(phase, self.progress);
        let begun = Instant::now();
        let always = workload.freeze().await.map_err(part("freezing the container"))?;
        let freeze_ms = ms(begun);
        self.writer.send(Kind::Frozen, &[]).await.map_err(wire(phase))?;
        self.writer.flush().await.map_err(wire(phase))?;

        let dump_begun = Instant::now();
        let (dumped, memory_bytes) = self.dump(workload).await?;
        let dump_ms = ms(dump_begun);
        self.images(&dumped.images_dir).await?;

        let files_begun = Instant::now();
        let changed = self.file_round(phase, &always, workload).await?;
        let files_ms = ms(files_begun);
        self.progress.rounds += 1;
        let fin = Final {
            freeze_ms,
            dump_ms,
            files_ms,
            elapsed_ms: ms(begun),
            memory_bytes,
            file_bytes: file_bytes_before + changed.bytes_sent,
            rounds: self.progress.rounds,
            detail: dumped.detail,
        };
        self.writer.send_json(Kind::Final, &fin).await.map_err(wire(phase))?;
        self.writer.flush().await.map_err(wire(phase))?;
        self.progress.bytes_sent = self.writer.sent_bytes;
        workload.progress(phase, self.progress);
        Ok(fin)
    }

    /// Runs the dump and passes its page stream on, both ways, while it runs.
    async fn dump<L: Workload>(&mut self, workload: &mut L) -> Result<(Dumped, u64), SendError> {
        let phase = Phase::Freeze;
        let pipe = |e: std::io::Error| SendError::Part { phase, doing: "passing pages on", source: e.into() };
        let (ours, theirs) = UnixStream::pair().map_err(pipe)?;
        let (mut from_criu, mut to_criu) = ours.into_split();
        let reader = &mut self.reader;
        let writer = &mut self.writer;
        // Ends only with an error: after the last page the destination has nothing to say.
        let back = async {
            loop {
                let frame = reader.expect(Kind::Pages, "an answer to pages").await?;
                to_criu.write_all(&frame.payload).await?;
            }
        };
        let out = async {
            let mut memory_bytes = 0u64;
            let mut piece = vec![0; PAGE_PIECE_BYTES];
            loop {
                let n = from_criu.read(&mut piece).await?;
                if n == 0 {
                    break;
                }
                writer.send(Kind::Pages, &piece[..n]).await?;
                writer.flush().await?;
                memory_bytes += n as u64;
            }
            writer.send(Kind::PagesEnd, &[]).await?;
            Ok::<u64, WireError>(memory_bytes)
        };
        let work = async {
            let dumped = workload.dump(theirs).await;
            dumped.map_err(|source| SendError::Part { phase, doing: "the dump by CRIU", source })
        };
        let both = async { tokio::try_join!(work, async { out.await.map_err(wire(phase)) }) };
        tokio::select! {
            done = both => done,
            broken = back => {
                let broken: Result<std::convert::Infallible, WireError> = broken;
                match broken { Err(source) => Err(SendError::Wire { phase, source }), Ok(never) => match never {} }
            }
        }
    }

    async fn images(&mut self, dir: &std::path::Path) -> Result<(), SendError> {
        let phase = Phase::Freeze;
        let read = |e: std::io::Error| SendError::Part { phase, doing: "reading CRIU's images", source: e.into() };
        let mut list: Vec<_> = std::fs::read_dir(dir).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
        list.sort_by_key(std::fs::DirEntry::file_name);
        for item in list {
            let name = item.file_name().to_string_lossy().into_owned();
            let mut file = tokio::fs::File::open(item.path()).await.map_err(read)?;
            let bytes = file.metadata().await.map_err(read)?.len();
            self.writer.send_json(Kind::Image, &Image { name, bytes }).await.map_err(wire(phase))?;
            let mut left = bytes;
            let mut piece = vec![0; PAGE_PIECE_BYTES.min(bytes.max(1) as usize)];
            while left > 0 {
                let n = file.read(&mut piece).await.map_err(read)?;
                if n == 0 {
                    return Err(read(std::io::ErrorKind::UnexpectedEof.into()));
                }
                self.writer.send(Kind::Data, &data_payload(bytes - left, &piece[..n])).await.map_err(wire(phase))?;
                left = left.saturating_sub(n as u64);
            }
        }
        Ok(())
    }
}

/// `Data` is an offset (8 bytes, little-endian) and the bytes there.
fn data_payload(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + bytes.len());
    payload.extend_from_slice(&offset.to_le_bytes());
    payload.extend_from_slice(bytes);
    payload
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
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
