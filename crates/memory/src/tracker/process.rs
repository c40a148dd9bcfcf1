//! One process: its mappings, its tracking, and which of its pages are to be sent.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::time::Duration;

use nix::libc;

use super::forks::{ForkWatch, Watched};
use super::{MAX_MAPPINGS, Target, TrackError};
use crate::inject::{self, InjectError};
use crate::maps::{self, Class, Flags, LeftToCriu, Mapping};
use crate::pages::{PageRange, PageSet, page_size};
use crate::sys::pagemap::{self, Scanner, Wanted};
use crate::sys::uffd::Mode;

/// A process as long as it has this address space; exec(2) ends it.
pub(super) struct Process {
    pub pid: i32,
    /// Its number in its own pid namespace.
    pub inner_pid: i32,
    /// Differs from that of every other process this tracker has seen.
    pub incarnation: u64,
    pub watched: Option<Watched>,
    /// All three stay with the address space they were opened for: afterwards they show nothing.
    maps: File,
    pub(super) pagemap: File,
    /// Given out as to be sent, and still there when that was last asked.
    sent: PageSet,
    /// Pages given out since then.
    sent_since_look: u64,
}

/// The part of what was sent, one in so many pages, after which it is asked again what of it is still there: a program that
/// goes through much memory and gives it back must not leave all of it at the destination.
const LOOK_AGAIN: u64 = 4;

/// What a look at `/proc/PID/maps` gives.
pub(super) struct Layout {
    /// Private anonymous mappings.
    pub private: Vec<PageRange>,
    /// Shared mappings, perhaps of objects we carry, and whether they are locked.
    pub shared: Vec<(Mapping, bool)>,
    pub left: Vec<(PageRange, LeftToCriu)>,
    pub all: Vec<Mapping>,
}

/// What changed in private memory.
pub(super) struct Changes {
    pub pages: PageSet,
    pub gone: PageSet,
}

/// What was written through a shared mapping.
pub(super) enum SharedWrites {
    Pages(PageSet),
    /// Tracking begins now.
    New,
    /// It cannot be written through.
    None,
    /// It cannot be tracked.
    Unknown,
}

/// Which pages hold something: not those of the shared page of zeroes.
pub(super) struct Present {
    wanted: Wanted,
}

impl Present {
    /// As this kernel can tell it.
    pub(super) fn new() -> io::Result<Self> {
        let own = File::open("/proc/self/pagemap")?;
        let any = pagemap::PRESENT | pagemap::SWAPPED;
        let range = PageRange { start: crate::pages::page_size(), end: 2 * crate::pages::page_size() };
        let with_guards = Wanted { with: 0, any, without: pagemap::ZERO | pagemap::GUARD };
        let without_guards = Wanted { with: 0, any, without: pagemap::ZERO };
        let mut found = PageSet::default();
        if Scanner::new().scan(&own, range, with_guards, 0, &mut found).is_ok() {
            return Ok(Self { wanted: with_guards });
        }
        Scanner::new().scan(&own, range, without_guards, 0, &mut found)?;
        Ok(Self { wanted: without_guards })
    }

    fn written(&self) -> Wanted {
        Wanted { with: pagemap::WRITTEN, ..self.wanted }
    }
}

impl Process {
    /// Opens process `pid`; it is not tracked yet.
    pub(super) fn open(pid: i32, incarnation: u64) -> Result<Self, TrackError> {
        let open = |name: &str| File::open(format!("/proc/{pid}/{name}"));
        let maps = open("maps").map_err(|source| TrackError::Process { pid, source })?;
        let pagemap = open("pagemap").map_err(|source| TrackError::Process { pid, source })?;
        let inner_pid = inner_pid(pid).unwrap_or(pid);
        Ok(Self {
            pid,
            inner_pid,
            incarnation,
            watched: None,
            maps,
            pagemap,
            sent: PageSet::default(),
            sent_since_look: 0,
        })
    }

    /// Begins tracking; how long one thread of the process stood still for it.
    pub(super) fn arm(
        &mut self,
        mappings: &[Mapping],
        features: u64,
        forks: &mut ForkWatch,
    ) -> Result<Duration, InjectError> {
        let pid = self.pid;
        let kernel = |source| InjectError::Kernel { doing: "tracking", pid, source };
        let (uffd, stopped) = inject::userfaultfd(pid, mappings)?;
        uffd.enable(features).map_err(kernel)?;
        self.watched = Some(forks.watch(uffd).map_err(kernel)?);
        Ok(stopped)
    }

    /// The mappings now; `None` when this address space is gone.
    pub(super) fn layout(&mut self) -> Result<Option<Layout>, TrackError> {
        let pid = self.pid;
        let mut text = String::new();
        self.maps
            .rewind()
            .and_then(|()| self.maps.read_to_string(&mut text))
            .map_err(|source| TrackError::Process { pid, source })?;
        let all = maps::parse_maps(&text);
        if all.is_empty() {
            return Ok(None);
        }
        if all.len() > MAX_MAPPINGS {
            return Err(TrackError::TooManyMappings { pid });
        }
        // VmFlags cost a walk through all page tables. What they could tell about memory that maps shows as ordinary
        // is known from status: nothing is locked, no thread has a shadow stack.
        let Some(status) = status(pid) else { return Ok(None) };
        let flagged = if status.locked || status.shadow_stacks {
            let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"));
            maps::parse_smaps(&smaps.map_err(|source| TrackError::Process { pid, source })?)
        } else {
            all.iter().map(|m| (m.clone(), Flags::default())).collect()
        };
        let mut layout = Layout { private: Vec::new(), shared: Vec::new(), left: Vec::new(), all };
        for (mapping, flags) in flagged {
            match mapping.class(flags) {
                Class::Private => layout.private.push(mapping.range),
                Class::Shared => layout.shared.push((mapping, flags.locked)),
                Class::Left(why) => layout.left.push((mapping.range, why)),
            }
        }
        Ok(Some(layout))
    }

    /// Which private pages are to be sent, and which of those sent are gone. Write-protects what it tells while the
    /// process runs; of one that stands still it is told the next time, too.
    ///
    /// To tell what is there costs the kernel much more than to tell what was written, and only the last look must know
    /// what is gone: while the process runs, it is asked when a part of [`LOOK_AGAIN`] was sent since.
    pub(super) fn changes(
        &mut self,
        private: &[PageRange],
        scanner: &mut Scanner,
        present: &Present,
        target: Target,
    ) -> Result<Changes, TrackError> {
        let pid = self.pid;
        let everything = target == Target::Frozen || self.sent_since_look * LOOK_AGAIN >= self.sent.pages();
        let (mut dirty, mut there) = (PageSet::default(), PageSet::default());
        for range in private {
            if target == Target::Frozen
                && self.watched.is_some()
                && self.frozen(*range, scanner, present, &mut there, &mut dirty).is_ok()
            {
                continue;
            }
            self.written(*range, scanner, present, target)?.ranges().iter().for_each(|r| dirty.push(*r));
            if everything {
                self.scan(*range, scanner, present.wanted, 0, &mut there)
                    .map_err(|source| TrackError::Process { pid, source })?;
            } else {
                there.push(*range);
            }
        }
        let changes = self.changed(dirty.intersection(&there), &there);
        self.sent_since_look = if everything { 0 } else { self.sent_since_look + changes.pages.pages() };
        Ok(changes)
    }

    /// `pages` are to be sent, of all that is `there`.
    pub(super) fn changed(&mut self, pages: PageSet, there: &PageSet) -> Changes {
        let gone = self.sent.difference(there);
        self.sent = self.sent.intersection(there).union(&pages);
        Changes { pages, gone }
    }

    /// The look at a private mapping of a process that stands still, in one walk; an error where it is not tracked, with
    /// nothing told.
    fn frozen(
        &self,
        range: PageRange,
        scanner: &mut Scanner,
        present: &Present,
        there: &mut PageSet,
        dirty: &mut PageSet,
    ) -> io::Result<()> {
        let (mut found, mut written) = (PageSet::default(), PageSet::default());
        let flags = pagemap::CHECK_WPASYNC;
        scanner.scan_written(&self.pagemap, range, present.wanted, flags, &mut found, &mut written)?;
        found.ranges().iter().for_each(|r| there.push(*r));
        written.ranges().iter().for_each(|r| dirty.push(*r));
        Ok(())
    }

    /// The pages of a mapping of shared memory that were written through it since the last look. Write-protects them
    /// while the process runs; of one that stands still they count as written the next time, too.
    ///
    /// Here an empty page table entry says nothing: written memory can be taken out of the page table while its content
    /// stays (MADV_DONTNEED, swapping), the table itself with it. So every entry is write-protected, empty ones by a
    /// marker, and what is not found protected counts as written.
    pub(super) fn written_to_shared(&self, mapping: &Mapping, scanner: &mut Scanner, target: Target) -> SharedWrites {
        let Some(watched) = &self.watched else { return SharedWrites::Unknown };
        let range = mapping.range;
        let protect = if target == Target::Running { pagemap::WP_MATCHING } else { 0 };
        let mut written = PageSet::default();
        let flags = protect | pagemap::CHECK_WPASYNC;
        if scanner.scan_unprotected(&self.pagemap, range, flags, &mut written).is_err() {
            if watched.uffd.register(range, Mode::WriteProtect).is_err() {
                return if self.is_read_only(range) { SharedWrites::None } else { SharedWrites::Unknown };
            }
            return match watched.uffd.write_protect(range) {
                Ok(()) => SharedWrites::New,
                Err(_) => SharedWrites::Unknown,
            };
        }
        let Ok(lost) = self.without_table(range, scanner, &written) else { return SharedWrites::Unknown };
        if target == Target::Running && lost.ranges().iter().any(|r| watched.uffd.write_protect(*r).is_err()) {
            return SharedWrites::Unknown;
        }
        SharedWrites::Pages(written.union(&lost))
    }

    /// The parts of a tracked mapping that have no page table any more, so that nothing of them is told; also parts whose
    /// first page was written only now. One page of each part that has nothing in `written` tells.
    fn without_table(&self, range: PageRange, scanner: &mut Scanner, written: &PageSet) -> io::Result<PageSet> {
        let any = pagemap::PRESENT | pagemap::SWAPPED;
        let protected = Wanted { with: 0, any, without: pagemap::WRITTEN };
        let (page, mut lost) = (page_size(), PageSet::default());
        // What one page table of the lowest level covers; its entries have 8 bytes.
        let covered = page * (page / 8);
        let mut told = written.ranges().iter().peekable();
        let mut start = range.start;
        while start < range.end {
            let end = (start - start % covered + covered).min(range.end);
            while told.next_if(|r| r.end <= start).is_some() {}
            if told.peek().is_none_or(|r| r.start >= end) {
                let mut found = PageSet::default();
                let first = PageRange { start, end: start + page };
                scanner.scan(&self.pagemap, first, protected, pagemap::CHECK_WPASYNC, &mut found)?;
                if found.is_empty() {
                    lost.push(PageRange { start, end });
                }
            }
            start = end;
        }
        Ok(lost)
    }

    /// Whether a shared mapping is one that can never be written through.
    fn is_read_only(&self, range: PageRange) -> bool {
        let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, range.start, range.end);
        // The link has the mode in which the mapped file was opened.
        std::fs::symlink_metadata(path).is_ok_and(|m| std::os::unix::fs::MetadataExt::mode(&m) & 0o200 == 0)
    }

    /// The pages of a private mapping that were written since the last look, all that are there if it is new or cannot
    /// be tracked.
    fn written(
        &self,
        range: PageRange,
        scanner: &mut Scanner,
        present: &Present,
        target: Target,
    ) -> Result<PageSet, TrackError> {
        let failed = |source| TrackError::Process { pid: self.pid, source };
        let mut found = PageSet::default();
        let protect = if target == Target::Running { pagemap::WP_MATCHING } else { 0 };
        let tracked = protect | pagemap::CHECK_WPASYNC;
        if let Some(watched) = &self.watched {
            if self.scan(range, scanner, present.written(), tracked, &mut found).is_ok() {
                return Ok(found);
            }
            // New, or partly new. Marks that a page has from another place it was mapped at, or that the failed look
            // has just made, say nothing: everything there counts.
            found = PageSet::default();
            let registered = watched.uffd.register(range, Mode::WriteProtect).is_ok();
            if registered && self.scan(range, scanner, present.wanted, tracked, &mut found).is_ok() {
                return Ok(found);
            }
            found = PageSet::default();
        }
        self.scan(range, scanner, present.wanted, 0, &mut found).map_err(failed)?;
        Ok(found)
    }

    fn scan(
        &self,
        range: PageRange,
        scanner: &mut Scanner,
        wanted: Wanted,
        flags: u64,
        found: &mut PageSet,
    ) -> io::Result<()> {
        scanner.scan(&self.pagemap, range, wanted, flags, found)
    }

    /// Whether this address space is still in use.
    pub(super) fn is_alive(&mut self) -> bool {
        let mut byte = [0];
        self.maps.rewind().and_then(|()| self.maps.read(&mut byte)).is_ok_and(|n| n == 1)
    }
}

/// A process's number in its own pid namespace (NSpid in proc_pid_status(5)), the one that CRIU uses; `None` if it is gone.
pub fn inner_pid(pid: i32) -> Option<i32> {
    status(pid)?.inner_pid
}

struct Status {
    inner_pid: Option<i32>,
    locked: bool,
    shadow_stacks: bool,
}

fn status(pid: i32) -> Option<Status> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    Some(Status {
        inner_pid: field("NSpid:").and_then(|v| v.split_ascii_whitespace().last()?.parse().ok()),
        locked: field("VmLck:").is_some_and(|v| v != "0 kB"),
        shadow_stacks: field("x86_Thread_features:").is_some_and(|v| v.contains("shstk")),
    })
}

/// Whether an error of the operating system says that a process is gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
