//! The keeper's side: lines in, files out.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{MAX_LINE_BYTES, Stream, log_dir, log_file};
use crate::spec::LogLimits;

/// Appends output to the container's log. A full disk loses output instead of stopping the
/// container; the loss is counted.
pub struct LogWriter {
    dir: PathBuf,
    limits: LogLimits,
    file: File,
    file_bytes: u64,
    /// Output without a line end so far, by stream.
    open_lines: [Vec<u8>; 2],
    lost_bytes: u64,
}

impl LogWriter {
    /// Opens the log of the container in `dir`; an existing one is continued.
    pub fn open(dir: &Path, limits: LogLimits) -> io::Result<LogWriter> {
        match std::fs::create_dir(log_dir(dir)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let (file, file_bytes) = open_current(dir)?;
        let dir = dir.to_owned();
        Ok(LogWriter { dir, limits, file, file_bytes, open_lines: Default::default(), lost_bytes: 0 })
    }

    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes
    }

    /// Takes output as it was read from the pipe; an unfinished line waits for its rest.
    pub fn append(&mut self, stream: Stream, bytes: &[u8]) {
        let mut batch = Vec::with_capacity(bytes.len() + 64);
        let now = timestamp();
        let mut open = std::mem::take(&mut self.open_lines[stream as usize]);
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            let mut rest = text;
            while open.len() + rest.len() > MAX_LINE_BYTES {
                let (part, after) = rest.split_at(MAX_LINE_BYTES - open.len());
                open.extend_from_slice(part);
                line(&mut batch, &now, stream, 'P', &open);
                open.clear();
                rest = after;
            }
            open.extend_from_slice(rest);
            if ended {
                line(&mut batch, &now, stream, 'F', &open);
                open.clear();
            }
        }
        self.open_lines[stream as usize] = open;
        self.write(&batch);
    }

    /// Writes what waits for a line end: the stream is over, or the keeper is about to go.
    pub fn finish(&mut self) {
        let now = timestamp();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let open = std::mem::take(&mut self.open_lines[stream as usize]);
            if !open.is_empty() {
                let mut batch = Vec::new();
                line(&mut batch, &now, stream, 'P', &open);
                self.write(&batch);
            }
        }
    }

    fn write(&mut self, batch: &[u8]) {
        if batch.is_empty() {
            return;
        }
        if self.file_bytes > 0 && self.file_bytes + batch.len() as u64 > self.limits.max_bytes {
            // A log that cannot be turned over grows on rather than stops.
            let _ = self.rotate();
        }
        match self.file.write_all(batch) {
            Ok(()) => self.file_bytes += batch.len() as u64,
            Err(_) => self.lost_bytes += batch.len() as u64,
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let oldest = self.limits.max_files.max(1) - 1;
        if oldest == 0 {
            self.file.set_len(0)?;
            self.file_bytes = 0;
            return Ok(());
        }
        for age in (0..oldest).rev() {
            match std::fs::rename(log_file(&self.dir, age), log_file(&self.dir, age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        (self.file, self.file_bytes) = open_current(&self.dir)?;
        Ok(())
    }
}

fn open_current(dir: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).open(log_file(dir, 0))?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

fn timestamp() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}

fn line(batch: &mut Vec<u8>, now: &str, stream: Stream, tag: char, text: &[u8]) {
    batch.extend_from_slice(format!("{now} {} {tag} ", stream.name()).as_bytes());
    batch.extend_from_slice(text);
    batch.push(b'\n');
}
