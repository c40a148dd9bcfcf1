//! What a client saw: the longest silence, and everything else a report says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Most messages in a report.
const MAX_MESSAGES: usize = 20;
/// Most intervals in a report; what comes after them is not told apart.
const MAX_INTERVALS: usize = 36_000;

/// Measures the longest time between two arrivals, on the monotonic clock.
#[derive(Debug)]
pub(crate) struct GapMeter {
    last: Instant,
    longest: Duration,
    /// Wall clock at the end of the longest gap, to find it in other logs.
    ended: SystemTime,
    /// Length of the intervals that are told apart; 0: none are.
    interval_ms: u64,
    intervals: Vec<Interval>,
}

/// What a client saw in one of many intervals of the same length, for whoever wants to know what it saw at a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Its end, in milliseconds since 1970. It began where the one before it ended, or later where nothing arrived.
    pub until_unix_ms: u64,
    pub arrivals: u64,
    /// The longest silence that ended in it.
    pub client_gap_ms: f64,
}

/// Whether a report tells intervals apart.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct IntervalArgs {
    /// Report arrivals and the longest silence also for each interval of this many milliseconds
    #[arg(long, default_value_t = 0, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=60_000))]
    pub interval_ms: u64,
}

impl GapMeter {
    pub fn start() -> Self {
        let (last, ended) = (Instant::now(), SystemTime::now());
        Self { last, longest: Duration::ZERO, ended, interval_ms: 0, intervals: Vec::new() }
    }

    pub fn with_intervals(args: IntervalArgs) -> Self {
        Self { interval_ms: args.interval_ms, ..Self::start() }
    }

    /// Begins anew: what was before is no silence.
    pub fn restart(&mut self) {
        *self = Self { interval_ms: self.interval_ms, ..Self::start() };
    }

    /// Something has arrived.
    pub fn arrived(&mut self) {
        let now = Instant::now();
        self.note(now - self.last);
        self.last = now;
    }

    /// Counts an arrival after a silence that was measured elsewhere.
    pub fn note(&mut self, silence: Duration) {
        if silence > self.longest {
            self.longest = silence;
            self.ended = SystemTime::now();
        }
        if self.interval_ms > 0 {
            self.note_interval(milliseconds(silence), unix_ms(SystemTime::now()));
        }
    }

    fn note_interval(&mut self, gap_ms: f64, now_ms: u64) {
        let until_unix_ms = (now_ms / self.interval_ms + 1) * self.interval_ms;
        let full = self.intervals.len() >= MAX_INTERVALS;
        match self.intervals.last_mut() {
            Some(last) if last.until_unix_ms >= until_unix_ms || full => {
                last.arrivals += 1;
                last.client_gap_ms = last.client_gap_ms.max(gap_ms);
            }
            _ => self.intervals.push(Interval { until_unix_ms, arrivals: 1, client_gap_ms: gap_ms }),
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
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
    /// In order of time; empty if they were not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub intervals: Vec<Interval>,
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
        self.intervals.clone_from(&meter.intervals);
        let gap = milliseconds(meter.longest);
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
        self.intervals = merged(std::mem::take(&mut self.intervals), other.intervals);
        let room = MAX_MESSAGES.saturating_sub(self.messages.len());
        self.messages.extend(other.messages.into_iter().take(room));
    }
}

/// The intervals of two connections: arrivals of both, the longest silence of either.
fn merged(one: Vec<Interval>, other: Vec<Interval>) -> Vec<Interval> {
    let mut all: BTreeMap<u64, Interval> = one.into_iter().map(|i| (i.until_unix_ms, i)).collect();
    for interval in other {
        all.entry(interval.until_unix_ms)
            .and_modify(|known| {
                known.arrivals += interval.arrivals;
                known.client_gap_ms = known.client_gap_ms.max(interval.client_gap_ms);
            })
            .or_insert(interval);
    }
    all.into_values().collect()
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

    #[test]
    fn intervals_of_several_connections_are_one_row() {
        let row = |gaps: &[(f64, u64)]| {
            let mut meter = GapMeter::with_intervals(IntervalArgs { interval_ms: 100 });
            gaps.iter().for_each(|(gap_ms, now_ms)| meter.note_interval(*gap_ms, *now_ms));
            let mut report = Report::new("x");
            report.gap(&meter);
            report
        };
        let mut all = row(&[(1.0, 1_000), (9.0, 1_250)]);
        all.add(row(&[(3.0, 1_010), (2.0, 1_110)]));
        let seen: Vec<_> = all.intervals.iter().map(|i| (i.until_unix_ms, i.arrivals, i.client_gap_ms)).collect();
        assert_eq!(seen, [(1_100, 2, 3.0), (1_200, 1, 2.0), (1_300, 1, 9.0)]);
    }

    #[test]
    fn a_silence_is_in_the_interval_it_ended_in() {
        let mut meter = GapMeter::with_intervals(IntervalArgs { interval_ms: 100 });
        for (gap_ms, now_ms) in [(1.0, 1_000), (2.0, 1_099), (50.0, 1_100), (700.0, 1_950), (1.0, 1_940)] {
            meter.note_interval(gap_ms, now_ms);
        }
        let seen: Vec<_> = meter.intervals.iter().map(|i| (i.until_unix_ms, i.arrivals, i.client_gap_ms)).collect();
        assert_eq!(seen, [(1_100, 2, 2.0), (1_200, 1, 50.0), (2_000, 2, 700.0)]);
        meter.restart();
        assert!(meter.intervals.is_empty() && meter.interval_ms == 100);
    }
}
