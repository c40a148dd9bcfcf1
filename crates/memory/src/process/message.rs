//! What the two ends tell each other. All numbers are little-endian (`crate::bytes`); the first byte says what it is.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::time::Duration;

use crate::bytes::{Reader, Writer};
use crate::filler::{FillError, FillReport, Progress, SharedReport, SharedUse};
use crate::late::{read_late, write_late};
use crate::pages::{PageRange, PageSet};
use crate::store::Key;
use crate::tracker::ObjectKind;

/// From the agent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// An index of pages; their file comes with it.
    Load(Vec<u8>),
    /// Pages that come after the others, before these are loaded; the socket on which they come is with it.
    Late(HashMap<Key, PageSet>),
    Restored(Vec<SharedUse>),
    Progress,
}

/// From the process that fills.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It listens; or it has the pages.
    Done,
    Shared(SharedReport),
    Progress(Progress),
    Failed(Failure),
    /// Unasked: it is over.
    Ended(Result<FillReport, Failure>),
}

/// An error of the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    kind: u8,
    text: String,
}

const RESTORE_FAILED: u8 = 1;
const TIMED_OUT: u8 = 2;
const CANCELLED: u8 = 3;
const GONE: u8 = 4;
const SHARED_UNPLACED: u8 = 5;
const OTHER: u8 = 0;

impl Failure {
    pub(super) fn new(error: &FillError) -> Self {
        let kind = match error {
            FillError::RestoreFailed => RESTORE_FAILED,
            FillError::TimedOut => TIMED_OUT,
            FillError::Cancelled => CANCELLED,
            FillError::Gone => GONE,
            FillError::SharedUnplaced => SHARED_UNPLACED,
            _ => OTHER,
        };
        let causes = std::iter::successors(Some(error as &dyn Error), |e: &&dyn Error| (*e).source());
        Self { kind, text: causes.map(ToString::to_string).collect::<Vec<_>>().join(": ") }
    }

    pub(super) fn other(text: &str) -> Self {
        Self { kind: OTHER, text: text.to_owned() }
    }

    pub(super) fn error(&self) -> FillError {
        match self.kind {
            RESTORE_FAILED => FillError::RestoreFailed,
            TIMED_OUT => FillError::TimedOut,
            CANCELLED => FillError::Cancelled,
            GONE => FillError::Gone,
            SHARED_UNPLACED => FillError::SharedUnplaced,
            _ => FillError::Remote(self.text.clone()),
        }
    }

    fn write(&self, to: &mut Writer) {
        to.u8(self.kind);
        to.raw(self.text.as_bytes());
    }

    fn read(from: &mut Reader<'_>) -> io::Result<Self> {
        let kind = from.u8()?;
        Ok(Self { kind, text: String::from_utf8_lossy(from.rest()).into_owned() })
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut to = Writer::default();
        match self {
            Self::Load(index) => {
                to.u8(1);
                to.raw(index);
            }
            Self::Restored(uses) => {
                to.u8(2);
                uses.iter().for_each(|shared_use| write_use(&mut to, shared_use));
            }
            Self::Progress => to.u8(3),
            Self::Late(pages) => {
                to.u8(4);
                write_late(&mut to, pages);
            }
        }
        to.into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut from = Reader::new(bytes);
        let request = match from.u8()? {
            1 => Self::Load(from.rest().to_vec()),
            2 => {
                let mut uses = Vec::new();
                while from.end().is_err() {
                    uses.push(read_use(&mut from)?);
                }
                Self::Restored(uses)
            }
            3 => Self::Progress,
            4 => Self::Late(read_late(&mut from)?),
            _ => return Err(invalid("an unknown request")),
        };
        from.end()?;
        Ok(request)
    }
}

impl Answer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut to = Writer::default();
        match self {
            Self::Done => to.u8(1),
            Self::Shared(report) => {
                to.u8(2);
                [report.filled_bytes, report.lazy_bytes, ns(report.elapsed)].into_iter().for_each(|n| to.u64(n));
            }
            Self::Progress(progress) => {
                to.u8(3);
                let processes = progress.processes as u64;
                [processes, progress.filled_bytes, progress.faults].into_iter().for_each(|n| to.u64(n));
            }
            Self::Failed(failure) => {
                to.u8(4);
                failure.write(&mut to);
            }
            Self::Ended(Ok(r)) => {
                to.u8(5);
                let counts = [r.processes as u64, r.filled_bytes, r.faults, r.zero_faults, r.unplaced_pages];
                counts.into_iter().chain([r.left_bytes, ns(r.longest_turn), ns(r.elapsed)]).for_each(|n| to.u64(n));
            }
            Self::Ended(Err(failure)) => {
                to.u8(6);
                failure.write(&mut to);
            }
        }
        to.into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let from = &mut Reader::new(bytes);
        let answer = match from.u8()? {
            1 => Self::Done,
            2 => Self::Shared(SharedReport {
                filled_bytes: from.u64()?,
                lazy_bytes: from.u64()?,
                elapsed: Duration::from_nanos(from.u64()?),
            }),
            3 => Self::Progress(Progress {
                processes: from.u64()? as usize,
                filled_bytes: from.u64()?,
                faults: from.u64()?,
            }),
            4 => Self::Failed(Failure::read(from)?),
            5 => Self::Ended(Ok(FillReport {
                processes: from.u64()? as usize,
                filled_bytes: from.u64()?,
                faults: from.u64()?,
                zero_faults: from.u64()?,
                unplaced_pages: from.u64()?,
                left_bytes: from.u64()?,
                longest_turn: Duration::from_nanos(from.u64()?),
                elapsed: Duration::from_nanos(from.u64()?),
            })),
            6 => Self::Ended(Err(Failure::read(from)?)),
            _ => return Err(invalid("an unknown answer")),
        };
        from.end()?;
        Ok(answer)
    }
}

/// 2^64 ns are 584 years.
fn ns(time: Duration) -> u64 {
    time.as_nanos() as u64
}

fn write_use(to: &mut Writer, u: &SharedUse) {
    to.i32(u.inner_pid);
    to.i32(u.pid);
    to.u64(u.range.start);
    to.u64(u.range.end);
    to.object(u.object);
    to.u8(match u.kind {
        ObjectKind::Anonymous => 0,
        ObjectKind::Memfd => 1,
        ObjectKind::SysV => 2,
        ObjectKind::File => 3,
    });
    to.u64(u.offset);
}

fn read_use(from: &mut Reader<'_>) -> io::Result<SharedUse> {
    let (inner_pid, pid) = (from.i32()?, from.i32()?);
    let range = PageRange::new(from.u64()?, from.u64()?).ok_or_else(|| invalid("an empty mapping"))?;
    let object = from.object()?;
    let kind = match from.u8()? {
        0 => ObjectKind::Anonymous,
        1 => ObjectKind::Memfd,
        2 => ObjectKind::SysV,
        3 => ObjectKind::File,
        _ => return Err(invalid("an unknown kind of object")),
    };
    let offset = from.u64()?;
    // What is beyond cannot be an address or an offset, and sums must not overflow.
    if range.end >= 1 << 63 || offset >= 1 << 62 || range.bytes() >= 1 << 62 {
        return Err(invalid("a mapping beyond every address"));
    }
    Ok(SharedUse { inner_pid, pid, range, object, kind, offset })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tracker::ObjectId;

    fn requests() -> Vec<Request> {
        let object = ObjectId { device: 1 << 40, inode: 77, sysv: true };
        let range = PageRange { start: 4096, end: 1 << 47 };
        let shared_use =
            SharedUse { inner_pid: 3, pid: 40_000, range, object, kind: ObjectKind::File, offset: 1 << 33 };
        vec![
            Request::Load(vec![1, 2, 3]),
            Request::Restored(vec![shared_use, SharedUse { kind: ObjectKind::Memfd, ..shared_use }]),
            Request::Restored(Vec::new()),
            Request::Progress,
        ]
    }

    fn answers() -> Vec<Answer> {
        let time = Duration::from_nanos(1_234_567_890_123);
        let report = FillReport {
            processes: 1,
            filled_bytes: 2,
            faults: 3,
            zero_faults: 4,
            unplaced_pages: 5,
            left_bytes: 6,
            longest_turn: time / 2,
            elapsed: time,
        };
        vec![
            Answer::Done,
            Answer::Shared(SharedReport { filled_bytes: 1, lazy_bytes: 2, elapsed: time }),
            Answer::Progress(Progress { processes: 1, filled_bytes: 2, faults: 3 }),
            Answer::Failed(Failure::other("ünwell")),
            Answer::Ended(Ok(report)),
            Answer::Ended(Err(Failure::new(&FillError::RestoreFailed))),
        ]
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        requests().into_iter().for_each(|r| assert_eq!(Request::decode(&r.encode()).unwrap(), r));
        answers().into_iter().for_each(|a| assert_eq!(Answer::decode(&a.encode()).unwrap(), a));
    }

    #[test]
    fn damaged_messages_are_refused_or_mean_something() {
        let all: Vec<_> = requests().iter().map(Request::encode).chain(answers().iter().map(Answer::encode)).collect();
        for bytes in all {
            for at in 0..bytes.len() {
                for value in [0, 1, 5, 0x7f, 0xff] {
                    let mut damaged = bytes.clone();
                    damaged[at] = value;
                    let _ = (Request::decode(&damaged), Answer::decode(&damaged));
                }
                let cut = &bytes[..at];
                let _ = (Request::decode(cut), Answer::decode(cut));
            }
        }
        assert!(Request::decode(&[]).is_err() && Answer::decode(&[]).is_err());
        assert!(Request::decode(&[9]).is_err() && Answer::decode(&[9]).is_err());
        let mut long = Answer::Done.encode();
        long.push(0);
        assert!(Answer::decode(&long).is_err());
    }

    #[test]
    fn errors_keep_their_kind_or_tell_their_causes() {
        assert!(matches!(Failure::new(&FillError::Gone).error(), FillError::Gone));
        let error = FillError::Listen(io::Error::other("no such place"));
        let remote = Failure::new(&error).error().to_string();
        assert!(remote.contains("could not be made: no such place"), "{remote}");
    }
}
