//! Reconcilers: each looks at everything, does what is missing, and takes no input. They run after every change of the
//! store or of a report, and at the latest every [`PASS_EVERY_MS`].

mod collect;
pub mod evacuate;
mod place;
mod prune;
pub mod view;

use std::sync::Arc;
use std::time::Duration;

use godwit_api::types::ErrorBody;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::moves;

/// The longest time between two passes, in milliseconds.
const PASS_EVERY_MS: u64 = 5_000;
/// The shortest time between two passes, in milliseconds: many changes at once make one pass.
const PASS_PAUSE_MS: u64 = 20;

/// Runs all reconcilers until `stop`.
pub async fn run(core: Arc<Core>, stop: CancellationToken) {
    tokio::join!(passes(&core, &stop), evacuate::run(&core, &stop));
}

async fn passes(core: &Arc<Core>, stop: &CancellationToken) {
    let mut worlds = core.state.follow();
    let mut reports = core.links.follow();
    let mut pass = interval(Duration::from_millis(PASS_EVERY_MS));
    pass.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = worlds.changed() => if changed.is_err() { return },
            _ = reports.changed() => {}
            _ = pass.tick() => {}
        }
        worlds.mark_unchanged();
        reports.mark_unchanged();
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
        tokio::time::sleep(Duration::from_millis(PASS_PAUSE_MS)).await;
    }
}
