//! A host is dead: what ran there starts elsewhere.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;

use godwit_model::{ContainerName, HostName};
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::fleet::{Fleet, FleetError, LayerId, MemberId};
use crate::step::{How, Stay};

/// One container starts anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub container: ContainerName,
    pub to: HostName,
    /// Starts of the same plan, by their place in it, that come first: what this one must be near.
    pub after: Vec<usize>,
    /// Its volumes are lost and are made anew, empty, as its manifest allows.
    pub recreates_volumes: bool,
    /// Why there, as sentences.
    pub reasons: Vec<String>,
}

/// What becomes of the containers of a dead host. Only whoever knows that nothing runs there any more may carry it out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPlan {
    pub host: HostName,
    /// The most important first; the rules hold after each of them.
    pub starts: Vec<Start>,
    /// What cannot start, and why: it waits for its host, or for room.
    pub stays: Vec<Stay>,
}

/// Plans where everything of `host`, which is dead, starts again. Nothing is moved to make room: what finds no place
/// waits. A container whose local volumes were there is told as staying, unless it says that they may be made anew.
///
/// Errors: a host that the fleet does not have.
pub fn recover(fleet: &Fleet, host: &HostName) -> Result<RecoveryPlan, FleetError> {
    let dead = fleet.host_id(host)?;
    let mut draft = Draft::new(fleet);
    draft.close(dead);
    let here = fleet.slot(dead).occupied.members.iter().copied();
    let mut lost: Vec<MemberId> = here.filter(|m| fleet.member(*m).home == Some(dead)).collect();
    let wanted: BTreeSet<LayerId> = lost.iter().flat_map(|m| fleet.member(*m).ties.near.iter().copied()).collect();
    lost.sort_by_cached_key(|m| {
        let member = fleet.member(*m);
        let c = &member.container;
        (Reverse(c.importance), !wanted.contains(&member.ties.layer), Reverse(c.reserved_memory), c.name.clone())
    });
    // What others must be near starts before them, however important they are.
    lost.sort_by_key(|m| !fleet.member(*m).ties.near.is_empty());
    for member in &lost {
        draft.relocate(*member, None);
    }
    let mut plan = RecoveryPlan { host: host.clone(), starts: Vec::new(), stays: Vec::new() };
    let mut started: Vec<MemberId> = Vec::new();
    for id in lost {
        let member = fleet.member(id);
        let container = &member.container;
        let volumes_lost = container.volumes_on.as_ref() == Some(host);
        let stay = |reasons| Stay { container: container.name.clone(), reasons };
        if volumes_lost && !container.may_recreate_volumes {
            let reason = format!("its volumes are on {host}; it is not started without them");
            plan.stays.push(stay(vec![reason]));
            continue;
        }
        let mut ask = draft.ask(id, How::Restart);
        if !volumes_lost && let Some(other) = &container.volumes_on {
            ask.only = fleet.host_ids.get(other).copied();
            ask.volumes_lost = ask.only.is_none();
        }
        match draft.place(&ask) {
            Ok(placement) => {
                let near = |at: &usize| {
                    let companion = started[*at];
                    member.ties.near.contains(&fleet.member(companion).ties.layer)
                        && plan.starts[*at].to == placement.host
                };
                let after = (0..started.len()).filter(near).collect();
                draft.relocate(id, fleet.host_ids.get(&placement.host).copied());
                started.push(id);
                plan.starts.push(Start {
                    container: container.name.clone(),
                    to: placement.host,
                    after,
                    recreates_volumes: volumes_lost,
                    reasons: placement.reasons,
                });
            }
            Err(refusal) => plan.stays.push(stay(vec![refusal.to_string()])),
        }
    }
    Ok(plan)
}

impl fmt::Display for RecoveryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} is lost: {} start elsewhere, {} wait", self.host, self.starts.len(), self.stays.len())?;
        for (at, start) in self.starts.iter().enumerate() {
            let empty = if start.recreates_volumes { ", with empty volumes" } else { "" };
            write!(f, "  {}. {} → {}{empty}", at + 1, start.container, start.to)?;
            if !start.after.is_empty() {
                let after: Vec<String> = start.after.iter().map(|s| (s + 1).to_string()).collect();
                write!(f, ", after {}", after.join(", "))?;
            }
            writeln!(f, ": {}", start.reasons.join("; "))?;
        }
        for stay in &self.stays {
            writeln!(f, "  {stay}")?;
        }
        Ok(())
    }
}
