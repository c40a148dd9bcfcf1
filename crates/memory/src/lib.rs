//! The memory of running processes, carried to another host in rounds while they run, so that the time they stand
//! still does not grow with its size. Knows no container and no network; plain threads.
//!
//! ```text
//!   source                                              destination
//!   Tracker::round ─▶ Round ─▶ PageReader ══ pages ══▶  PageStore
//!      (repeat while running; once more frozen)              │
//!   PageFilter ─▶ criu dump leaves those pages out           ▼
//!                                    criu restore ◀──── Filler (lazy-pages.socket, shared memory)
//! ```
//!
//! The filler must live as long as it fills: [`FillerProcess`] and [`serve_filler`] put it into a process of its own.

pub mod bpf;
mod bytes;
mod channel;
mod filler;
mod filter;
mod flags;
mod inject;
mod late;
mod maps;
mod outstanding;
mod pages;
mod process;
mod read;
mod store;
mod sys;
mod tracker;
mod watch;

pub use filler::{FillError, FillReport, Filler, Progress, SharedReport, SharedUse};
pub use filter::{FilterError, PageFilter};
pub use flags::{FlagsError, MappingFlags};
pub use inject::InjectError;
pub use late::{Late, LateFeed, LateWants};
pub use maps::LeftToCriu;
pub use outstanding::Outstanding;
pub use pages::{PageRange, PageSet, is_zero, page_size};
pub use process::{FillerProcess, filler_control, serve_filler};
pub use read::{Content, PageReader, Piece, ReadError};
pub use store::{Key, PageStore, StoreError};
pub use sys::heap::{bound_heap, give_back_freed};
pub use tracker::{
    Means, ObjectId, ObjectKind, ObjectPages, Pause, ProcessPages, Round, SharedMapping, Target, TrackError, Tracker,
    check as check_tracking, inner_pid,
};
pub use watch::{Extents, FileId, FileWatch, MAX_WATCHED_FILES, Place, WatchError, Written};
