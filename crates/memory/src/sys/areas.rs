//! Small mappings of this process with every flag that a mapping of another may have, to see what this kernel calls them.

use std::io;
use std::ptr::NonNull;

use nix::libc;

use super::uffd::{Mode, Userfaultfd};
use crate::pages::{PageRange, page_size};

/// Flags of mmap(2) that libc does not know on every architecture: `MAP_DROPPABLE` is a type like `MAP_PRIVATE`.
const DROPPABLE: i32 = 0x08;
/// `MADV_GUARD_INSTALL`, kernel ≥ 6.13.
const GUARD_INSTALL: i32 = 102;
/// Where /proc/meminfo does not tell it.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A mapping that nobody uses.
struct Area {
    base: NonNull<libc::c_void>,
    bytes: usize,
}

impl Area {
    fn new(bytes: usize, protection: i32, flags: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags | libc::MAP_ANONYMOUS, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, bytes })
    }

    fn advise(self, advice: i32) -> io::Result<Self> {
        // SAFETY: the mapping is ours alone, and nothing in it is used.
        let result = unsafe { libc::madvise(self.base.as_ptr(), self.bytes, advice) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(self) }
    }

    fn lock(self, flags: u32) -> io::Result<Self> {
        // SAFETY: the mapping is ours alone; locking changes no content.
        let result = unsafe { libc::mlock2(self.base.as_ptr(), self.bytes, flags) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(self) }
    }

    fn range(&self) -> PageRange {
        let start = self.base.as_ptr() as u64;
        PageRange { start, end: start + self.bytes as u64 }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping and nothing borrows from it.
        unsafe { libc::munmap(self.base.as_ptr(), self.bytes) };
    }
}

/// All of them, until this is dropped.
pub(crate) struct Areas {
    _watches: Vec<Userfaultfd>,
    _areas: Vec<Area>,
}

/// Maps what this kernel and processor have; the rest is left out. Nothing stays of them but, where KSM runs, this
/// process in its list for a while. Sealed mappings (mseal(2)) are not among them: they could not be taken away again.
pub(crate) fn with_every_flag() -> Areas {
    let (page, private) = (page_size() as usize, libc::MAP_PRIVATE);
    let ordinary = libc::PROT_READ | libc::PROT_WRITE;
    let advised = [
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_MERGEABLE,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        GUARD_INSTALL,
    ];
    let mut areas: Vec<Area> =
        advised.into_iter().filter_map(|advice| Area::new(page, ordinary, private).ok()?.advise(advice).ok()).collect();
    let mapped = [
        (page, libc::PROT_NONE, private),
        (page, libc::PROT_READ | libc::PROT_EXEC, private),
        (page, ordinary, libc::MAP_SHARED),
        (page, ordinary, private | libc::MAP_NORESERVE),
        (page, ordinary, private | libc::MAP_GROWSDOWN),
        (page, ordinary, DROPPABLE),
        (huge_page_bytes(), ordinary, private | libc::MAP_NORESERVE | libc::MAP_HUGETLB),
    ];
    areas.extend(mapped.into_iter().filter_map(|(bytes, protection, flags)| Area::new(bytes, protection, flags).ok()));
    // PROT_BTI and PROT_MTE.
    #[cfg(target_arch = "aarch64")]
    areas.extend([0x10, 0x20].into_iter().filter_map(|more| Area::new(page, ordinary | more, private).ok()));
    areas.extend(
        [0, libc::MLOCK_ONFAULT].into_iter().filter_map(|f| Area::new(page, ordinary, private).ok()?.lock(f).ok()),
    );
    areas.extend(shadow_stack());
    let mut watches = Vec::new();
    for mode in [Mode::Missing, Mode::WriteProtect] {
        let (Ok(area), Ok(watch)) = (Area::new(page, ordinary, private), Userfaultfd::of_this_process()) else {
            continue;
        };
        if watch.enable(0).and_then(|()| watch.register(area.range(), mode)).is_ok() {
            areas.push(area);
            watches.push(watch);
        }
    }
    Areas { _watches: watches, _areas: areas }
}

fn huge_page_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|l| l.strip_prefix("Hugepagesize:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    kib.map_or(HUGE_PAGE_BYTES, |kib| kib << 10)
}

#[cfg(target_arch = "x86_64")]
fn shadow_stack() -> Option<Area> {
    /// map_shadow_stack(2).
    const MAP_SHADOW_STACK: libc::c_long = 453;
    let bytes = page_size() as usize;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory; no thread uses it.
    let base = unsafe { libc::syscall(MAP_SHADOW_STACK, 0, bytes, 0) };
    // Addresses are positive numbers; -1 is an error.
    let base = usize::try_from(base).ok()?;
    Some(Area { base: NonNull::new(std::ptr::with_exposed_provenance_mut(base))?, bytes })
}

#[cfg(not(target_arch = "x86_64"))]
fn shadow_stack() -> Option<Area> {
    None
}
