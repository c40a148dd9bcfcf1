//! A limit on how fast a move may send.

use std::time::Duration;

use godwit_model::units::BitRate;
use tokio::time::Instant;

/// What was not sent lately may be made up for, as much as the rate allows in this time, in milliseconds.
const BURST_MS: u64 = 20;

/// Holds a sender back to a rate; without one it holds nobody back.
#[derive(Debug, Default)]
pub struct Pace {
    limit: Option<Limit>,
    /// For how long senders were held back, altogether.
    pub held_back: Duration,
}

#[derive(Debug)]
struct Limit {
    bytes_per_second: f64,
    /// When everything so far has gone out at that rate.
    free_at: Instant,
}

impl Pace {
    /// From now on no faster than this.
    pub fn set(&mut self, rate: Option<BitRate>) {
        self.limit = rate.map(|r| Limit { bytes_per_second: r.bytes_per_second().max(1.0), free_at: Instant::now() });
    }

    /// Returns when this many bytes may be sent.
    pub async fn keep(&mut self, bytes: usize) {
        let Some(limit) = &mut self.limit else { return };
        let now = Instant::now();
        let earliest = now - Duration::from_millis(BURST_MS);
        limit.free_at = limit.free_at.max(earliest) + Duration::from_secs_f64(bytes as f64 / limit.bytes_per_second);
        if limit.free_at > now {
            self.held_back += limit.free_at - now;
            tokio::time::sleep_until(limit.free_at).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_and_a_pause_is_not_made_up_for() {
        let mut pace = Pace::default();
        let begun = Instant::now();
        pace.keep(1 << 30).await;
        assert!(begun.elapsed().is_zero(), "without a limit nobody waits");
        pace.set(Some(BitRate(80_000_000)));
        for _ in 0..100 {
            pace.keep(100_000).await;
        }
        let took = begun.elapsed().as_secs_f64();
        assert!((0.97..=1.01).contains(&took), "10 MB at 10 MB/s in {took} s");
        tokio::time::advance(Duration::from_secs(60)).await;
        let begun = Instant::now();
        pace.keep(10_000_000).await;
        assert!(begun.elapsed() >= Duration::from_millis(970));
        pace.set(None);
        let begun = Instant::now();
        pace.keep(1 << 30).await;
        assert!(begun.elapsed().is_zero());
    }
}
