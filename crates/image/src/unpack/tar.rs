//! Reading tar archives: ustar, GNU and PAX, as layers and layouts come in.
//!
//! Own reader instead of a crate's because three things matter here that those leave open: extension
//! records are bounded, extended attributes are binary (a value may hold newlines), and PAX sparse
//! files are understood. Formats: POSIX.1-2024 pax, "ustar Interchange Format" and "pax Header";
//! GNU tar manual, "Basic Tar Format" and "Sparse Formats".

use super::header::{self, BLOCK, Block};
use crate::limits::{MAX_EXTENSION_BYTES, MAX_PATH_BYTES, MAX_XATTR_BYTES};
use std::io::{self, Read, Seek, SeekFrom};

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("the archive could not be read")]
    Read(#[source] io::Error),
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    #[error("not a tar archive: header at byte {at} has a wrong checksum")]
    Checksum { at: u64 },
    #[error("header at byte {at}: field {field} is malformed")]
    Field { at: u64, field: &'static str },
    #[error("header at byte {at}: {what} is {size} bytes, more than the {max} allowed")]
    TooLong { at: u64, what: &'static str, size: u64, max: u64 },
    #[error("entry {path:?} has type {kind:?}, which no layer may contain")]
    Kind { path: String, kind: char },
    #[error("entry {path:?} has a malformed sparse map")]
    Sparse { path: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One member of an archive, without its data.
#[derive(Debug)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    /// Permission bits with set-id and sticky, no file type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    /// Bytes of the file once unpacked, holes included.
    pub size: u64,
    /// Bytes that follow in the archive.
    pub stored: u64,
    /// Pieces of data as (offset in the file, length), in order; none: one piece, the whole file.
    pub sparse: Option<Vec<(u64, u64)>>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A reader that can pass over bytes.
pub(crate) trait Skip: Read + Sized {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let passed = io::copy(&mut self.by_ref().take(bytes), &mut io::sink())?;
        if passed == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

impl Skip for std::fs::File {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let bytes = i64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.seek(SeekFrom::Current(bytes)).map(drop)
    }
}

pub(crate) struct TarReader<R> {
    inner: R,
    /// Bytes taken from `inner`.
    at: u64,
    /// Data of the current entry not read yet, and the padding after it.
    left: u64,
    padding: u64,
    ended: bool,
}

/// What extension records say about the entry that follows.
#[derive(Default)]
pub(super) struct Extensions {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    /// `key=value` records in their order.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extensions {
    /// The last value of `key`; POSIX: later records win.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.records.iter().rev().find(|(k, _)| k == key.as_bytes()).map(|(_, v)| v.as_slice())
    }
}

impl<R: Skip> TarReader<R> {
    pub fn new(inner: R) -> TarReader<R> {
        TarReader { inner, at: 0, left: 0, padding: 0, ended: false }
    }

    /// Offset in the archive: right after [`TarReader::next`], where the entry's data starts.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next entry; what was left of the data before it is passed over. None at the end.
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let mut extensions = Extensions::default();
        let mut extension_bytes = 0;
        loop {
            self.finish_data()?;
            let at = self.at;
            let Some(block) = self.header_block()? else {
                self.ended = true;
                return Ok(None);
            };
            header::verify_checksum(&block, at)?;
            let kind = block[156];
            if matches!(kind, b'x' | b'g' | b'L' | b'K') {
                let size = header::number(&block[124..136]).ok_or(TarError::Field { at, field: "size" })?;
                extension_bytes += size.min(MAX_EXTENSION_BYTES + 1);
                if extension_bytes > MAX_EXTENSION_BYTES {
                    return Err(TarError::TooLong { at, what: "extension", size, max: MAX_EXTENSION_BYTES });
                }
                self.start_data(size, at)?;
                let mut data = vec![0; size as usize];
                self.read_exact_data(&mut data)?;
                match kind {
                    b'x' => extensions.records.extend(header::pax_records(&data, at)?),
                    b'L' => extensions.path = Some(header::until_zero(&data).to_vec()),
                    b'K' => extensions.link = Some(header::until_zero(&data).to_vec()),
                    // Global records only carry comments in practice; container tools ignore them.
                    _ => {}
                }
                continue;
            }
            return self.entry(&block, at, extensions).map(Some);
        }
    }

    fn entry(&mut self, block: &Block, at: u64, extensions: Extensions) -> Result<Entry, TarError> {
        let (mut entry, sparse) = header::entry(block, at, &extensions)?;
        for (what, bytes) in [("path", &entry.path), ("link target", &entry.link)] {
            if bytes.len() > MAX_PATH_BYTES {
                return Err(TarError::TooLong { at, what, size: bytes.len() as u64, max: MAX_PATH_BYTES as u64 });
            }
        }
        if let Some((_, value)) = entry.xattrs.iter().find(|(_, value)| value.len() > MAX_XATTR_BYTES) {
            let (size, max) = (value.len() as u64, MAX_XATTR_BYTES as u64);
            return Err(TarError::TooLong { at, what: "extended attribute", size, max });
        }
        use super::sparse::{self, Form};
        entry.sparse = match sparse {
            Form::None => None,
            Form::Listed { pieces } => Some(pieces),
            Form::InData => return self.sparse_in_data(entry, at),
            Form::Gnu => {
                let mut pieces = sparse::gnu_first(block, &entry)?;
                let mut more = block[482] != 0;
                while more {
                    let mut next = [0; BLOCK];
                    self.fill(&mut next)?;
                    more = sparse::gnu_next(&next, &mut pieces, &entry)?;
                }
                Some(pieces)
            }
        };
        self.start_data(entry.stored, at)?;
        sparse::check(&entry)?;
        Ok(entry)
    }

    /// The map takes the first blocks of what is stored.
    fn sparse_in_data(&mut self, mut entry: Entry, at: u64) -> Result<Entry, TarError> {
        self.start_data(entry.stored, at)?;
        entry.sparse = Some(super::sparse::from_data(self, &entry)?);
        entry.stored = self.left;
        super::sparse::check(&entry)?;
        Ok(entry)
    }

    /// Data of the current entry; 0 at its end.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let want = (buffer.len() as u64).min(self.left) as usize;
        if want == 0 {
            return Ok(0);
        }
        let got = loop {
            match self.inner.read(&mut buffer[..want]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => break result.map_err(TarError::Read)?,
            }
        };
        if got == 0 {
            return Err(TarError::Truncated);
        }
        self.left -= got as u64;
        self.at += got as u64;
        Ok(got)
    }

    pub fn read_exact_data(&mut self, buffer: &mut [u8]) -> Result<(), TarError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_data(&mut buffer[filled..])? {
                0 => return Err(TarError::Truncated),
                got => filled += got,
            }
        }
        Ok(())
    }

    fn start_data(&mut self, size: u64, at: u64) -> Result<(), TarError> {
        if size > u64::MAX / 4 {
            return Err(TarError::Field { at, field: "size" });
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn finish_data(&mut self) -> Result<(), TarError> {
        let rest = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        self.inner.skip(rest).map_err(ended_early)?;
        self.at += rest;
        Ok(())
    }

    /// The next header; None at the end: two zero blocks, or nothing more.
    fn header_block(&mut self) -> Result<Option<Block>, TarError> {
        let mut block = [0; BLOCK];
        // A single zero block between entries is tolerated, as GNU tar does.
        for _ in 0..2 {
            let mut filled = 0;
            while filled < BLOCK {
                match self.inner.read(&mut block[filled..]) {
                    Ok(0) if filled == 0 => return Ok(None),
                    Ok(0) => return Err(TarError::Truncated),
                    Ok(got) => filled += got,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(TarError::Read(error)),
                }
            }
            self.at += BLOCK as u64;
            if block.iter().any(|&byte| byte != 0) {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }

    fn fill(&mut self, block: &mut Block) -> Result<(), TarError> {
        self.inner.read_exact(block).map_err(ended_early)?;
        self.at += BLOCK as u64;
        Ok(())
    }
}

fn ended_early(error: io::Error) -> TarError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => TarError::Truncated,
        _ => TarError::Read(error),
    }
}
