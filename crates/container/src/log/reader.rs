//! The readers' side: the last lines, and what comes next.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};

use super::{Stream, log_dir, log_file};

/// Most lines given at once.
pub const MAX_LINES: usize = 100_000;
/// Most rotated files looked at.
const MAX_FILES: u32 = 1000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub time: Timestamp,
    pub stream: Stream,
    /// The line goes on in the next entry of the stream.
    pub partial: bool,
    pub text: String,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot read log {path}")]
pub struct ReadLogError {
    pub path: PathBuf,
    pub source: io::Error,
}

impl LogLine {
    /// One line of a log file, without its end; `None` for a damaged one.
    fn parse(bytes: &[u8]) -> Option<LogLine> {
        let text = String::from_utf8_lossy(bytes);
        let mut fields = text.splitn(4, ' ');
        let time = fields.next()?.parse().ok()?;
        let stream = match fields.next()? {
            "stdout" => Stream::Stdout,
            "stderr" => Stream::Stderr,
            _ => return None,
        };
        let partial = fields.next()? == "P";
        Some(LogLine { time, stream, partial, text: fields.next().unwrap_or("").to_owned() })
    }
}

/// The last `tail` lines (all that are kept, up to [`MAX_LINES`], without it) that are not older
/// than `since`, oldest first. A container that wrote nothing has none.
pub fn read_logs(dir: &Path, tail: Option<usize>, since: Option<Timestamp>) -> Result<Vec<LogLine>, ReadLogError> {
    let keep = tail.unwrap_or(MAX_LINES).min(MAX_LINES);
    let mut lines = VecDeque::new();
    let files = (0..MAX_FILES).take_while(|age| log_file(dir, *age).exists()).count() as u32;
    for age in (0..files).rev() {
        let path = log_file(dir, age);
        let file = match File::open(&path) {
            Ok(file) => file,
            // Turned over since the count.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ReadLogError { path, source }),
        };
        let mut reader = BufReader::new(file);
        while let Some(line) = next_line(&mut reader).map_err(|source| ReadLogError { path: path.clone(), source })? {
            let Some(line) = LogLine::parse(&line) else { continue };
            if since.is_some_and(|since| line.time < since) {
                continue;
            }
            lines.push_back(line);
            if lines.len() > keep {
                lines.pop_front();
            }
        }
    }
    Ok(lines.into())
}

/// A finished line without its end; an unfinished one stays unread.
fn next_line(reader: &mut BufReader<File>) -> io::Result<Option<Vec<u8>>> {
    use std::io::{Seek, SeekFrom};
    let mut line = Vec::new();
    let bytes = reader.read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(Some(line));
    }
    if bytes > 0 {
        reader.seek(SeekFrom::Current(-i64::try_from(bytes).unwrap_or(0)))?;
    }
    Ok(None)
}

/// Gives the lines that are written from now on.
pub struct LogFollower {
    dir: PathBuf,
    watch: OwnedFd,
    current: Option<BufReader<File>>,
}

impl LogFollower {
    /// Starts at the end of the present log.
    pub fn new(dir: &Path) -> Result<LogFollower, ReadLogError> {
        use std::io::{Seek, SeekFrom};
        let path = log_dir(dir);
        let failed = |source| ReadLogError { path: path.clone(), source };
        std::fs::create_dir_all(&path).map_err(failed)?;
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch = inotify::init(flags).map_err(|error| failed(error.into()))?;
        let wanted = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, &path, wanted).map_err(|error| failed(error.into()))?;
        let current = match File::open(log_file(dir, 0)) {
            Ok(mut file) => {
                file.seek(SeekFrom::End(0)).map_err(failed)?;
                Some(BufReader::new(file))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        Ok(LogFollower { dir: dir.to_owned(), watch, current })
    }

    /// Waits up to `timeout` for lines; none means that the time is over.
    pub fn next(&mut self, timeout: Duration) -> Result<Vec<LogLine>, ReadLogError> {
        let path = log_file(&self.dir, 0);
        let failed = |source| ReadLogError { path: path.clone(), source };
        let lines = self.read_new().map_err(failed)?;
        if !lines.is_empty() {
            return Ok(lines);
        }
        let timeout = Timespec::try_from(timeout).map_err(|_| failed(io::Error::from(io::ErrorKind::InvalidInput)))?;
        let mut fds = [PollFd::new(&self.watch, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout))).map_err(|error| failed(error.into()))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.watch, &mut buffer);
        while events.next().is_ok() {}
        self.read_new().map_err(failed)
    }

    fn read_new(&mut self) -> io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        // The rest of the file that was current, then the one that is now.
        while lines.len() < MAX_LINES {
            if let Some(reader) = &mut self.current {
                let mut at_end = false;
                while lines.len() < MAX_LINES && !at_end {
                    match next_line(reader)? {
                        Some(line) => lines.extend(LogLine::parse(&line)),
                        None => at_end = true,
                    }
                }
                let here = reader.get_ref().metadata()?.ino();
                match std::fs::metadata(log_file(&self.dir, 0)) {
                    Ok(now) if now.ino() == here => return Ok(lines),
                    _ if !at_end => return Ok(lines),
                    _ => {}
                }
            }
            match File::open(log_file(&self.dir, 0)) {
                Ok(file) => self.current = Some(BufReader::new(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.current = None;
                    return Ok(lines);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::LogWriter;
    use crate::spec::LogLimits;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("godwit-log-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn lines_come_back_split_joined_and_in_order() {
        let dir = scratch("lines");
        let mut log = LogWriter::open(&dir, LogLimits::default()).unwrap();
        log.append(Stream::Stdout, b"one\ntw");
        log.append(Stream::Stderr, b"bad\n");
        log.append(Stream::Stdout, b"o\n");
        log.append(Stream::Stdout, &[b'x'; super::super::MAX_LINE_BYTES + 10]);
        log.append(Stream::Stdout, b"\nlast");
        log.finish();
        let lines = read_logs(&dir, None, None).unwrap();
        let short: Vec<(&str, bool)> =
            lines.iter().map(|line| (&line.text[..line.text.len().min(4)], line.partial)).collect();
        let want = [("one", false), ("bad", false), ("two", false), ("xxxx", true), ("xxxx", false), ("last", true)];
        assert_eq!(short, want);
        assert_eq!(read_logs(&dir, Some(2), None).unwrap().len(), 2);
        let later = lines[0].time + jiff::SignedDuration::from_hours(1);
        assert!(read_logs(&dir, None, Some(later)).unwrap().is_empty());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_follower_sees_every_line_across_rotation_and_old_files_go() {
        let dir = scratch("rotate");
        let limits = LogLimits { max_bytes: 200, max_files: 3 };
        let mut log = LogWriter::open(&dir, limits).unwrap();
        let mut follower = LogFollower::new(&dir).unwrap();
        let mut seen = Vec::new();
        for number in 0..40 {
            log.append(Stream::Stdout, format!("line {number}\n").as_bytes());
            let lines = follower.next(Duration::from_secs(5)).unwrap();
            seen.extend(lines.into_iter().map(|line| line.text));
        }
        let want: Vec<String> = (0..40).map(|number| format!("line {number}")).collect();
        assert_eq!(seen, want);
        assert!(follower.next(Duration::ZERO).unwrap().is_empty());
        let files = std::fs::read_dir(log_dir(&dir)).unwrap().count();
        assert_eq!(files, 3);
        let kept = read_logs(&dir, None, None).unwrap();
        assert_eq!(kept.last().unwrap().text, "line 39");
        assert!(kept.len() < 40);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
