//! Tables that programs and we share.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::BpfError;
use crate::sys::bpf::{self, MapSizes};

/// Bytes of keys and values that one call takes out of a map.
const TAKE_BYTES: usize = 256 << 10;

/// What a map is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// By key; full is full.
    Hash = 1,
    /// By number (keys of 4 bytes), all there from the beginning and zero.
    Array = 2,
    /// Records in order, see [`super::Ring`]; without keys and values.
    Ring = 27,
}

/// A map. Lives as long as this or a program that uses it.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    sizes: MapSizes,
    entries: usize,
}

/// What was taken out of a map.
#[derive(Debug)]
pub struct Entries {
    keys: Vec<u8>,
    values: Vec<u8>,
    sizes: MapSizes,
}

impl Entries {
    /// Keys with their values, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys.chunks_exact(self.sizes.key).zip(self.values.chunks_exact(self.sizes.value))
    }
}

impl Map {
    /// A map of `entries` keys and values of these sizes in bytes. `name` is for people who look at the machine.
    pub fn create(kind: MapKind, name: &str, key: u32, value: u32, entries: u32) -> Result<Self, BpfError> {
        let fd = bpf::create_map(kind as u32, key, value, entries, name).map_err(BpfError::kernel("making a map"))?;
        let sizes = MapSizes { key: key as usize, value: value as usize };
        Ok(Self { fd, sizes, entries: entries as usize })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The value for a key; `None` if there is none.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, BpfError> {
        let mut value = vec![0; self.sizes.value];
        let found = bpf::map_lookup(self.fd(), self.sizes, key, &mut value);
        Ok(found.map_err(BpfError::kernel("reading a map"))?.then_some(value))
    }

    /// Puts a value in the place of whatever is there.
    pub fn put(&self, key: &[u8], value: &[u8]) -> Result<(), BpfError> {
        bpf::map_update(self.fd(), self.sizes, key, value).map_err(BpfError::kernel("writing to a map"))
    }

    /// Takes a key out; whether it was there.
    pub fn remove(&self, key: &[u8]) -> Result<bool, BpfError> {
        bpf::map_delete(self.fd(), self.sizes, key).map_err(BpfError::kernel("taking out of a map"))
    }

    /// Takes everything out of a [`MapKind::Hash`], each entry in one step with telling it. Entries that come meanwhile
    /// may or may not be among them; none is lost.
    pub fn take_all(&self) -> Result<Entries, BpfError> {
        let MapSizes { key, value } = self.sizes;
        let mut room = (TAKE_BYTES / (key + value).max(1)).clamp(1, self.entries);
        let (mut taken, mut cursor) = (Entries { keys: Vec::new(), values: Vec::new(), sizes: self.sizes }, None);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        // Twice as many turns as without entries that come meanwhile; each of them takes something, or asks for room
        // for a longer chain.
        for _ in 0..2 * (self.entries / room + 1) + usize::BITS as usize {
            keys.resize(room * key, 0);
            values.resize(room * value, 0);
            let last = match bpf::map_take(self.fd(), self.sizes, &mut cursor, &mut keys, &mut values) {
                Ok(part) => {
                    taken.keys.extend(&keys[..part.count * key]);
                    taken.values.extend(&values[..part.count * value]);
                    !part.more
                }
                Err(error) if error.kind() == io::ErrorKind::StorageFull && room < self.entries => {
                    room = (room * 2).min(self.entries);
                    false
                }
                Err(source) => return Err(BpfError::Kernel { doing: "emptying a map", source }),
            };
            if last {
                break;
            }
        }
        Ok(taken)
    }
}
