//! CRIU's part of the frozen time: its page stream, where memory does not travel past it, and its images.

use std::path::{Path, PathBuf};

use godwit_model::migration::Phase;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::files::data_payload;
use super::{DumpMemory, SendError, Source, Workload, wire};
use crate::wire::{FrameWriter, Image, Kind, WireError};

/// Pages are passed on in pieces of this size, in bytes.
const PAGE_PIECE_BYTES: usize = 1 << 20;

impl<R, W> Source<R, W>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    /// Runs the dump and passes its page stream on, both ways, while it runs.
    pub(super) async fn dump_with_pages<L: Workload>(&mut self, workload: &mut L) -> Result<(PathBuf, u64), SendError> {
        let phase = Phase::Freeze;
        let pipe = |e: std::io::Error| SendError::Part { phase, doing: "passing pages on", source: e.into() };
        let (ours, theirs) = UnixStream::pair().map_err(pipe)?;
        let (mut from_criu, mut to_criu) = ours.into_split();
        let reader = &mut self.reader;
        let writer = &mut self.writer;
        // Ends only with an error: after the last page the destination has nothing to say.
        let back = async move {
            loop {
                let frame = reader.expect(Kind::Pages, "an answer to pages").await?;
                to_criu.write_all(&frame.payload).await?;
            }
        };
        let out = async move {
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
        // Its end closes the pages' socket, so that criu does not wait for somebody to take them.
        let passing = async move {
            tokio::select! {
                done = out => done.map_err(wire(phase)),
                broken = back => {
                    let broken: Result<std::convert::Infallible, WireError> = broken;
                    match broken { Err(source) => Err(SendError::Wire { phase, source }), Ok(never) => match never {} }
                }
            }
        };
        // Both to their ends: criu leaves the cgroup as it found it, frozen, and would do so after whoever thaws it.
        let (dumped, passed) = tokio::join!(work, passing);
        let memory_bytes = passed?;
        Ok((dumped?, memory_bytes))
    }

    /// Everything that CRIU wrote to its directory.
    pub(super) fn images(&self, dir: &Path) -> Result<Images, SendError> {
        let read = |e: std::io::Error| SendError::Part {
            phase: Phase::Freeze,
            doing: "reading CRIU's images",
            source: e.into(),
        };
        // A few hundred kilobytes on a tmpfs: reading them takes less than handing them to another thread.
        tokio::task::block_in_place(|| Images::read(dir)).map_err(read)
    }
}

/// CRIU's images, read.
pub(super) struct Images {
    files: Vec<(String, Vec<u8>)>,
}

impl Images {
    fn read(dir: &Path) -> std::io::Result<Self> {
        let mut files = Vec::new();
        for item in std::fs::read_dir(dir)? {
            let item = item?;
            files.push((item.file_name().to_string_lossy().into_owned(), std::fs::read(item.path())?));
        }
        files.sort();
        Ok(Self { files })
    }

    pub(super) async fn send<W: AsyncWrite + Unpin>(self, writer: &mut FrameWriter<W>) -> Result<(), WireError> {
        for (name, content) in self.files {
            writer.send_json(Kind::Image, &Image { name, bytes: content.len() as u64 }).await?;
            for (n, piece) in content.chunks(PAGE_PIECE_BYTES).enumerate() {
                writer.send(Kind::Data, &data_payload((n * PAGE_PIECE_BYTES) as u64, piece)).await?;
            }
        }
        Ok(())
    }
}
