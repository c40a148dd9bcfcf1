//! A fleet of simulated hosts that lives through failures, growth and evacuations by the same plans as a real one.
//!
//! ```text
//! clock ─▶ event ─▶ hosts (what really runs where) ─▶ witness: never two, never none too long
//!              └──▶ controller (what is decided: godwit_plan on a Fleet) ─▶ rules: kept on every host it touched
//! ```
//! Time is virtual and chance comes from one seed, so the same [`Settings`] give the same [`Summary`] to the last
//! byte. After every event everything that it touched is judged by counting anew; a promise that is broken ends the
//! simulation with [`Broken`], which names the moment.
//!
//! Absent: networks, programs, bytes. A host is up, down or cut off; a move takes its estimated time and may fail.
#![forbid(unsafe_code)]

mod clock;
mod controller;
mod courses;
mod fleet;
mod happenings;
mod judge;
mod summary;
mod witness;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use summary::{Hour, Summary};

/// What is simulated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// At least 1 is taken.
    pub hosts: u32,
    /// At the beginning; their number changes by a little.
    pub containers: u32,
    pub seed: u64,
    /// Virtual time with failures; then failures end and the fleet gets time to settle, [`SETTLE_HOURS`].
    pub hours: u32,
}

/// How long a fleet may take to put everything right after the last failure, in virtual hours.
pub const SETTLE_HOURS: u32 = 6;

/// How long a container may be down after its host has failed, if there is room for it, in virtual milliseconds.
pub const MOST_DOWN_MS: u64 = 30_000;

/// A promise was broken. The moment is in virtual milliseconds from the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Broken {
    #[error("at {at_ms} ms: {container} runs on {first} and on {second}")]
    TwoCopies { at_ms: u64, container: String, first: String, second: String },
    #[error("at {at_ms} ms: {container} has been down for {down_ms} ms; {MOST_DOWN_MS} is the most")]
    DownTooLong { at_ms: u64, container: String, down_ms: u64 },
    #[error("at {at_ms} ms: a rule is broken on {host}: {what}")]
    Rule { at_ms: u64, host: String, what: String },
    #[error("at {at_ms} ms: {container} was moved from {to} to {from} and back to {to}")]
    Flap { at_ms: u64, container: String, from: String, to: String },
    #[error("at {at_ms} ms: {host} was declared dead and still runs {containers} containers")]
    FencedLate { at_ms: u64, host: String, containers: usize },
    #[error("{SETTLE_HOURS} hours after the last failure: {what}")]
    Unsettled { what: String },
    #[error("at {at_ms} ms: the simulation contradicts itself: {what}")]
    Simulation { at_ms: u64, what: String },
}

/// Simulates; `each_hour` is told after every virtual hour.
pub fn run(settings: &Settings, each_hour: impl FnMut(&Hour)) -> Result<Summary, Broken> {
    controller::Sim::new(settings).live(each_hour)
}
