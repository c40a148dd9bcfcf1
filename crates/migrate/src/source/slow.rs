//! Slowing a container down that writes faster than that can be sent.

use godwit_model::migration::Phase;

use super::{SendError, Workload};
use crate::converge::Convergence;

/// Shares of its usual CPU time that the container is given, one after the other, in percent. Each halves what it
/// writes, so that a copy that goes no worse than sixteen times too slowly ends.
const SHARES: [u32; 4] = [50, 25, 12, 6];
/// Without a limit of its own, a move slows the container down rather than let it stand still for this much longer than
/// it must, in milliseconds: a short pause hurts less than a slow second.
const LONG_MS: f64 = 100.0;

/// How far it is slowed down.
#[derive(Debug, Default)]
pub(super) struct Brake {
    step: usize,
    /// The least share so far.
    pub to_percent: Option<u32>,
}

impl Brake {
    /// What is left would take `expected_ms`. `true`: the container is slower now, and further rounds are worth it.
    pub(super) fn press<L: Workload>(
        &mut self,
        expected_ms: f64,
        convergence: &mut Convergence,
        workload: &mut L,
    ) -> Result<bool, SendError> {
        let options = workload.options();
        let budget = options.max_downtime_ms.map(|most| most as f64 - convergence.fixed_ms(workload.fixed_ms()));
        let enough_ms = budget.unwrap_or(LONG_MS);
        // A budget below the fixed cost is met by no speed.
        if options.never_slow || expected_ms <= enough_ms || enough_ms <= 0.0 {
            return Ok(false);
        }
        let Some(&percent) = SHARES.get(self.step) else { return Ok(false) };
        let failed = |source| SendError::Part { phase: Phase::Copy, doing: "slowing the container down", source };
        if !workload.slow_down(percent).map_err(failed)? {
            return Ok(false);
        }
        tracing::info!(percent, expected_ms, enough_ms, "slowed down: it writes faster than that can be sent");
        self.step += 1;
        self.to_percent = Some(percent);
        convergence.slowed(enough_ms);
        Ok(true)
    }
}
