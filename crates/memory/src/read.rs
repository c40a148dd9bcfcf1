//! Reading pages that a round has told, straight into the caller's buffers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::libc;
use thiserror::Error;

use crate::pages::{PageRange, PageSet, is_zero, page_size};
use crate::sys::vm;
use crate::tracker::{Object, ObjectId};

#[derive(Debug, Error)]
pub enum ReadError {
    #[error("process {pid} is gone")]
    Gone { pid: i32 },
    #[error("memory of process {pid} could not be read")]
    Process {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("shared memory {id:?} could not be read")]
    Object {
        id: ObjectId,
        #[source]
        source: io::Error,
    },
}

/// What was found at some pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes in the buffer, from `at` on.
    Data { at: usize },
    /// Zeroes only.
    Zero,
    /// Not mapped any more. A later round tells what has become of it.
    Absent,
}

/// A run of pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub range: PageRange,
    pub content: Content,
}

enum Source {
    Process { pid: i32, memory: Option<File> },
    Object(Arc<Object>),
}

/// Reads a set of pages, a buffer at a time. Several can read at the same time.
pub struct PageReader {
    source: Source,
    pages: PageSet,
    /// The range that is next, and where in it.
    next: usize,
    offset: u64,
}

impl PageReader {
    /// Pages of a process, whether it runs, is frozen or is stopped by a tracer.
    pub fn of_process(pid: i32, pages: PageSet) -> Self {
        Self { source: Source::Process { pid, memory: None }, pages, next: 0, offset: 0 }
    }

    pub(crate) fn of_object(object: Arc<Object>, pages: PageSet) -> Self {
        Self { source: Source::Object(object), pages, next: 0, offset: 0 }
    }

    /// Reads as many pages as `buffer` holds (at least one page); `pieces` becomes what they are, in order. No pieces:
    /// everything has been read.
    pub fn read(&mut self, buffer: &mut [u8], pieces: &mut Vec<Piece>) -> Result<(), ReadError> {
        pieces.clear();
        let ranges = self.take(buffer.len() as u64);
        let bytes = ranges.iter().map(|r| r.bytes()).sum::<u64>() as usize;
        let buffer = &mut buffer[..bytes];
        let mut at = 0;
        match &mut self.source {
            Source::Object(object) => {
                for range in ranges {
                    let part = &mut buffer[at..at + range.bytes() as usize];
                    let failed = |source| ReadError::Object { id: object.id, source };
                    object.read_for_sending(range.start, part).map_err(failed)?;
                    sort(range, part, at, pieces);
                    at += part.len();
                }
            }
            Source::Process { pid, memory } => {
                for batch in ranges.chunks(vm::MAX_RANGES) {
                    read_batch(*pid, memory, batch, buffer, &mut at, pieces)?;
                }
            }
        }
        Ok(())
    }

    /// The next ranges, as many as fit into `bytes`.
    fn take(&mut self, bytes: u64) -> Vec<PageRange> {
        let mut left = bytes - bytes % page_size();
        let mut taken = Vec::new();
        while let Some(range) = self.pages.ranges().get(self.next).filter(|_| left > 0) {
            let start = range.start + self.offset;
            let end = range.end.min(start + left);
            taken.push(PageRange { start, end });
            left -= end - start;
            if end == range.end {
                (self.next, self.offset) = (self.next + 1, 0);
            } else {
                self.offset = end - range.start;
            }
        }
        taken
    }
}

/// Reads `ranges` into `buffer` from `at` on.
fn read_batch(
    pid: i32,
    memory: &mut Option<File>,
    ranges: &[PageRange],
    buffer: &mut [u8],
    at: &mut usize,
    pieces: &mut Vec<Piece>,
) -> Result<(), ReadError> {
    let mut ranges = ranges.to_vec();
    let mut first = 0;
    // Each turn reads at least one page, or finds that it cannot be read.
    while first < ranges.len() {
        let bytes = ranges[first..].iter().map(|r| r.bytes()).sum::<u64>() as usize;
        let mut read = match vm::read(pid, &ranges[first..], &mut buffer[*at..*at + bytes]) {
            Ok(read) => read as u64 - read as u64 % page_size(),
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => 0,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(ReadError::Gone { pid }),
            Err(source) => return Err(ReadError::Process { pid, source }),
        };
        while read > 0 {
            let range = &mut ranges[first];
            let done = PageRange { start: range.start, end: range.end.min(range.start + read) };
            let length = done.bytes() as usize;
            sort(done, &buffer[*at..*at + length], *at, pieces);
            *at += length;
            read -= done.bytes();
            range.start = done.end;
            first += usize::from(range.start == range.end);
        }
        if let Some(range) = ranges.get_mut(first) {
            let page = PageRange { start: range.start, end: range.start + page_size() };
            let length = page_size() as usize;
            let part = &mut buffer[*at..*at + length];
            if read_protected(pid, memory, page, part) {
                sort(page, part, *at, pieces);
            } else {
                add(page, Content::Absent, pieces);
            }
            *at += length;
            range.start = page.end;
            first += usize::from(range.start == range.end);
        }
    }
    Ok(())
}

/// Reads a page the process itself may not read (PROT_NONE), which process_vm_readv(2) respects.
fn read_protected(pid: i32, memory: &mut Option<File>, page: PageRange, part: &mut [u8]) -> bool {
    if memory.is_none() {
        *memory = File::open(format!("/proc/{pid}/mem")).ok();
    }
    memory.as_ref().is_some_and(|m| m.read_exact_at(part, page.start).is_ok())
}

/// Tells data from zeroes.
fn sort(range: PageRange, bytes: &[u8], at: usize, pieces: &mut Vec<Piece>) {
    for (n, page) in bytes.chunks_exact(page_size() as usize).enumerate() {
        let start = range.start + n as u64 * page_size();
        let content = if is_zero(page) { Content::Zero } else { Content::Data { at: at + n * page_size() as usize } };
        add(PageRange { start, end: start + page_size() }, content, pieces);
    }
}

/// Adds to the last piece where it continues it.
fn add(range: PageRange, content: Content, pieces: &mut Vec<Piece>) {
    if let Some(last) = pieces.last_mut().filter(|l| l.range.end == range.start) {
        let continues = match (last.content, content) {
            (Content::Data { at }, Content::Data { at: next }) => at as u64 + last.range.bytes() == next as u64,
            (a, b) => a == b,
        };
        if continues {
            last.range.end = range.end;
            return;
        }
    }
    pieces.push(Piece { range, content });
}
