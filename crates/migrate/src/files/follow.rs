//! Files whose written pages the kernel tells: what of them has to be read again.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use godwit_memory::{Extents, FileId, FileWatch, Place, WatchError, Written};

use super::blocks::BLOCK_BYTES;

/// A smaller file is read whole: that takes no longer than asking what changed in it. In bytes.
pub const MIN_FOLLOWED_BYTES: u64 = 256 << 10;

/// The kernel's word on written pages, for one round.
pub struct Following<'a> {
    watch: &'a mut FileWatch,
    /// Nobody writes any more: what is not followed by now need not be.
    frozen: bool,
}

impl<'a> Following<'a> {
    /// Begins a round with what was told up to now.
    pub fn begin(watch: &'a mut FileWatch, frozen: bool) -> Result<Self, WatchError> {
        watch.take()?;
        if !frozen {
            watch.settle();
        }
        Ok(Self { watch, frozen })
    }

    /// The same round goes on in another tree.
    pub fn go_on(watch: &'a mut FileWatch, frozen: bool) -> Self {
        Self { watch, frozen }
    }

    /// Whether files in this directory can be followed.
    pub(super) fn place(&mut self, directory: &std::path::Path) -> Result<Place, WatchError> {
        self.watch.place(directory)
    }

    pub(super) fn has_written(&self, followed: &Followed) -> bool {
        self.watch.has_written(followed.id)
    }

    pub(super) fn forget(&mut self, followed: &Followed) {
        self.watch.forget(followed.id);
    }

    /// What of `file` may differ from what was read last, in order; `None`: all of it. It is followed from now on, if it
    /// can be. `alive` is called while the disk takes its time; `false` from it says that nobody waits any more.
    pub(super) fn parts(
        &mut self,
        followed: &mut Option<Followed>,
        place: Option<Place>,
        file: &File,
        meta: &Metadata,
        alive: &mut dyn FnMut() -> bool,
    ) -> Option<Vec<Range<u64>>> {
        if let Some(known) = followed {
            if self.watch.is_watched(known.id) && known.is(file, meta) {
                return known.changed(self, file, meta.size(), alive);
            }
            self.watch.forget(known.id);
        }
        *followed =
            place.filter(|_| !self.frozen).and_then(|place| Followed::begin(self.watch, place, file, meta, alive));
        None
    }
}

/// One file, as it was when it was last read.
#[derive(Debug)]
pub(super) struct Followed {
    id: FileId,
    inode: u64,
    size: u64,
    extents: Extents,
    /// It was written back before it was read. Where that failed pages are dirty still, and not told again.
    clean: bool,
}

impl Followed {
    /// From here on nothing that is written to `file` stays unknown: it is to be read whole after this.
    fn begin(
        watch: &mut FileWatch,
        place: Place,
        file: &File,
        meta: &Metadata,
        alive: &mut dyn FnMut() -> bool,
    ) -> Option<Self> {
        if meta.size() < MIN_FOLLOWED_BYTES || file.metadata().ok()?.ino() != meta.ino() {
            return None;
        }
        let id = watch.watch(file, place).ok()??;
        let extents = watch.write_back(file, meta.size(), alive).and_then(|()| Extents::of(file));
        match extents {
            Ok(extents) => Some(Self { id, inode: meta.ino(), size: meta.size(), extents, clean: true }),
            Err(error) => {
                tracing::debug!(inode = meta.ino(), %error, "a file is not followed");
                watch.forget(id);
                None
            }
        }
    }

    /// Whether it is still this one: in the directory, and opened. A successor that got the same number has had
    /// everything in it told as written.
    fn is(&self, file: &File, meta: &Metadata) -> bool {
        self.inode == meta.ino() && file.metadata().is_ok_and(|opened| opened.ino() == self.inode)
    }

    fn changed(
        &mut self,
        following: &mut Following<'_>,
        file: &File,
        size: u64,
        alive: &mut dyn FnMut() -> bool,
    ) -> Option<Vec<Range<u64>>> {
        let written = following.watch.written(self.id);
        let before = std::mem::replace(&mut self.size, size);
        // Clean from here on: what is written after this is told again. Frozen, nothing is.
        let now = following.frozen || following.watch.write_back(file, size.max(before), alive).is_ok();
        let clean = std::mem::replace(&mut self.clean, now) && now;
        let extents = Extents::of(file).unwrap_or_default();
        // Where the look failed everything that was somewhere is elsewhere.
        let elsewhere = extents.differing(&self.extents);
        self.extents = extents;
        let Written::Parts(mut parts) = written else { return None };
        if !clean || size < MIN_FOLLOWED_BYTES {
            return None;
        }
        // File systems zero what is left of a block at an edge.
        parts.extend(elsewhere.into_iter().map(|r| r.start.saturating_sub(1)..r.end.saturating_add(1)));
        // So they do where the file ended, and what is new may be a hole.
        let (shorter, longer) = (before.min(size), before.max(size));
        parts.push(shorter.saturating_sub(1)..longer);
        Some(join(parts, size))
    }
}

/// Whole blocks up to `size`, in order and apart from each other.
fn join(mut parts: Vec<Range<u64>>, size: u64) -> Vec<Range<u64>> {
    parts.retain(|part| part.start < part.end.min(size));
    for part in &mut parts {
        part.start -= part.start % BLOCK_BYTES;
        part.end = part.end.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX).min(size);
    }
    parts.sort_unstable_by_key(|part| part.start);
    parts.dedup_by(|next, kept| {
        let touches = next.start <= kept.end;
        if touches {
            kept.end = kept.end.max(next.end);
        }
        touches
    });
    parts
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a range is what is meant")]
mod tests {
    use super::join;

    #[test]
    fn parts_are_whole_blocks_within_the_file() {
        let parts = vec![9000..9001, 0..1, 4096..8192, 50_000..u64::MAX, 60_000..61_000, 20_000..20_000];
        assert_eq!(join(parts, 55_000), [0..12_288, 49_152..55_000]);
        assert_eq!(join(vec![0..10, 8192..8193], 8192), [0..4096]);
    }
}
