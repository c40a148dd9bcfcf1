//! What a sequence of steps took, for the log.

use std::fmt;
use std::time::Instant;

/// Milliseconds of named steps, one after the other.
pub struct Laps {
    last: Instant,
    steps: Vec<(&'static str, f64)>,
}

impl Default for Laps {
    fn default() -> Self {
        Self { last: Instant::now(), steps: Vec::new() }
    }
}

impl Laps {
    /// A step is over.
    pub fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.steps.push((name, (now - self.last).as_secs_f64() * 1e3));
        self.last = now;
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|(name, ms)| write!(f, "{name} {ms:.1} ms; "))
    }
}
