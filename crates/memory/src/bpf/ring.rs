//! Records from programs, in the order in which they happened.

use super::{BpfError, Map, MapKind};
use crate::sys;

/// A ring that programs write to ([`super::helper::RINGBUF_OUTPUT`]) and one reader empties. What does not fit is the
/// program's to notice.
#[derive(Debug)]
pub struct Ring {
    map: Map,
    mapped: sys::ring::Ring,
}

impl Ring {
    /// A ring of `bytes`: a power of two, and of pages. Each record takes 8 more than its length.
    pub fn create(name: &str, bytes: u32) -> Result<Self, BpfError> {
        let map = Map::create(MapKind::Ring, name, 0, 0, bytes)?;
        let mapped = sys::ring::Ring::map(map.fd(), bytes as usize).map_err(BpfError::kernel("mapping a ring"))?;
        Ok(Self { map, mapped })
    }

    /// For [`super::Code::set_map`].
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// Takes out every complete record. What is being written at this moment, and all after it, stays for the next
    /// time.
    pub fn take(&mut self, each: impl FnMut(&[u8])) {
        self.mapped.take(each);
    }
}
