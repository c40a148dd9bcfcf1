//! All shared objects of the processes of a tracker.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::object::{Found, Object, ObjectId, Times};
use super::process::{Process, SharedWrites, is_gone};
use super::{ObjectPages, Round, SharedMapping, Target, TrackError};
use crate::maps::{LeftToCriu, Mapping};
use crate::pages::{PageRange, PageSet};
use crate::sys::pagemap::Scanner;

/// One mapping of an object: which process, where, which part; and how often that process had forked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Use {
    incarnation: u64,
    range: PageRange,
    offset: u64,
    forks: u64,
}

#[derive(Default)]
struct Known {
    sent: PageSet,
    uses: Vec<Use>,
    times: Times,
    /// It was doubtful last time.
    doubtful: bool,
}

/// Collected while the processes are looked at.
struct Seen {
    object: Arc<Object>,
    written: PageSet,
    uses: Vec<Use>,
    /// Not all that was written is known.
    unknown: bool,
}

#[derive(Default)]
pub(super) struct Objects {
    objects: BTreeMap<ObjectId, (Arc<Object>, Known)>,
    seen: BTreeMap<ObjectId, Seen>,
    /// Objects that must be left to CRIU this time.
    left: HashSet<ObjectId>,
    /// All processes of this round.
    pids: Vec<i32>,
    /// Devices that hold no objects of ours: a device has one file system.
    devices: HashMap<u64, LeftToCriu>,
}

impl Objects {
    /// A round over `pids` begins.
    pub(super) fn begin(&mut self, pids: &[i32]) {
        self.pids = pids.to_vec();
    }

    pub(super) fn get(&self, id: ObjectId) -> Option<&Arc<Object>> {
        self.objects.get(&id).map(|(object, _)| object)
    }

    /// Takes up the shared mappings of one process, and what was written through them; without a `scanner` that is not
    /// known.
    pub(super) fn look_at(
        &mut self,
        process: &Process,
        mappings: &[(Mapping, bool)],
        mut scanner: Option<&mut Scanner>,
        target: Target,
        left: &mut Vec<(PageRange, LeftToCriu)>,
    ) -> Result<Vec<SharedMapping>, TrackError> {
        let mut shared = Vec::new();
        for (mapping, locked) in mappings {
            let id = id_of(mapping);
            let object = match self.find(process.pid, mapping)? {
                Some(Found::Object(object)) => Arc::new(object),
                Some(Found::Left(why)) => {
                    left.push((mapping.range, why));
                    continue;
                }
                None => match self.seen.get(&id).map(|s| &s.object).or_else(|| self.get(id)) {
                    Some(object) => Arc::clone(object),
                    None => continue,
                },
            };
            if *locked || object.is_sealed() {
                left.push((mapping.range, if *locked { LeftToCriu::Locked } else { LeftToCriu::Sealed }));
                self.left.insert(id);
            }
            let used = Use {
                incarnation: process.incarnation,
                range: mapping.range,
                offset: mapping.offset,
                forks: process.watched.as_ref().map_or(0, |w| w.forks()),
            };
            let seen = self.seen.entry(id).or_insert_with(|| Seen {
                object,
                written: PageSet::default(),
                uses: Vec::new(),
                unknown: false,
            });
            let written = scanner.as_deref_mut().map(|s| process.written_to_shared(mapping, s, target));
            match written.unwrap_or(SharedWrites::Unknown) {
                SharedWrites::Pages(written) => {
                    let shift = |r: &PageRange| {
                        let start = r.start - mapping.range.start + mapping.offset;
                        PageRange { start, end: start + r.bytes() }
                    };
                    seen.written = seen.written.union(&written.ranges().iter().map(shift).collect());
                }
                SharedWrites::New | SharedWrites::Unknown => seen.unknown = true,
                SharedWrites::None => {}
            }
            seen.uses.push(used);
            shared.push(SharedMapping { range: mapping.range, object: id, offset: mapping.offset });
        }
        Ok(shared)
    }

    /// Opens what is not known yet; `None` for what is, or for a mapping that is gone again.
    fn find(&mut self, pid: i32, mapping: &Mapping) -> Result<Option<Found>, TrackError> {
        let id = id_of(mapping);
        if let Some(why) = self.devices.get(&mapping.device) {
            return Ok(Some(Found::Left(*why)));
        }
        if self.objects.contains_key(&id) || self.seen.contains_key(&id) {
            return Ok(None);
        }
        match Object::open(pid, mapping, &self.pids) {
            Ok(Found::Left(why)) => {
                if matches!(why, LeftToCriu::File | LeftToCriu::HugeTlb) {
                    self.devices.insert(mapping.device, why);
                }
                Ok(Some(Found::Left(why)))
            }
            // Another mapping has taken its place.
            Ok(Found::Object(object)) if object.id != id => Ok(None),
            Ok(found) => Ok(Some(found)),
            Err(source) if is_gone(&source) => Ok(None),
            // Not a file that can be opened: a socket's or a device's mapping.
            Err(_) => Ok(Some(Found::Left(LeftToCriu::Special))),
        }
    }

    /// Decides for every object what is to be sent.
    pub(super) fn round(&mut self, round: &mut Round, target: Target) -> Result<(), TrackError> {
        let seen = std::mem::take(&mut self.seen);
        let left = std::mem::take(&mut self.left);
        for process in &mut round.processes {
            process.shared.retain(|m| !left.contains(&m.object));
        }
        self.objects.retain(|id, _| {
            let kept = seen.contains_key(id) && !left.contains(id);
            if !kept {
                round.dropped.push(*id);
            }
            kept
        });
        for (id, seen) in seen.into_iter().filter(|(id, _)| !left.contains(id)) {
            let failed = |source| TrackError::Object { id, source };
            let reset = !self.objects.contains_key(&id);
            let (object, known) =
                self.objects.entry(id).or_insert_with(|| (Arc::clone(&seen.object), Known::default()));
            let mut uses = seen.uses;
            uses.sort();
            let (used, times) = object.was_used(known.times).map_err(failed)?;
            let changed = used || seen.unknown || uses != known.uses;
            let doubtful = changed || known.doubtful;
            let compared = doubtful && !reset;
            // What holds something takes the kernel 10 ms per GiB to tell. What was written does, and what is gone must be
            // known in the end.
            if target == Target::Running && !doubtful && !reset {
                let size_bytes = object.size().map_err(failed)?;
                let whole: PageSet = PageRange::new(0, size_bytes).into_iter().collect();
                let pages = seen.written.intersection(&whole);
                known.sent = known.sent.union(&pages);
                (known.uses, known.times, known.doubtful) = (uses, times, changed);
                round.objects.push(ObjectPages {
                    id,
                    kind: object.kind,
                    size_bytes,
                    reset,
                    pages,
                    gone: PageSet::default(),
                    compared,
                });
                continue;
            }
            let extents = object.extents().map_err(failed)?;
            let mut pages = seen.written.intersection(&extents);
            if reset {
                pages = extents.clone();
            } else if compared {
                pages = pages.union(&object.differing(&extents).map_err(failed)?);
            }
            let gone = known.sent.difference(&extents);
            known.sent = known.sent.intersection(&extents).union(&pages);
            (known.uses, known.times, known.doubtful) = (uses, times, changed);
            let size_bytes = object.size().map_err(failed)?;
            round.objects.push(ObjectPages { id, kind: object.kind, size_bytes, reset, pages, gone, compared });
        }
        Ok(())
    }
}

/// As [`Object::open`] would say.
fn id_of(mapping: &Mapping) -> ObjectId {
    ObjectId { device: mapping.device, inode: mapping.inode, sysv: mapping.path.starts_with("/SYSV") }
}
