//! What a client saw: the longest silence, and everything else a report says.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Most messages in a report.
const MAX_MESSAGES: usize = 20;

/// Measures the longest time between two arrivals, on the monotonic clock.
#[derive(Debug)]
pub(crate) struct GapMeter {
    last: Instant,
    longest: Duration,
    /// Wall clock at the end of the longest gap, to find it in other logs.
    ended: SystemTime,
}

impl GapMeter {
    pub fn start() -> Self {
        Self { last: Instant::now(), longest: Duration::ZERO, ended: SystemTime::now() }
    }

    /// Something has arrived.
    pub fn arrived(&mut self) {
        let now = Instant::now();
        self.note(now - self.last);
        self.last = now;
    }

    /// Counts a silence that was measured elsewhere.
    pub fn note(&mut self, silence: Duration) {
        if silence > self.longest {
            self.longest = silence;
            self.ended = SystemTime::now();
        }
    }
}

/// The outcome of a client, as one JSON object.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    pub program: String,
    pub connections: u32,
    pub elapsed_ms: f64,
    /// Requests answered; for streams, chunks received.
    pub requests: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// The longest silence on any connection, with a resolution of a microsecond.
    pub client_gap_ms: f64,
    /// When it ended, in milliseconds since 1970.
    pub client_gap_ended_unix_ms: u64,
    /// Connections lost, refused or timed out, and answers that were wrong.
    pub errors: u64,
    /// Connections made again after one was lost.
    pub reconnects: u64,
    /// The first errors in words.
    pub messages: Vec<String>,
    /// HTTP only: of the body, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl Report {
    pub(crate) fn new(program: &str) -> Self {
        Self { program: program.to_owned(), ..Self::default() }
    }

    /// True if no byte was wrong and no connection was lost.
    pub fn ok(&self) -> bool {
        self.errors == 0 && self.reconnects == 0
    }

    pub(crate) fn error(&mut self, message: impl Into<String>) {
        self.errors += 1;
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message.into());
        }
    }

    pub(crate) fn gap(&mut self, meter: &GapMeter) {
        let gap = meter.longest.as_micros() as f64 / 1000.0;
        if gap > self.client_gap_ms {
            self.client_gap_ms = gap;
            self.client_gap_ended_unix_ms = unix_ms(meter.ended);
        }
    }

    /// Adds the outcome of one more connection.
    pub(crate) fn add(&mut self, other: Report) {
        self.connections += other.connections;
        self.requests += other.requests;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.errors += other.errors;
        self.reconnects += other.reconnects;
        if other.client_gap_ms > self.client_gap_ms {
            self.client_gap_ms = other.client_gap_ms;
            self.client_gap_ended_unix_ms = other.client_gap_ended_unix_ms;
        }
        let room = MAX_MESSAGES.saturating_sub(self.messages.len());
        self.messages.extend(other.messages.into_iter().take(room));
    }
}

pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_of_all_connections_counts() {
        let mut meter = GapMeter::start();
        meter.note(Duration::from_micros(2_500));
        meter.note(Duration::from_micros(1_000));
        let mut one = Report::new("x");
        one.gap(&meter);
        let mut all = Report::new("all");
        all.add(one);
        all.add(Report::new("y"));
        assert_eq!(all.client_gap_ms, 2.5);
        assert!(all.ok());
        all.error("no");
        assert!(!all.ok());
    }
}
