//! A store's pages in the hands of another process: its file, and where in it everything is.
//!
//! ```text
//! u32 page size in bytes, u32 number of keys; for each key
//!   u8 0, i32 process                                     or
//!   u8 1, u64 device, u64 inode, u8 1 if of SysV
//!   u32 number of stretches; for each stretch
//!     u64 its number among the key's stretches, u32 its number in the file, 64 bytes: a bit for each page held
//! ```
//!
//! All little-endian, lowest bit first; stretches without pages are not listed.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::reserve::Adopted;
use super::space::{BLOCK, Stretch};
use super::{Key, PAGES, PageStore, PoisonError, lock, stretch_bytes};
use crate::bytes::{Reader, Writer};
use crate::pages::page_size;

const PROCESS: u8 = 0;
const OBJECT: u8 = 1;

impl PageStore {
    /// Gives the file and its index away. From now on nothing is taken here any more, nothing is held, and dropping
    /// the store changes nothing in the file. An error if it was done before.
    pub(crate) fn hand_over(&self) -> io::Result<(Arc<File>, Vec<u8>)> {
        // First, so that who takes pages in at the same time either is in the index or is told.
        if !self.reserve.hand_over() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the pages were handed over before"));
        }
        let file = self.reserve.fixed_file()?;
        let spaces = std::mem::take(&mut *self.spaces.write().unwrap_or_else(PoisonError::into_inner));
        let mut index = Writer::default();
        index.u32(page_size() as u32);
        index.u32(spaces.len() as u32);
        for (key, space) in &spaces {
            write_key(&mut index, *key);
            let stretches = space.stretches.read().unwrap_or_else(PoisonError::into_inner);
            let count_at = index.len();
            index.u32(0);
            let mut count = 0;
            for (number, stretch) in &*stretches {
                let stretch = lock(stretch);
                if stretch.present == [0; PAGES / BLOCK] {
                    continue;
                }
                count += 1;
                index.u64(*number);
                // A file of 2^32 stretches has 8 PiB.
                index.u32(stretch.place.number() as u32);
                stretch.present.iter().for_each(|word| index.u64(*word));
            }
            index.set_u32(count_at, count);
        }
        drop(spaces);
        self.reserve.unmap();
        Ok((file, index.into_bytes()))
    }

    /// Takes in what [`PageStore::hand_over`] gave away.
    pub(crate) fn adopt(&self, file: File, index: &[u8]) -> io::Result<()> {
        let mut index = Reader::new(index);
        if u64::from(index.u32()?) != page_size() {
            return Err(invalid("pages of another size"));
        }
        let keys = index.u32()?;
        let mut adopted = None;
        for _ in 0..keys {
            let space = self.space(read_key(&mut index)?);
            let mut stretches = space.stretches.write().unwrap_or_else(PoisonError::into_inner);
            for _ in 0..index.u32()? {
                let (number, place) = (index.u64()?, index.u32()?);
                let mut present = [0; PAGES / BLOCK];
                for word in &mut present {
                    *word = index.u64()?;
                }
                if number >= (1 << 63) / stretch_bytes() {
                    return Err(invalid("a stretch beyond every address"));
                }
                let adopted = match &mut adopted {
                    Some(adopted) => adopted,
                    None => adopted.insert(Adopted::new(file.try_clone()?)?),
                };
                let place = adopted.take(u64::from(place)).ok_or_else(|| invalid("a stretch that is not there"))?;
                let stretch = Stretch { place, present, rounds: Box::new([1; PAGES]) };
                if stretches.insert(number, Arc::new(stretch.into())).is_some() {
                    return Err(invalid("two stretches at one place"));
                }
            }
        }
        index.end()
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

pub(crate) fn write_key(index: &mut Writer, key: Key) {
    match key {
        Key::Process(pid) => {
            index.u8(PROCESS);
            index.i32(pid);
        }
        Key::Object(id) => {
            index.u8(OBJECT);
            index.object(id);
        }
    }
}

pub(crate) fn read_key(index: &mut Reader<'_>) -> io::Result<Key> {
    match index.u8()? {
        PROCESS => Ok(Key::Process(index.i32()?)),
        OBJECT => Ok(Key::Object(index.object()?)),
        _ => Err(invalid("neither a process nor an object")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{PageRange, StoreError};
    use super::*;
    use crate::tracker::ObjectId;

    fn filled() -> PageStore {
        let store = PageStore::new().unwrap();
        let object = Key::Object(ObjectId { device: 7, inode: 8, sysv: true });
        store.put(Key::Process(3), 511 * page_size(), 2, &vec![5; 3 * page_size() as usize]).unwrap();
        store.put(object, 0, 0, &vec![6; 1200 * page_size() as usize]).unwrap();
        store
    }

    #[test]
    fn what_is_handed_over_is_there_and_here_no_longer() {
        let store = filled();
        let (file, index) = store.hand_over().unwrap();
        assert_eq!(store.bytes(), 0);
        let late = store.put(Key::Process(3), 0, 9, &vec![1; page_size() as usize]);
        assert!(matches!(late, Err(StoreError::HandedOver { .. })), "{late:?}");
        let late = store.forget(Key::Process(3), PageRange { start: 0, end: page_size() }, 9);
        assert!(matches!(late, Err(StoreError::HandedOver { .. })), "{late:?}");
        assert!(store.hand_over().is_err());
        let other = PageStore::new().unwrap();
        other.adopt(file.try_clone().unwrap(), &index).unwrap();
        drop((store, file));
        assert_eq!(other.bytes(), 1203 * page_size());
        let all = PageRange { start: 0, end: 1 << 40 };
        // SAFETY: the run's bytes are there while the closure runs.
        let read = |key| other.space(key).first_run(all, 1 << 40, |run| (run.range, unsafe { *run.data }));
        let first = PageRange { start: 511 * page_size(), end: 512 * page_size() };
        assert_eq!(read(Key::Process(3)), Some((first, 5)));
        let object = Key::Object(ObjectId { device: 7, inode: 8, sysv: true });
        assert_eq!(read(object), Some((PageRange { start: 0, end: 512 * page_size() }, 6)));
    }

    #[test]
    fn an_empty_store_can_be_handed_over() {
        let (file, index) = PageStore::new().unwrap().hand_over().unwrap();
        PageStore::new().unwrap().adopt(file.try_clone().unwrap(), &index).unwrap();
    }

    #[test]
    fn a_damaged_index_is_refused_or_leads_to_pages_of_the_file() {
        let (file, index) = filled().hand_over().unwrap();
        let adopt = |bytes: &[u8]| {
            let store = PageStore::new().unwrap();
            store.adopt(file.try_clone().unwrap(), bytes).map(|()| store)
        };
        (0..index.len()).for_each(|length| assert!(adopt(&index[..length]).is_err(), "{length} bytes are enough"));
        assert!(adopt(&[&index[..], &[0]].concat()).is_err());
        for at in 0..index.len() {
            for bit in [1, 0x80] {
                let mut damaged = index.clone();
                damaged[at] ^= bit;
                if let Ok(store) = adopt(&damaged) {
                    assert!(store.bytes() <= 2000 * page_size());
                }
            }
        }
        let mut many = index.clone();
        many[4..8].fill(0xff);
        assert!(adopt(&many).is_err());
    }

    #[test]
    fn a_file_that_could_be_cut_is_refused() {
        let (_, index) = filled().hand_over().unwrap();
        let other = crate::sys::mapping::memory_file().unwrap();
        other.set_len(1 << 30).unwrap();
        assert!(PageStore::new().unwrap().adopt(other, &index).is_err());
    }
}
