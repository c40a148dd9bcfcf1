//! By which means written pages are told on this kernel.

use super::TrackError;
use super::process::Present;
use crate::sys::pagemap::Scanner;
use crate::sys::softdirty::{self, PageMap};
use crate::sys::uffd::{FEATURE_EVENT_FORK, FEATURE_WP_ASYNC, Userfaultfd};

/// How written pages are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Means {
    /// userfaultfd's write protection and PAGEMAP_SCAN; nobody stands still for it.
    Protection,
    /// Soft-dirty bits; all processes stand still for a moment in each round.
    SoftDirty,
}

impl std::fmt::Display for Means {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Protection => "userfaultfd WP_ASYNC, PAGEMAP_SCAN",
            Self::SoftDirty => "soft-dirty bits",
        })
    }
}

pub(super) enum Look {
    Protection { scanner: Scanner, present: Present },
    SoftDirty { map: PageMap },
    Everything { map: PageMap },
}

/// By which means this kernel can tell written pages of running processes, tried on this one. Starts no thread.
pub fn check() -> Result<Means, TrackError> {
    Look::choose().map(|(_, means)| means)
}

impl Look {
    /// The first that works. Both halves of protection are tried: PAGEMAP_SCAN, and write protection that waits for
    /// nobody, which not every architecture has.
    pub(super) fn choose() -> Result<(Self, Means), TrackError> {
        let protects = |uffd: Userfaultfd| uffd.enable(FEATURE_WP_ASYNC | FEATURE_EVENT_FORK);
        let protection = match Userfaultfd::of_this_process().and_then(protects).and_then(|()| Present::new()) {
            Ok(present) => return Ok((Self::Protection { scanner: Scanner::new(), present }, Means::Protection)),
            Err(error) => error,
        };
        let map = softdirty::check().and_then(|()| PageMap::new());
        let map = map.map_err(|marks| TrackError::Kernel { protection, marks })?;
        if softdirty::are_pages_merged() {
            return Err(TrackError::Merging);
        }
        Ok((Self::SoftDirty { map }, Means::SoftDirty))
    }

    /// For processes that stand still. Needs no more of the kernel than `/proc/PID/pagemap`.
    pub(super) fn everything() -> Result<Self, TrackError> {
        Ok(Self::Everything { map: PageMap::new().map_err(TrackError::PageMap)? })
    }

    /// What a process's userfaultfd must be able to do.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Protection { .. } => FEATURE_WP_ASYNC | FEATURE_EVENT_FORK,
            Self::SoftDirty { .. } | Self::Everything { .. } => FEATURE_EVENT_FORK,
        }
    }
}
