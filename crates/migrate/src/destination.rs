//! The destination of a move, mirror image of [`crate::source`].

mod lanes;
mod late;

pub use lanes::Joined;
use lanes::Lanes;
pub use late::Following;
use late::LatePages;

use std::borrow::Cow;
use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::{Late, PageStore, StoreError};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::files::{Entry, WriteError, Writer};
use crate::packing::unpack;
use crate::pages::{Head, with_pages};
use crate::source::PartError;
use crate::wire::{
    Accept, Final, Frame, FrameReader, FrameWriter, Frozen, Image, Join, Kind, MAX_CONNECTIONS, Offer, Refuse,
    WireError, negotiate,
};

/// The first frame comes within this time, in milliseconds.
const OFFER_TIMEOUT_MS: u64 = 10_000;
/// Silence of the source that ends the move, in milliseconds.
const SILENCE_TIMEOUT_MS: u64 = 60_000;
/// Answers of the page server are a few bytes.
const ANSWER_BYTES: usize = 4096;

#[derive(Debug, Error)]
pub enum ReceiveError {
    #[error("the connection from the source failed")]
    Wire(#[from] WireError),
    #[error("the source has been silent for {} s", SILENCE_TIMEOUT_MS / 1000)]
    Silent,
    #[error("nothing has come from the source for {} s, and memory is missing", late::SILENCE_TIMEOUT_MS / 1000)]
    SilentLate,
    #[error("files could not be written")]
    Files(#[from] WriteError),
    #[error("memory could not be taken in")]
    Memory(#[from] StoreError),
    #[error("{doing} failed")]
    Part { doing: &'static str, source: PartError },
    /// The processes must not go on.
    #[error("memory that was to follow could not be passed on")]
    Late(#[source] std::io::Error),
    #[error("the source sent an image named {name:?}")]
    ImageName { name: String },
}

/// Where a container arrives. After an error the agent unmakes it; nothing in it has run.
pub trait Landing: Send {
    /// Is this move expected here? The reason, if not.
    fn expects(&mut self, move_id: &str, container: &str) -> Result<(), String>;
    /// Name and directory of every tree of files, already made.
    fn trees(&self) -> Vec<(String, PathBuf)>;
    /// Where CRIU's images go.
    fn images_dir(&self) -> PathBuf;
    /// The source stands still. What is known of the container by now; null from an older source.
    fn frozen(&mut self, detail: &serde_json::Value);
    /// All files have arrived and stay as they are; the source is still dumping.
    fn files_complete(&mut self);
    /// Starts what takes the page stream; our end of its socket.
    fn page_sink(&mut self) -> impl Future<Output = Result<UnixStream, PartError>> + Send;
    /// The page stream has ended; everything of it is stored when this returns.
    fn pages_stored(&mut self) -> impl Future<Output = Result<(), PartError>> + Send;
    /// Restores the processes up to the last point before they run; their memory is in `memory`, or in CRIU's images.
    /// Some of it may come `late`, to whoever fills it in.
    fn restore(
        &mut self,
        fin: &Final,
        memory: Option<Arc<PageStore>>,
        late: Option<Late>,
    ) -> impl Future<Output = Result<(), PartError>> + Send;
}

/// Everything is here, restored, and stands still.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    pub fin: Final,
    pub bytes: u64,
    pub restore_ms: f64,
    /// Milliseconds from the freeze to now.
    pub since_freeze_ms: f64,
}

/// A connection whose first frame has been read: which move it is about.
pub enum Arrival<R> {
    /// A move.
    Offer(Offered<R>),
    /// One more connection of a move.
    Join { move_id: String, lane: FrameReader<R> },
}

/// A move that is offered.
pub struct Offered<R> {
    reader: FrameReader<R>,
    offer: Offer,
}

impl<R> Arrival<R> {
    pub fn move_id(&self) -> &str {
        match self {
            Self::Offer(offered) => &offered.offer.move_id,
            Self::Join { move_id, .. } => move_id,
        }
    }
}

/// Reads what a new connection is for.
pub async fn arrival<R: AsyncRead + Unpin>(reader: R) -> Result<Arrival<R>, ReceiveError> {
    let mut reader = FrameReader::new(reader);
    let limit = Duration::from_millis(OFFER_TIMEOUT_MS);
    let frame = tokio::time::timeout(limit, reader.next()).await.map_err(|_| ReceiveError::Silent)??;
    match frame.kind {
        Kind::Offer => Ok(Arrival::Offer(Offered { offer: frame.json()?, reader })),
        Kind::Join => Ok(Arrival::Join { move_id: frame.json::<Join>()?.move_id, lane: reader }),
        got => Err(WireError::Unexpected { got, wanted: "an offer" }.into()),
    }
}

/// Runs the destination's side up to the point where the processes could run. Further connections of this move come by
/// `joined`.
pub async fn receive<R, W, L>(
    offered: Offered<R>,
    writer: W,
    joined: Joined<R>,
    landing: &mut L,
) -> Result<(Received, Option<Following>), ReceiveError>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
    L: Landing,
{
    let Offered { mut reader, offer } = offered;
    let mut writer = FrameWriter::new(writer);
    let connections = handshake(&offer, &mut writer, landing).await?;
    let mut files = Writer::open(&landing.trees())?;
    let store = Arc::new(PageStore::new()?);
    let mut lanes = Lanes::serve(connections, joined, &store);
    let mut frozen_at: Option<Instant> = None;
    let mut carried = false;
    let mut image: Option<File> = None;
    let mut late = LatePages::default();
    loop {
        let frame = next(&mut reader).await?;
        match frame.kind {
            Kind::Entry => {
                image = None;
                let entry: Entry = frame.json()?;
                tokio::task::block_in_place(|| files.entry(entry))?;
            }
            Kind::Data => {
                let (offset, bytes) = split_data(&frame)?;
                match &mut image {
                    // Small, and on a tmpfs.
                    Some(file) => file.write_all(bytes).map_err(stored)?,
                    None => tokio::task::block_in_place(|| files.data(offset, bytes))?,
                }
            }
            Kind::Remove => {
                image = None;
                let (tree, path): (String, Vec<u8>) = frame.json()?;
                tokio::task::block_in_place(|| files.remove(&tree, &path))?;
            }
            Kind::RoundEnd => {
                tokio::task::block_in_place(|| files.end_round())?;
                if frozen_at.is_some() {
                    landing.files_complete();
                }
            }
            Kind::Frozen => {
                frozen_at = Some(Instant::now());
                let frozen = if frame.payload.is_empty() { Frozen::default() } else { frame.json()? };
                carried = frozen.carried;
                landing.frozen(&frozen.detail);
                if !carried {
                    pages(&mut reader, &mut writer, landing).await?;
                }
            }
            Kind::Memory | Kind::PackedMemory | Kind::EmptyMemory | Kind::DropMemory => {
                tokio::task::block_in_place(|| take_memory(&store, &frame))?;
            }
            Kind::Barrier => lanes.meet().await?,
            Kind::Mark => {
                writer.send(Kind::Mark, &frame.payload).await?;
                writer.flush().await?;
            }
            Kind::LateMemory => late.named(&store, &frame)?,
            Kind::Image => {
                let name = frame.json::<Image>()?.name;
                image = Some(create_image(&landing.images_dir(), &name)?);
            }
            Kind::Final => {
                tokio::task::block_in_place(|| files.end_round())?;
                let fin: Final = frame.json()?;
                let begun = Instant::now();
                let memory = carried.then(|| Arc::clone(&store));
                let bytes = reader.received_bytes + lanes.received_bytes();
                let (late, mut following) = late.follow(reader, writer)?;
                let restore = landing.restore(&fin, memory, late);
                let restored = match &mut following {
                    // CRIU may need some of it, and would wait for what does not come.
                    Some(following) => tokio::select! {
                        restored = restore => restored,
                        error = following.failed() => return Err(error),
                    },
                    None => restore.await,
                };
                restored.map_err(|source| ReceiveError::Part { doing: "the restore", source })?;
                let since = frozen_at.map_or(0.0, |at| at.elapsed().as_secs_f64() * 1e3);
                let received = Received {
                    since_freeze_ms: fin.freeze_ms + since,
                    bytes,
                    restore_ms: begun.elapsed().as_secs_f64() * 1e3,
                    fin,
                };
                return Ok((received, following));
            }
            got => return Err(WireError::Unexpected { got, wanted: "files, images or the end" }.into()),
        }
    }
}

/// The payload of a frame of memory, as it was before it was compressed.
fn content_of(frame: &Frame) -> Result<Cow<'_, [u8]>, WireError> {
    match frame.kind {
        Kind::PackedMemory => Ok(unpack(&frame.payload)?.into()),
        _ => Ok(Cow::Borrowed(&frame.payload)),
    }
}

/// Takes in a frame of memory.
fn take_memory(store: &PageStore, frame: &Frame) -> Result<(), ReceiveError> {
    let payload = content_of(frame)?;
    let (head, ranges, content) = Head::split(&payload).map_err(WireError::from)?;
    match frame.kind {
        Kind::Memory | Kind::PackedMemory => {
            for (range, pages) in with_pages(&ranges, content).map_err(WireError::from)? {
                store.put(head.key, range.start, head.round, pages)?;
            }
        }
        Kind::EmptyMemory => ranges.iter().try_for_each(|range| store.forget(head.key, *range, head.round))?,
        _ => store.drop_key(head.key),
    }
    Ok(())
}

/// How many connections there will be.
async fn handshake<W, L>(offer: &Offer, writer: &mut FrameWriter<W>, landing: &mut L) -> Result<u32, ReceiveError>
where
    W: AsyncWrite + Unpin,
    L: Landing,
{
    let answer = negotiate(offer).and_then(|version| {
        landing.expects(&offer.move_id, &offer.container).map_err(|reason| Refuse { reason })?;
        Ok(version)
    });
    match answer {
        Ok(version) => {
            let connections = offer.connections.clamp(1, MAX_CONNECTIONS);
            writer.send_json(Kind::Accept, &Accept { version, connections }).await?;
            writer.flush().await?;
            Ok(connections)
        }
        Err(refuse) => {
            writer.send_json(Kind::Refuse, &refuse).await?;
            writer.flush().await?;
            let source = refuse.reason.into();
            Err(ReceiveError::Part { doing: "agreeing on the move", source })
        }
    }
}

async fn next<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> Result<Frame, ReceiveError> {
    let limit = Duration::from_millis(SILENCE_TIMEOUT_MS);
    Ok(tokio::time::timeout(limit, reader.next()).await.map_err(|_| ReceiveError::Silent)??)
}

/// Passes the page stream to its taker and the few answers back, until `PagesEnd`.
async fn pages<R, W, L>(
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
    landing: &mut L,
) -> Result<(), ReceiveError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
    L: Landing,
{
    let sink =
        landing.page_sink().await.map_err(|source| ReceiveError::Part { doing: "starting the page server", source })?;
    let (from_server, to_server) = sink.into_split();
    tokio::select! {
        forward = forward(reader, to_server) => forward?,
        backward = backward(writer, from_server) => backward?,
    }
    landing.pages_stored().await.map_err(|source| ReceiveError::Part { doing: "storing the pages", source })
}

async fn forward<R: AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
    mut to_server: OwnedWriteHalf,
) -> Result<(), ReceiveError> {
    loop {
        let frame = next(reader).await?;
        match frame.kind {
            Kind::Pages => to_server.write_all(&frame.payload).await.map_err(stored)?,
            Kind::PagesEnd => return to_server.shutdown().await.map_err(stored),
            got => return Err(WireError::Unexpected { got, wanted: "pages" }.into()),
        }
    }
}

async fn backward<W: AsyncWrite + Unpin>(
    writer: &mut FrameWriter<W>,
    mut from_server: OwnedReadHalf,
) -> Result<(), ReceiveError> {
    let mut answer = [0; ANSWER_BYTES];
    loop {
        let n = from_server.read(&mut answer).await.map_err(stored)?;
        if n == 0 {
            // The server closes after its last answer; the end is told by `PagesEnd`.
            return std::future::pending().await;
        }
        writer.send(Kind::Pages, &answer[..n]).await?;
        writer.flush().await?;
    }
}

fn stored(e: std::io::Error) -> ReceiveError {
    ReceiveError::Part { doing: "storing what arrived", source: e.into() }
}

fn split_data(frame: &Frame) -> Result<(u64, &[u8]), WireError> {
    match frame.payload.split_first_chunk::<8>() {
        Some((offset, bytes)) => Ok((u64::from_le_bytes(*offset), bytes)),
        None => Err(WireError::Unexpected { got: frame.kind, wanted: "an offset and data" }),
    }
}

fn create_image(dir: &Path, name: &str) -> Result<File, ReceiveError> {
    let plain = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
    if !plain {
        return Err(ReceiveError::ImageName { name: name.to_owned() });
    }
    File::create(dir.join(name)).map_err(stored)
}
