//! Memory for stretches of pages: one file, which grows by reservations, each mapped at once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::{lock, stretch_bytes};
use crate::pages::page_size;
use crate::sys::mapping::{Mapping, fix_size, is_size_fixed, memory_file};

/// Stretches of one reservation.
const STRETCHES: usize = 64;

/// Reserved memory.
pub(super) struct Reserve {
    file: Arc<File>,
    free: Mutex<Free>,
    /// The file belongs to another process: nothing of it may be used or given back here.
    handed_over: AtomicBool,
}

/// Stretches that are free.
#[derive(Default)]
struct Free {
    places: Vec<(Arc<Mapping>, usize)>,
    /// How far the file reaches, in bytes.
    end: u64,
}

/// Memory of one stretch; goes back to the reserve.
pub(super) struct Place {
    mapping: Arc<Mapping>,
    offset: usize,
    reserve: Arc<Reserve>,
}

impl Reserve {
    pub(super) fn new() -> io::Result<Self> {
        let file = Arc::new(memory_file()?);
        Ok(Self { file, free: Mutex::default(), handed_over: AtomicBool::new(false) })
    }

    pub(super) fn take(self: &Arc<Self>) -> io::Result<Place> {
        let mut free = lock(&self.free);
        if free.places.is_empty() {
            let (at, bytes) = (free.end, stretch_bytes() as usize);
            let end = at + (STRETCHES * bytes) as u64;
            self.file.set_len(end)?;
            let mapping = Arc::new(Mapping::new(Arc::clone(&self.file), at, STRETCHES * bytes)?);
            free.end = end;
            free.places.extend((0..STRETCHES).rev().map(|n| (Arc::clone(&mapping), n * bytes)));
        }
        let (mapping, offset) = free.places.pop().ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Place { mapping, offset, reserve: Arc::clone(self) })
    }

    /// Bytes that the file takes.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> io::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&self.file.metadata()?) * 512)
    }

    pub(super) fn is_handed_over(&self) -> bool {
        self.handed_over.load(Ordering::Acquire)
    }

    /// From now on the file is another's: false if it was so before.
    pub(super) fn hand_over(&self) -> bool {
        !self.handed_over.swap(true, Ordering::AcqRel)
    }

    /// The file, which keeps its size from now on.
    pub(super) fn fixed_file(&self) -> io::Result<Arc<File>> {
        let _no_growth = lock(&self.free);
        fix_size(&self.file)?;
        Ok(Arc::clone(&self.file))
    }

    /// Unmaps what no stretch uses.
    pub(super) fn unmap(&self) {
        let places = std::mem::take(&mut lock(&self.free).places);
        drop(places);
    }
}

/// The memory of another's reserve, which is ours now.
pub(super) struct Adopted {
    reserve: Arc<Reserve>,
    mapping: Arc<Mapping>,
    taken: Vec<bool>,
}

impl Adopted {
    /// Maps all of a file that came from [`Reserve::fixed_file`].
    pub(super) fn new(file: File) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        if !is_size_fixed(&file) {
            return Err(invalid("the file of pages could be cut"));
        }
        let file = Arc::new(file);
        let end = file.metadata()?.len();
        let bytes = usize::try_from(end).map_err(|_| invalid("the file of pages is too large"))?;
        let stretches = end / stretch_bytes();
        if stretches == 0 || !end.is_multiple_of(stretch_bytes()) {
            return Err(invalid("the file of pages has no whole stretches"));
        }
        let mapping = Arc::new(Mapping::new(Arc::clone(&file), 0, bytes)?);
        let free = Mutex::new(Free { places: Vec::new(), end });
        let reserve = Arc::new(Reserve { file, free, handed_over: AtomicBool::new(false) });
        Ok(Self { reserve, mapping, taken: vec![false; stretches as usize] })
    }

    /// Stretch `number` of the file, once; `None` if there is none such.
    pub(super) fn take(&mut self, number: u64) -> Option<Place> {
        let taken = self.taken.get_mut(usize::try_from(number).ok()?)?;
        if std::mem::replace(taken, true) {
            return None;
        }
        let offset = number as usize * stretch_bytes() as usize;
        Some(Place { mapping: Arc::clone(&self.mapping), offset, reserve: Arc::clone(&self.reserve) })
    }
}

impl Place {
    pub(super) fn page(&self, page: usize) -> *const u8 {
        self.mapping.base().wrapping_add(self.offset + page * page_size() as usize)
    }

    /// Writes pages from `page` on.
    pub(super) fn write(&self, page: usize, bytes: &[u8]) -> io::Result<()> {
        let at = self.mapping.at() + (self.offset + page * page_size() as usize) as u64;
        self.reserve.file.write_all_at(bytes, at)
    }

    /// Which stretch of the file it is.
    pub(super) fn number(&self) -> u64 {
        (self.mapping.at() + self.offset as u64) / stretch_bytes()
    }

    /// Gives the memory of some pages back.
    pub(super) fn release(&self, page: usize, pages: usize) {
        if !self.reserve.is_handed_over() {
            self.mapping.release(self.offset + page * page_size() as usize, pages * page_size() as usize);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.reserve.is_handed_over() {
            self.mapping.release(self.offset, stretch_bytes() as usize);
            lock(&self.reserve.free).places.push((Arc::clone(&self.mapping), self.offset));
        }
    }
}
