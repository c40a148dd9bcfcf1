//! Pages that come after the processes run (post-copy): from the agent to the process that fills, on a socket of their
//! own.
//!
//! ```text
//!   agent                                         filler
//!   LateFeed ── pages, zeroes, that it was all ──▶ Awaited ─▶ PageStore
//!   LateWants ◀──────── a page somebody waits for ──┘
//! ```
//! Messages are framed as in [`crate::channel`]; the first byte says what one is, numbers are little-endian:
//!
//! ```text
//! u8 1, key, u32 number of ranges, each u64 start and end; then their pages
//! u8 2, the same: pages that are zero
//! u8 3: that was all
//! and back: key, u64 address of a page
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::write;

use crate::bytes::{Reader, Writer};
use crate::channel::{receive, send};
use crate::outstanding::Outstanding;
use crate::pages::{PageRange, PageSet, page_size};
use crate::store::{Key, PageStore, read_key, write_key};

const PAGES: u8 = 1;
const ZEROES: u8 = 2;
const ALL: u8 = 3;
/// The round that late pages are of, for the store: after all that was handed over.
const LATE_ROUND: u16 = 1;
/// The process that fills takes a message within this time, in seconds, or counts as gone.
const TAKE_S: u64 = 10;

/// What the process that fills must know of pages that come later.
#[derive(Debug)]
pub struct Late {
    pub(crate) pages: HashMap<Key, PageSet>,
    pub(crate) socket: OwnedFd,
}

impl Late {
    /// `pages` will come later. The feed is for who receives them; dropping it before [`LateFeed::complete`] says that
    /// they are lost.
    ///
    /// Errors: no socket could be made.
    pub fn new(pages: HashMap<Key, PageSet>) -> io::Result<(Self, LateFeed)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_write_timeout(Some(Duration::from_secs(TAKE_S)))?;
        Ok((Self { pages, socket: theirs.into() }, LateFeed { stream: ours }))
    }
}

/// Where late pages go. Methods block, 10 s at most.
#[derive(Debug)]
pub struct LateFeed {
    stream: UnixStream,
}

impl LateFeed {
    /// Pages have come. Errors: the process that fills is gone, or takes nothing.
    pub fn pages(&mut self, key: Key, pages: &[(PageRange, &[u8])]) -> io::Result<()> {
        let mut message = head(PAGES, key, pages.iter().map(|(range, _)| *range));
        pages.iter().for_each(|(_, bytes)| message.raw(bytes));
        send(&self.stream, &message.into_bytes(), None)
    }

    /// These pages are zero. Errors as [`LateFeed::pages`].
    pub fn zeroes(&mut self, key: Key, ranges: &[PageRange]) -> io::Result<()> {
        send(&self.stream, &head(ZEROES, key, ranges.iter().copied()).into_bytes(), None)
    }

    /// That was all. Errors as [`LateFeed::pages`].
    pub fn complete(&mut self) -> io::Result<()> {
        send(&self.stream, &[ALL], None)
    }

    /// The other direction. Errors: the descriptor cannot be copied.
    pub fn wants(&self) -> io::Result<LateWants> {
        Ok(LateWants { stream: self.stream.try_clone()? })
    }
}

impl Drop for LateFeed {
    fn drop(&mut self) {
        // Who listens for wants holds a copy of the descriptor.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Hears of pages that somebody waits for.
#[derive(Debug)]
pub struct LateWants {
    stream: UnixStream,
}

impl LateWants {
    /// Waits for the next one; `None` once the feed or the process that fills is gone.
    pub fn hear(&mut self) -> io::Result<Option<(Key, PageRange)>> {
        let Some((message, _)) = receive(&self.stream)? else { return Ok(None) };
        let mut from = Reader::new(&message);
        let (key, start) = (read_key(&mut from)?, from.u64()?);
        from.end()?;
        let end = start.checked_add(page_size()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some((key, PageRange { start, end })))
    }
}

fn head(what: u8, key: Key, ranges: impl ExactSizeIterator<Item = PageRange>) -> Writer {
    let mut message = Writer::default();
    message.u8(what);
    write_key(&mut message, key);
    // A message is far shorter than 2^32 ranges.
    message.u32(ranges.len() as u32);
    ranges.for_each(|range| [range.start, range.end].into_iter().for_each(|n| message.u64(n)));
    message
}

/// Pages that have not come yet, in the process that fills.
pub(crate) struct Awaited {
    state: Mutex<State>,
    stream: UnixStream,
}

#[derive(Default)]
struct State {
    pages: HashMap<Key, Outstanding>,
    /// Have come, and nobody has put them in.
    arrived: VecDeque<(Key, PageRange)>,
    complete: bool,
    lost: Option<io::Error>,
}

impl Awaited {
    pub(crate) fn new(pages: &HashMap<Key, PageSet>, socket: OwnedFd) -> Self {
        let pages = pages.iter().map(|(key, set)| (*key, set.into())).collect();
        Self { state: Mutex::new(State { pages, ..State::default() }), stream: socket.into() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first part of `within` that has not come yet.
    pub(crate) fn first(&self, key: Key, within: PageRange) -> Option<PageRange> {
        self.lock().pages.get(&key)?.first(within)
    }

    /// Somebody waits for a page.
    pub(crate) fn want(&self, key: Key, address: u64) -> io::Result<()> {
        let mut message = Writer::default();
        write_key(&mut message, key);
        message.u64(address);
        send(&self.stream, &message.into_bytes(), None)
    }

    /// What has come since, the oldest first.
    pub(crate) fn next_arrived(&self) -> Option<(Key, PageRange)> {
        self.lock().arrived.pop_front()
    }

    /// Could not be put in yet.
    pub(crate) fn again(&self, key: Key, range: PageRange) {
        self.lock().arrived.push_back((key, range));
    }

    pub(crate) fn has_arrived(&self) -> bool {
        !self.lock().arrived.is_empty()
    }

    /// Whether everything has come and was taken from here. An error: what is missing will not come.
    pub(crate) fn is_over(&self) -> io::Result<bool> {
        let mut state = self.lock();
        match state.lost.take() {
            Some(error) => Err(error),
            None => Ok(state.complete && state.arrived.is_empty()),
        }
    }

    /// Takes in what comes, until it is all or the socket closes; `wake` is an eventfd that is told each time. The body
    /// of a thread.
    pub(crate) fn receive(&self, store: &PageStore, wake: &OwnedFd) {
        loop {
            let more = self.receive_one(store);
            match more {
                Ok(true) => {}
                Ok(false) => self.lock().complete = true,
                Err(ref error) => self.lock().lost = Some(io::Error::new(error.kind(), error.to_string())),
            }
            let _ = write(wake, &1u64.to_ne_bytes());
            if !matches!(more, Ok(true)) {
                return;
            }
        }
    }

    /// `false`: that was all.
    fn receive_one(&self, store: &PageStore) -> io::Result<bool> {
        let (message, _) = receive(&self.stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut from = Reader::new(&message);
        let what = from.u8()?;
        if what == ALL {
            from.end()?;
            let missing = self.lock().pages.values().any(|left| !left.is_empty());
            return if missing { Err(invalid("an end before all pages")) } else { Ok(false) };
        }
        let key = read_key(&mut from)?;
        let mut ranges = Vec::new();
        for _ in 0..from.u32()? {
            let range = PageRange::new(from.u64()?, from.u64()?);
            ranges.push(range.ok_or_else(|| invalid("an empty range"))?);
        }
        let mut content = from.rest();
        for range in &ranges {
            if what == PAGES {
                let bytes = usize::try_from(range.bytes()).ok().and_then(|n| content.split_at_checked(n));
                let (bytes, rest) = bytes.ok_or_else(|| invalid("fewer pages than ranges"))?;
                content = rest;
                store.put(key, range.start, LATE_ROUND, bytes).map_err(io::Error::other)?;
            }
            // Not before the store has it: what is not awaited is there, or zero.
            let mut state = self.lock();
            if let Some(left) = state.pages.get_mut(&key) {
                left.remove(*range);
            }
            if what == PAGES {
                state.arrived.push_back((key, *range));
            }
        }
        if content.is_empty() { Ok(true) } else { Err(invalid("more pages than ranges")) }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Takes part in the handing over of what is late: see [`Late`].
pub(crate) fn write_late(to: &mut Writer, pages: &HashMap<Key, PageSet>) {
    to.u32(pages.len() as u32);
    for (key, set) in pages {
        write_key(to, *key);
        to.u32(set.ranges().len() as u32);
        set.ranges().iter().for_each(|range| [range.start, range.end].into_iter().for_each(|n| to.u64(n)));
    }
}

pub(crate) fn read_late(from: &mut Reader<'_>) -> io::Result<HashMap<Key, PageSet>> {
    let mut pages = HashMap::new();
    for _ in 0..from.u32()? {
        let key = read_key(from)?;
        let mut ranges = Vec::new();
        for _ in 0..from.u32()? {
            let range = PageRange::new(from.u64()?, from.u64()?);
            ranges.push(range.ok_or_else(|| invalid("an empty range"))?);
        }
        pages.insert(key, ranges.into_iter().collect());
    }
    Ok(pages)
}

/// The thread that takes late pages in.
pub(crate) fn start(awaited: Arc<Awaited>, store: Arc<PageStore>, wake: Arc<OwnedFd>) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("godwit-late".to_owned());
    thread.spawn(move || awaited.receive(&store, &wake)).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KEY: Key = Key::Process(7);

    fn range(start: u64, end: u64) -> PageRange {
        PageRange { start: start * page_size(), end: end * page_size() }
    }

    fn awaiting(ranges: &[PageRange]) -> (Arc<Awaited>, LateFeed, Arc<PageStore>) {
        let pages = HashMap::from([(KEY, ranges.iter().copied().collect())]);
        let (late, feed) = Late::new(pages).unwrap();
        let mut to = Writer::default();
        write_late(&mut to, &late.pages);
        let bytes = to.into_bytes();
        let read = read_late(&mut Reader::new(&bytes)).unwrap();
        assert_eq!(read, late.pages);
        (Arc::new(Awaited::new(&read, late.socket)), feed, Arc::new(PageStore::new().unwrap()))
    }

    #[test]
    fn pages_come_and_are_asked_for() {
        let (awaited, mut feed, store) = awaiting(&[range(0, 4), range(8, 9)]);
        let mut wants = feed.wants().unwrap();
        awaited.want(KEY, range(8, 9).start).unwrap();
        assert_eq!(wants.hear().unwrap(), Some((KEY, range(8, 9))));
        let page = vec![3; page_size() as usize];
        feed.pages(KEY, &[(range(8, 9), &page), (range(1, 2), &page)]).unwrap();
        feed.zeroes(KEY, &[range(0, 1), range(2, 4)]).unwrap();
        feed.complete().unwrap();
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        assert_eq!(awaited.first(KEY, range(0, 9)), Some(range(0, 4)));
        awaited.receive(&store, &wake);
        assert_eq!(awaited.first(KEY, range(0, 9)), None);
        assert_eq!(store.bytes(), 2 * page_size());
        assert!(!awaited.is_over().unwrap());
        assert_eq!(
            [awaited.next_arrived(), awaited.next_arrived()],
            [Some((KEY, range(8, 9))), Some((KEY, range(1, 2)))]
        );
        assert!(awaited.is_over().unwrap());
    }

    #[test]
    fn an_end_before_everything_has_come_is_a_loss() {
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        for complete in [true, false] {
            let (awaited, mut feed, store) = awaiting(&[range(0, 2)]);
            feed.zeroes(KEY, &[range(0, 1)]).unwrap();
            if complete {
                feed.complete().unwrap();
            }
            let mut wants = feed.wants().unwrap();
            drop(feed);
            awaited.receive(&store, &wake);
            assert!(awaited.is_over().is_err());
            assert_eq!(wants.hear().unwrap(), None);
        }
    }
}
