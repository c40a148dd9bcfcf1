//! Pages at the destination, from their arrival until they are put into a process.
//!
//! A page lies where it will be used: 512 pages in a row (2 MiB of 4 KiB pages) share one stretch of reserved memory,
//! each at its own place, so that a run of pages is a run of bytes for UFFDIO_COPY, and a later version overwrites an
//! earlier one. Memory that was not sent costs nothing; for each stretch in use there are 1.2 KiB of books. All of it
//! is one file in memory, which another process can be given ([`FillerProcess::load`](crate::FillerProcess::load)).

mod handover;
mod reserve;
mod space;

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;

use crate::pages::{PageRange, page_size};
use crate::tracker::ObjectId;
pub(crate) use handover::{read_key, write_key};
use reserve::Reserve;
pub(crate) use space::Space;
use space::parts;

/// Pages of one stretch.
const PAGES: usize = 512;
/// What is received at once, in bytes: it is to be still in the processor's cache when it is put away.
const RECEIVE_BYTES: usize = 256 << 10;

thread_local! {
    /// What a thread receives into; kept, because new memory costs as much as what it is used for.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("a file in memory for pages could not be made")]
    Create(#[source] io::Error),
    /// Another process has the pages.
    #[error("the pages were handed over: none of {key:?} are taken any more")]
    HandedOver { key: Key },
    #[error("no memory is left for pages of {key:?}")]
    Memory {
        key: Key,
        #[source]
        source: io::Error,
    },
    #[error("{key:?}: {start:#x} with {bytes} bytes are not whole pages within one address space")]
    Unaligned { key: Key, start: u64, bytes: u64 },
    #[error("pages of {key:?} at {start:#x} did not arrive")]
    Receive {
        key: Key,
        start: u64,
        #[source]
        source: io::Error,
    },
}

/// Whose pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A process, by its number in its own pid namespace; pages are at their addresses.
    Process(i32),
    /// A shared object, as it was called at the source; pages are at their offsets.
    Object(ObjectId),
}

/// All pages that have arrived and were not consumed. Can be shared between threads; those who fill different
/// stretches wait for each other only while the kernel takes a copy (256 KiB at most from `receive`).
pub struct PageStore {
    spaces: RwLock<HashMap<Key, Arc<Space>>>,
    reserve: Arc<Reserve>,
}

impl PageStore {
    /// An empty store. Fails if there can be no file in memory (descriptors, memory).
    pub fn new() -> Result<Self, StoreError> {
        let reserve = Reserve::new().map_err(StoreError::Create)?;
        Ok(Self { spaces: RwLock::default(), reserve: Arc::new(reserve) })
    }

    /// Takes pages in: `receive` is given a buffer, several times for a large range, and must fill all of it, for
    /// instance from a socket. `round` counts from 0; pages of an earlier round than what is known are received and
    /// dropped. Pages that `receive` fails on are unknown afterwards.
    pub fn receive(
        &self,
        key: Key,
        range: PageRange,
        round: u16,
        mut receive: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        check(key, range)?;
        let space = self.space(key);
        // Not a mapping of the file: the kernel would clear each page before it is written, which takes twice as long
        // as writing what lies in the processor's cache.
        let mut buffer = BUFFER.take();
        buffer.resize(RECEIVE_BYTES, 0);
        let mut all = parts(range).flat_map(|part| part.steps(RECEIVE_BYTES as u64));
        let result = all.try_for_each(|part| {
            let bytes = &mut buffer[..part.bytes() as usize];
            let received = receive(bytes).map_err(|source| StoreError::Receive { key, start: part.start, source });
            space.take(key, part, round, received.is_ok().then_some(bytes))?;
            received
        });
        BUFFER.set(buffer);
        result
    }

    /// Takes a copy of pages.
    pub fn put(&self, key: Key, start: u64, round: u16, bytes: &[u8]) -> Result<(), StoreError> {
        let end = start.checked_add(bytes.len() as u64);
        let range = end.and_then(|end| PageRange::new(start, end));
        let range = range.ok_or(StoreError::Unaligned { key, start, bytes: bytes.len() as u64 })?;
        check(key, range)?;
        let space = self.space(key);
        let mut left = bytes;
        parts(range).try_for_each(|part| {
            let (these, others) = left.split_at(part.bytes() as usize);
            left = others;
            space.take(key, part, round, Some(these))
        })
    }

    /// These pages are zero, or gone, as of `round`.
    pub fn forget(&self, key: Key, range: PageRange, round: u16) -> Result<(), StoreError> {
        check(key, range)?;
        let space = self.space(key);
        parts(range).try_for_each(|part| space.forget(key, part, round))
    }

    /// Drops everything known of a process or an object.
    pub fn drop_key(&self, key: Key) {
        self.spaces.write().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Bytes of pages held.
    pub fn bytes(&self) -> u64 {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        spaces.values().map(|s| s.bytes()).sum()
    }

    /// Whether there are pages of shared objects.
    pub(crate) fn has_objects(&self) -> bool {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        spaces.iter().any(|(key, space)| matches!(key, Key::Object(_)) && space.bytes() > 0)
    }

    pub(crate) fn space(&self, key: Key) -> Arc<Space> {
        if let Some(space) = self.spaces.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(space);
        }
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(spaces.entry(key).or_insert_with(|| Arc::new(Space::new(Arc::clone(&self.reserve)))))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stretch_bytes() -> u64 {
    PAGES as u64 * page_size()
}

fn check(key: Key, range: PageRange) -> Result<(), StoreError> {
    let whole = range.start.is_multiple_of(page_size()) && range.end.is_multiple_of(page_size());
    if whole && range.start < range.end && range.end < 1 << 63 {
        return Ok(());
    }
    Err(StoreError::Unaligned { key, start: range.start, bytes: range.end.saturating_sub(range.start) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KEY: Key = Key::Process(7);

    fn page(value: u8, pages: usize) -> Vec<u8> {
        vec![value; pages * page_size() as usize]
    }

    fn at(page: u64) -> u64 {
        page * page_size()
    }

    /// What is held, page by page, as the first byte.
    fn content(store: &PageStore, pages: std::ops::Range<u64>) -> Vec<Option<u8>> {
        let space = store.space(KEY);
        let one = |n: u64| {
            let range = PageRange { start: at(n), end: at(n + 1) };
            // SAFETY: the run's first byte is there while the closure runs.
            space.first_run(range, u64::MAX, |run| unsafe { *run.data })
        };
        pages.map(one).collect()
    }

    #[test]
    fn the_latest_round_wins_in_whatever_order() {
        let store = PageStore::new().unwrap();
        store.put(KEY, at(510), 3, &page(3, 4)).unwrap();
        store.put(KEY, at(509), 1, &page(1, 3)).unwrap();
        store.forget(KEY, PageRange { start: at(513), end: at(514) }, 4).unwrap();
        store.put(KEY, at(513), 2, &page(2, 1)).unwrap();
        assert_eq!(content(&store, 508..515), [None, Some(1), Some(3), Some(3), Some(3), None, None]);
        assert_eq!(store.bytes(), at(4));
    }

    #[test]
    fn runs_end_at_holes_limits_and_stretches() {
        let store = PageStore::new().unwrap();
        store.put(KEY, at(500), 0, &page(1, 100)).unwrap();
        let space = store.space(KEY);
        let run =
            |start, end, limit| space.first_run(PageRange { start: at(start), end: at(end) }, at(limit), |r| r.range);
        assert_eq!(run(0, 10_000, 1000), Some(PageRange { start: at(500), end: at(512) }));
        assert_eq!(run(512, 10_000, 1000), Some(PageRange { start: at(512), end: at(600) }));
        assert_eq!(run(505, 10_000, 3), Some(PageRange { start: at(505), end: at(508) }));
        assert_eq!(run(600, 10_000, 3), None);
        assert_eq!(run(0, 500, 3), None);
    }

    #[test]
    fn consumed_memory_is_given_back() {
        let store = PageStore::new().unwrap();
        let held = || store.reserve.held_bytes().unwrap();
        store.put(KEY, 0, 0, &page(9, 16 * 512)).unwrap();
        assert_eq!(held(), at(16 * 512));
        let space = store.space(KEY);
        // Another mapping of a page does not keep it.
        // SAFETY: the run's first byte is there while the closure runs.
        let first =
            space.first_run(PageRange { start: 0, end: at(1) }, at(1), |run| unsafe { run.data.read_volatile() });
        assert_eq!(first, Some(9));
        space.release(PageRange { start: at(1), end: at(64) });
        assert_eq!(held(), at(16 * 512), "a block is used up as a whole");
        space.release(PageRange { start: 0, end: at(1) });
        assert_eq!(held(), at(16 * 512 - 64));
        space.release(PageRange { start: at(64), end: at(16 * 512) });
        assert_eq!((held(), store.bytes()), (0, 0));
        store.put(KEY, 0, 0, &page(9, 10)).unwrap();
        store.forget(KEY, PageRange { start: at(2), end: at(4) }, 0).unwrap();
        assert_eq!(held(), at(8));
        drop(space);
        store.drop_key(KEY);
        assert_eq!(held(), 0);
    }

    #[test]
    fn what_fails_on_the_way_is_unknown() {
        let store = PageStore::new().unwrap();
        let range = PageRange { start: 0, end: at(2) };
        store.put(KEY, 0, 0, &page(5, 2)).unwrap();
        let cut = store.receive(KEY, range, 1, |_| Err(io::Error::from(io::ErrorKind::ConnectionReset)));
        assert!(matches!(cut, Err(StoreError::Receive { .. })));
        assert_eq!(content(&store, 0..2), [None, None]);
        assert!(matches!(store.put(KEY, 12, 0, &[0; 100]), Err(StoreError::Unaligned { .. })));
    }
}
