//! Reconcilers: each looks at everything, does what is missing, and takes no input. They run after every change of the
//! store or of a report, and at the latest every [`PASS_EVERY_MS`].

pub mod balance;
mod collect;
pub mod evacuate;
pub mod failure;
pub mod held;
mod place;
mod prune;
pub mod room;
pub mod view;

use std::sync::Arc;
use std::time::Duration;

use godwit_api::types::ErrorBody;
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::moves;
use crate::state::World;

/// The longest time between two passes, in milliseconds.
const PASS_EVERY_MS: u64 = 5_000;
/// The shortest time between two passes, in milliseconds: many changes at once make one pass.
const PASS_PAUSE_MS: u64 = 20;

/// Runs all reconcilers until `stop`.
pub async fn run(core: Arc<Core>, stop: CancellationToken) {
    tokio::join!(
        passes(&core, &stop),
        evacuate::run(&core, &stop),
        room::run(&core, &stop),
        balance::run(&core, &stop),
        failure::run(&core, &stop)
    );
}

/// When to look at everything again.
struct Wake {
    worlds: watch::Receiver<Arc<World>>,
    reports: watch::Receiver<u64>,
    pass: Interval,
    woken: bool,
}

impl Wake {
    fn new(core: &Core, every_ms: u64) -> Self {
        let mut pass = interval(Duration::from_millis(every_ms));
        pass.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { worlds: core.state.follow(), reports: core.links.follow(), pass, woken: false }
    }

    /// Waits for a change of the store or of a report, the longest time at most and the shortest at least; `false` when
    /// it is over.
    async fn next(&mut self, stop: &CancellationToken) -> bool {
        if std::mem::replace(&mut self.woken, true) {
            tokio::time::sleep(Duration::from_millis(PASS_PAUSE_MS)).await;
        }
        tokio::select! {
            () = stop.cancelled() => return false,
            changed = self.worlds.changed() => if changed.is_err() { return false },
            _ = self.reports.changed() => {}
            _ = self.pass.tick() => {}
        }
        self.worlds.mark_unchanged();
        self.reports.mark_unchanged();
        true
    }
}

async fn passes(core: &Arc<Core>, stop: &CancellationToken) {
    let mut wake = Wake::new(core, PASS_EVERY_MS);
    while wake.next(stop).await {
        moves::start_missing(core);
        for (what, result) in [
            ("placing containers", place::pass(core).await),
            ("collecting what hosts have let go of", collect::pass(core).await),
            ("forgetting old events and moves", prune::pass(core).await),
        ] {
            if let Err(error) = result {
                tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "{what} failed; tried again");
            }
        }
    }
}
