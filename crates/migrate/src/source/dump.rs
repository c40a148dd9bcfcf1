//! CRIU's part of the frozen time: its page stream, where memory does not travel past it, and its images.

use std::path::Path;

use godwit_model::migration::Phase;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::files::data_payload;
use super::{DumpMemory, Dumped, SendError, Source, Workload, wire};
use crate::wire::{Image, Kind, WireError};

/// Pages are passed on in pieces of this size, in bytes.
const PAGE_PIECE_BYTES: usize = 1 << 20;

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// Runs the dump and passes its page stream on, both ways, while it runs.
    pub(super) async fn dump_with_pages<L: Workload>(&mut self, workload: &mut L) -> Result<(Dumped, u64), SendError> {
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
            let dumped = workload.dump(DumpMemory::Stream(theirs)).await;
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

    /// Sends everything that CRIU wrote to its directory.
    pub(super) async fn images(&mut self, dir: &Path) -> Result<(), SendError> {
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
