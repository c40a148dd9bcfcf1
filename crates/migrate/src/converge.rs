//! When to stop copying and freeze: pure arithmetic on what the rounds so far have shown.

/// Expected time for the last pages that is short enough to freeze at once, in milliseconds.
pub const AIM_MS: f64 = 5.0;
/// What CRIU writes besides memory, in bytes (docs/migration-performance.md); a thousand processes have more.
const IMAGES_BYTES: f64 = 1.4e6;
/// Rounds of memory while the container runs, at the most.
pub const MAX_ROUNDS: u32 = 30;
/// A round that leaves more than this share of what the one before left does not get anywhere.
const STUCK: f64 = 0.8;
/// Rounds in a row that get nowhere before copying stops.
const STUCK_ROUNDS: u32 = 2;

/// One round, as measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Pages that were told as written since the look before, and of files what was sent, in bytes.
    pub dirty_bytes: u64,
    /// Bytes of it that were sent.
    pub sent_bytes: u64,
    /// From the look before to this one, in seconds; `None` for the first, which tells everything.
    pub since_last_s: Option<f64>,
    /// Sending it, in seconds, without what a bandwidth limit or the disk held it back.
    pub sending_s: f64,
    /// The whole round, files included, in seconds.
    pub took_s: f64,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision {
    /// The next round will be shorter.
    Again,
    /// What is left will take this long, in milliseconds, while the container stands still.
    Freeze { expected_ms: f64 },
    /// More rounds leave as much as this, in milliseconds: the container writes faster than it can be sent.
    Stuck { expected_ms: f64 },
}

/// Follows the rounds of one move.
#[derive(Debug, Clone)]
pub struct Convergence {
    aim_ms: f64,
    rounds: u32,
    /// Bytes per second, of the rounds that were long enough to tell.
    rate: Option<f64>,
    left_before: Option<f64>,
    stuck: u32,
}

impl Default for Convergence {
    fn default() -> Self {
        Self { aim_ms: AIM_MS, rounds: 0, rate: None, left_before: None, stuck: 0 }
    }
}

impl Convergence {
    /// The container has been slowed down: what was seen of it says little from here on, and it is to stand still as
    /// soon as what is left takes no longer than `aim_ms`. Rounds go on being counted.
    pub fn slowed(&mut self, aim_ms: f64) {
        self.aim_ms = aim_ms.max(AIM_MS);
        self.left_before = None;
        self.stuck = 0;
    }

    /// What any move takes, `fixed_ms` milliseconds, and sending CRIU's images at the rate of this link.
    pub fn fixed_ms(&self, fixed_ms: f64) -> f64 {
        fixed_ms + self.rate.map_or(0.0, |rate| IMAGES_BYTES / rate * 1e3)
    }

    /// Takes in a round that has been sent.
    pub fn after(&mut self, round: Measured) -> Decision {
        self.rounds += 1;
        const LONG_ENOUGH_BYTES: u64 = 4 << 20;
        if round.sent_bytes >= LONG_ENOUGH_BYTES && round.sending_s > 0.0 {
            self.rate = Some(round.sent_bytes as f64 / round.sending_s);
        }
        let Some(since) = round.since_last_s else { return self.limit(f64::INFINITY) };
        // What will be dirty when the processes stand still: as much per second as so far.
        let left_bytes = round.dirty_bytes as f64 / since.max(1e-3) * round.took_s;
        let expected_ms = match self.rate {
            Some(rate) => left_bytes / rate * 1e3,
            // Never more than a few MiB: any link takes that.
            None => 0.0,
        };
        if expected_ms <= self.aim_ms {
            return Decision::Freeze { expected_ms };
        }
        let before = self.left_before.replace(left_bytes);
        self.stuck = if before.is_some_and(|b| left_bytes > b * STUCK) { self.stuck + 1 } else { 0 };
        self.limit(expected_ms)
    }

    fn limit(&self, expected_ms: f64) -> Decision {
        if self.stuck >= STUCK_ROUNDS || self.rounds >= MAX_ROUNDS {
            return Decision::Stuck { expected_ms };
        }
        Decision::Again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A container that writes `dirty` MiB/s to `total` MiB, on a link of `rate` MiB/s.
    fn rounds_of(total: f64, dirty: f64, rate: f64) -> (u32, Decision) {
        let mut convergence = Convergence::default();
        let (mut left, mut since) = (total, None);
        for n in 1.. {
            let took_s = left / rate + 0.002;
            let bytes = (left * MIB as f64) as u64;
            let round =
                Measured { dirty_bytes: bytes, sent_bytes: bytes, since_last_s: since, sending_s: took_s, took_s };
            match convergence.after(round) {
                Decision::Again => {}
                done => return (n, done),
            }
            left = (dirty * took_s).min(total);
            since = Some(took_s);
        }
        unreachable!()
    }

    #[test]
    fn what_rests_needs_two_rounds_and_what_is_slow_a_few() {
        assert!(matches!(rounds_of(1024.0, 0.0, 1000.0), (2, Decision::Freeze { .. })));
        let (rounds, decision) = rounds_of(1024.0, 200.0, 1000.0);
        assert!(rounds <= 6 && matches!(decision, Decision::Freeze { expected_ms } if expected_ms <= AIM_MS));
    }

    #[test]
    fn what_writes_faster_than_the_link_is_stuck() {
        for dirty in [990.0, 2000.0, 100_000.0] {
            let (rounds, decision) = rounds_of(1024.0, dirty, 1000.0);
            assert!(rounds <= 6, "{dirty}: {rounds}");
            assert!(
                matches!(decision, Decision::Stuck { expected_ms } if expected_ms > 100.0),
                "{dirty}: {decision:?}"
            );
        }
    }

    #[test]
    fn what_is_slowed_enough_converges() {
        let mut convergence = Convergence::default();
        let (mut left, mut since, mut dirty, mut steps) = (1024.0, None, 2000.0, 0);
        let rate = 1000.0;
        for _ in 0..MAX_ROUNDS {
            let took_s = left / rate;
            let bytes = (left * MIB as f64) as u64;
            let round =
                Measured { dirty_bytes: bytes, sent_bytes: bytes, since_last_s: since, sending_s: took_s, took_s };
            match convergence.after(round) {
                Decision::Again => {}
                Decision::Freeze { expected_ms } => {
                    assert!(expected_ms <= 100.0 && steps == 2, "{expected_ms} after {steps} steps");
                    return;
                }
                Decision::Stuck { .. } => {
                    steps += 1;
                    dirty /= 2.0;
                    convergence.slowed(100.0);
                }
            }
            left = (dirty * took_s).min(1024.0);
            since = Some(took_s);
        }
        panic!("never");
    }

    #[test]
    fn it_ends_whatever_is_measured() {
        let mut convergence = Convergence::default();
        let odd = Measured {
            dirty_bytes: u64::MAX,
            sent_bytes: 0,
            since_last_s: Some(0.0),
            sending_s: 1.0,
            took_s: f64::MAX,
        };
        let turns = (0..).map(|_| convergence.after(odd)).take_while(|d| *d == Decision::Again).count();
        assert!(turns <= MAX_ROUNDS as usize);
    }
}
