//! How often a container was to make way for a grower and did not: after some attempts a plan is made without it.

use std::collections::BTreeMap;

use godwit_model::ContainerName;
use godwit_model::migration::Outcome;
use godwit_plan::{Container, Fleet};

use super::is_for;
use crate::state::records::Growth;
use crate::state::{World, now_ms};

/// Attempts for one container.
const MAX_TRIES: u32 = 3;
/// The wait before the second attempt, in milliseconds; doubled for the third.
const AGAIN_MS: u64 = 2_000;
/// How long an attempt counts, in milliseconds.
const COUNTS_MS: u64 = 600_000;

/// Attempts that ended before there was a move: the store does not have them.
#[derive(Debug, Default)]
pub struct Tries {
    refused: BTreeMap<ContainerName, Vec<(u64, String)>>,
}

impl Tries {
    pub fn note(&mut self, container: &ContainerName, because: Vec<String>) {
        let tries = self.refused.entry(container.clone()).or_default();
        tries.push((now_ms(), because.join(", ")));
        let more = tries.len().saturating_sub(MAX_TRIES as usize);
        tries.drain(..more);
    }

    /// Lets a fleet count those as unmovable that were tried too often; who has to wait before the next attempt.
    pub fn apply(
        &self,
        world: &World,
        grower: &ContainerName,
        growth: &Growth,
        fleet: &mut Fleet,
    ) -> Vec<ContainerName> {
        let now = now_ms();
        let mut all: BTreeMap<ContainerName, Vec<(u64, String)>> = self.refused.clone();
        for one in world.moves.values().filter(|m| is_for(m, grower) && m.requested_at_ms >= growth.requested_at_ms) {
            if let (Outcome::Failed { phase, reason }, Some(at)) = (&one.outcome, one.finished_at_ms) {
                all.entry(one.name.clone()).or_default().push((at, format!("{phase}: {reason}")));
            }
        }
        let mut waiting = Vec::new();
        for (name, mut tries) in all {
            tries.retain(|(at, _)| at.saturating_add(COUNTS_MS) > now);
            let Some((last, because)) = tries.iter().max().cloned() else { continue };
            let count = tries.len() as u32;
            if count >= MAX_TRIES {
                if let Some(container) = fleet.container(&name).cloned() {
                    let unmovable = vec![format!("it was tried {count} times: {because}")];
                    fleet.set_container(Container { unmovable, ..container });
                }
            } else if now < last.saturating_add(AGAIN_MS << (count - 1)) {
                waiting.push(name);
            }
        }
        waiting
    }
}
