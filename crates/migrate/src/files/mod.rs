//! Files in rounds: what changed since the last one is sent again, what vanished is removed.
//!
//! A tree (the container's writable layer, or one volume) is walked by [`Scanner`]; entries go over the wire as
//! [`Entry`] with their data and are made anew by [`Writer`]. A change is seen by a file's change time (ctime), which the
//! kernel sets and no program can turn back. Three things a ctime does not show are covered apart: files mapped shared
//! and writable are always looked at in the last round; a file whose ctime is younger than [`CTIME_GRAIN_MS`] at the look is
//! looked at again; a file that changes while it is read is sent again in the next round.
//!
//! A changed file costs its changed blocks on the wire. To find them it is read whole, unless the kernel tells which of
//! its pages were written ([`Following`]).

mod blocks;
mod entry;
mod follow;
mod scan;
mod write;

pub use entry::{Entry, EntryKind};
pub use follow::{Following, MIN_FOLLOWED_BYTES};
pub use scan::{CTIME_GRAIN_MS, ScanError, ScanStats, Scanner, Sink};
pub use write::{WriteError, Writer};

#[cfg(test)]
mod follow_tests;
#[cfg(test)]
mod tests;
