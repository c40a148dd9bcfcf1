//! Reserved memory for stretches of pages.

use std::io;
use std::sync::{Arc, Mutex};

use super::{lock, stretch_bytes};
use crate::pages::page_size;
use crate::sys::mapping::Mapping;

/// Stretches of one reservation.
const STRETCHES: usize = 64;

/// Reserved memory: stretches that are free.
#[derive(Default)]
pub(super) struct Reserve {
    free: Mutex<Vec<(Arc<Mapping>, usize)>>,
}

/// Memory of one stretch; goes back to the reserve.
pub(super) struct Place {
    mapping: Arc<Mapping>,
    offset: usize,
    reserve: Arc<Reserve>,
}

impl Reserve {
    pub(super) fn take(self: &Arc<Self>) -> io::Result<Place> {
        let mut free = lock(&self.free);
        if free.is_empty() {
            let bytes = stretch_bytes() as usize;
            let mapping = Arc::new(Mapping::new(STRETCHES * bytes)?);
            free.extend((0..STRETCHES).rev().map(|n| (Arc::clone(&mapping), n * bytes)));
        }
        let (mapping, offset) = free.pop().ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Place { mapping, offset, reserve: Arc::clone(self) })
    }
}

impl Place {
    pub(super) fn page(&self, page: usize) -> *mut u8 {
        self.mapping.base().wrapping_add(self.offset + page * page_size() as usize)
    }
}

impl Place {
    /// Gives the memory of some pages back.
    pub(super) fn release(&self, page: usize, pages: usize) {
        self.mapping.release(self.offset + page * page_size() as usize, pages * page_size() as usize);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.mapping.release(self.offset, stretch_bytes() as usize);
        lock(&self.reserve.free).push((Arc::clone(&self.mapping), self.offset));
    }
}
