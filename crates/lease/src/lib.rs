//! How long a host may run what it owns, and when somebody else may start it. Both sides' bookkeeping; no I/O, no clock.
//!
//! ```text
//! host (Holder)                                controller (Book)
//!   ── Beat, every 2 s ───────────────────────▶  what the host holds, told by itself
//!   ◀── Grant: LEASE_MS from when that was sent ─
//!   … cut off: the lease ends, everything here stands still …
//!                                              LEASE_MS + MARGIN_MS after the last grant: lost
//! ```
//! A lease counts from the moment at which its holder *asked*, by the holder's own clock, so it ends before the controller
//! thinks that it does. No two clocks are compared; only their rates count, and those differ by far less than the margin.
//!
//! **When the controller is away** nobody can start anything elsewhere, and hosts shall go on. But a host that is cut off
//! sees the same silence. So it asks its witnesses, a few hosts that both sides agreed on. Whoever has no controller
//! either vouches for that, and from then on counts for the controller as one that was away (`held_ms` starts anew). A host
//! goes on while a majority vouches; the controller calls a host lost only if a majority has held its lease without a
//! gap for [`LEASE_MS`] and [`MARGIN_MS`], and still holds it. Two majorities share a member. It vouched [`UNLINKED_MS`] or
//! longer after its last grant; so either its lease ended, by which the controller would know it, before the other's
//! margin did, or it counts as away for longer than what it vouched for lasts. `tests/partitions.rs` tries to break this with seeds.
//!
//! The lease of Gray and Cheriton (SOSP 1989), with the clients' agreement in place of a replicated server.
#![forbid(unsafe_code)]

mod book;
mod holder;

use std::net::SocketAddr;

use godwit_model::HostName;
use serde::{Deserialize, Serialize};

pub use book::{Book, Held};
pub use holder::Holder;

/// How long a grant is good, in milliseconds from when it was asked for.
pub const LEASE_MS: u64 = 10_000;
/// From the end of a lease until others may start what its holder had, in milliseconds: for clocks that run at different
/// rates, and for the holder to come to a standstill.
pub const MARGIN_MS: u64 = 5_000;
/// A host without a grant for so long, in milliseconds, has no controller. Not less than [`MARGIN_MS`]: see above.
pub const UNLINKED_MS: u64 = 5_000;
/// Answers of witnesses are waited for so long, in milliseconds.
pub const VOUCH_TIMEOUT_MS: u64 = 1_500;
/// A witness's lease has to last so much longer than the controller counts on, in milliseconds.
const SLACK_MS: u64 = 1_000;
/// The most witnesses.
pub const MAX_WITNESSES: usize = 7;

/// A host that is asked whether it has a controller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Witness {
    pub host: HostName,
    /// Where its agent answers other agents.
    pub address: SocketAddr,
}

/// A host asks for its lease to go on, and says what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// By the host's clock, in milliseconds since it started.
    pub sent_ms: u64,
    /// The last grant that it got.
    pub grant: Option<Echo>,
    /// It has held a granted lease so long without a gap, and without vouching for the controller's absence, in milliseconds.
    pub held_ms: u64,
    /// What is left of the granted lease, in milliseconds.
    pub left_ms: u64,
    /// Whom it would ask.
    pub witnesses: Vec<HostName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echo {
    pub number: u64,
    /// Milliseconds since it came.
    pub since_ms: u64,
}

/// The answer to a [`Beat`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub number: u64,
    /// [`Beat::sent_ms`] of what is answered.
    pub beat_ms: u64,
    pub for_ms: u64,
    /// Empty: no other host could start anything, and the lease does not end.
    pub witnesses: Vec<Witness>,
    /// The host was told what it shall be as of this revision of the store. One whose lease had ended knows what it still
    /// owns when it has carried that out.
    pub revision: u64,
}

/// Whom hosts ask, from all hosts that have leases, in the order of their age: an odd number where there are three or
/// more, so that every loss that leaves a majority is survived. Two hosts need the controller's vote to be a majority,
/// and one host has nobody who could start what it has.
pub fn choose_witnesses(hosts: &[HostName]) -> &[HostName] {
    let count = match hosts.len().min(MAX_WITNESSES) {
        0 | 1 => 0,
        2 => 2,
        n => n - (n + 1) % 2,
    };
    &hosts[..count]
}

/// Whether so many of the witnesses are a majority. Of an even number the controller makes an odd one; it cannot vouch
/// for its own absence, so that the same number of hosts is needed for either, less its vote.
fn majority(witnesses: usize, votes: usize) -> bool {
    votes * 2 > (witnesses | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn witnesses_are_an_odd_number_or_two() {
        let hosts: Vec<HostName> = (1..=9).map(|n| HostName::new(format!("h{n}")).unwrap()).collect();
        let counts: Vec<usize> = (0..=9).map(|n| choose_witnesses(&hosts[..n]).len()).collect();
        assert_eq!(counts, [0, 0, 2, 3, 3, 5, 5, 7, 7, 7]);
        assert!(!majority(2, 1) && majority(2, 2));
        assert!(!majority(3, 1) && majority(3, 2));
        assert!(!majority(5, 2) && majority(5, 3));
    }
}
