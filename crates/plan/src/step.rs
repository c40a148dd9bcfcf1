//! Moves in an order, and what may run at the same time.
//!
//! A plan is made one step after the other on a draft. From that order only what matters is kept: a step waits
//! (`after`) for what leaves its destination, and for what its companions do. So in any permitted interleaving a host
//! holds, at every moment, at most what the draft held there after some step, and a rule that allows a set of
//! containers allows every part of it.

use std::collections::BTreeMap;
use std::fmt;

use godwit_model::{Bytes, ContainerName, HostName};
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::fleet::{Fleet, HostId, LayerId, MemberId};
use crate::rules::Ask;

/// What a move takes beside sending its bytes, in milliseconds.
pub const SETUP_MS: u64 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// It moves while it runs.
    Live,
    /// It is stopped where it is, then started at the destination.
    Restart,
}

/// One container goes from one host to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub container: ContainerName,
    pub from: HostName,
    pub to: HostName,
    pub how: How,
    /// Steps of the same plan, by their place in it, that must be done before this one begins. Where one of them has
    /// failed, this one must not begin.
    pub after: Vec<usize>,
    /// 0 where `after` is empty, else one more than the latest of them.
    pub wave: u32,
    /// The first step of a group that must go one after the other with nothing between: containers that must be near
    /// each other, which they are again when the last of the group is done. `None`: it goes alone.
    pub unit: Option<usize>,
    /// Memory and files to send.
    pub bytes: Bytes,
    /// Expected.
    pub downtime_ms: u64,
    /// From begin to end, if nothing else uses the links.
    pub estimated_ms: u64,
    /// Why there, as sentences.
    pub reasons: Vec<String>,
}

/// A container that a plan leaves where it is, though it should go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stay {
    pub container: ContainerName,
    pub reasons: Vec<String>,
}

/// A step before it is told to anyone.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Leg {
    pub member: MemberId,
    pub from: HostId,
    pub to: HostId,
    pub how: How,
    /// The leg that begins its unit.
    pub unit: Option<usize>,
    pub reasons: Vec<String>,
}

/// Legs in an order that keeps every rule become steps.
pub(crate) fn steps(fleet: &Fleet, legs: &[Leg]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::with_capacity(legs.len());
    let mut arrivals: BTreeMap<HostId, Vec<usize>> = BTreeMap::new();
    let mut departures: BTreeMap<HostId, Vec<usize>> = BTreeMap::new();
    let mut last_of: BTreeMap<MemberId, usize> = BTreeMap::new();
    for (at, leg) in legs.iter().enumerate() {
        let member = fleet.member(leg.member);
        let layer_of = |step: usize| fleet.member(legs[step].member).ties.layer;
        let near = |step: usize| &fleet.member(legs[step].member).ties.near;
        let in_unit = |step: usize| leg.unit.is_some() && legs[step].unit == leg.unit;
        let from = |map: &BTreeMap<HostId, Vec<usize>>, host| map.get(&host).cloned().unwrap_or_default();
        let mut after = from(&departures, leg.to);
        after.extend(last_of.get(&leg.member));
        // Its companions are there first, and who needs it has gone, or has another.
        after.extend(from(&arrivals, leg.to).into_iter().filter(|s| member.ties.near.contains(&layer_of(*s))));
        let layer = member.ties.layer;
        after.extend(from(&departures, leg.from).into_iter().filter(|s| near(*s).contains(&layer) && !in_unit(*s)));
        if fleet.tables.layers[layer.at()].wanted_near > 0 {
            after.extend(from(&arrivals, leg.from).into_iter().filter(|s| layer_of(*s) == layer));
        }
        after.extend((0..at).filter(|s| in_unit(*s)));
        after.sort_unstable();
        after.dedup();
        let wave = after.iter().map(|step| steps[*step].wave + 1).max().unwrap_or_default();
        let (source, target) = (fleet.slot(leg.from), fleet.slot(leg.to));
        let bytes = match leg.how {
            How::Live => member.container.bytes,
            How::Restart => Bytes(0),
        };
        steps.push(Step {
            container: member.container.name.clone(),
            from: source.host.name.clone(),
            to: target.host.name.clone(),
            how: leg.how,
            after,
            wave,
            unit: leg.unit,
            bytes,
            downtime_ms: member.container.downtime_ms,
            estimated_ms: transfer_ms(bytes, source.link().min(target.link())),
            reasons: leg.reasons.clone(),
        });
        arrivals.entry(leg.to).or_default().push(at);
        departures.entry(leg.from).or_default().push(at);
        last_of.insert(leg.member, at);
    }
    steps
}

/// What a move of `bytes` takes at `rate` bytes per second, in milliseconds.
fn transfer_ms(bytes: Bytes, rate: f64) -> u64 {
    SETUP_MS.saturating_add((bytes.0 as f64 / rate * 1000.0).ceil() as u64)
}

/// How long the steps take, at most `parallel` at a time, which share the links of their hosts; in milliseconds.
pub(crate) fn total_ms(fleet: &Fleet, steps: &[Step], parallel: usize) -> u64 {
    let parallel = parallel.clamp(1, steps.len().max(1));
    let mut done_at: Vec<u64> = Vec::with_capacity(steps.len());
    let mut lanes = vec![0u64; parallel];
    for step in steps {
        let ready = step.after.iter().map(|s| done_at[*s]).max().unwrap_or_default();
        let link = |name: &HostName| fleet.host_ids.get(name).map_or(f64::MAX, |id| fleet.slot(*id).link());
        // What comes from one host shares its link; destinations differ as a rule.
        let sharing = steps.iter().filter(|s| s.from == step.from).count().min(parallel) as f64;
        let took = transfer_ms(step.bytes, (link(&step.from) / sharing).min(link(&step.to)));
        let Some(lane) = lanes.iter_mut().min() else { break };
        let end = (*lane).max(ready).saturating_add(took);
        *lane = end;
        done_at.push(end);
    }
    lanes.into_iter().max().unwrap_or_default()
}

/// Puts moves into an order in which each is allowed when its turn comes; the second list: those for which there is
/// none. Moves in one list go together, one after the other.
///
/// Who may go, goes: that takes nothing from anybody who waits, because whatever else has to leave the destination
/// first still can. Moves keep the order in which they are given as far as that allows.
pub(crate) fn in_order(mut draft: Draft<'_>, mut pending: Vec<Vec<Leg>>) -> (Vec<Leg>, Vec<Vec<Leg>>) {
    let mut ordered = Vec::with_capacity(pending.len());
    while let Some(next) = pending.iter().position(|legs| may_go(&draft, legs)) {
        let first = ordered.len();
        let legs = pending.remove(next);
        let unit = (legs.len() > 1).then_some(first);
        for leg in legs {
            draft.relocate(leg.member, Some(leg.to));
            ordered.push(Leg { unit, ..leg });
        }
    }
    (ordered, pending)
}

fn may_go(draft: &Draft<'_>, legs: &[Leg]) -> bool {
    match legs {
        [leg] => draft.fits(leg.to, &draft.ask(leg.member, leg.how)) && draft.dependents(leg.member).is_empty(),
        legs => {
            let members: Vec<(MemberId, How)> = legs.iter().map(|leg| (leg.member, leg.how)).collect();
            legs.first().is_some_and(|first| draft.take_together(first.to, &members, &[]))
        }
    }
}

impl Draft<'_> {
    /// Whether a host takes all of these, one after the other, those counted as near that come along; and whether
    /// nobody misses them where they were.
    pub fn take_together(&self, host: HostId, members: &[(MemberId, How)], among: &[HostId]) -> bool {
        let layers: Vec<LayerId> = members.iter().map(|(m, _)| self.member(*m).ties.layer).collect();
        let mut draft = self.clone();
        let all_fit = members.iter().all(|(member, how)| {
            let ask = Ask { along: &layers, ..Draft::among(draft.ask(*member, *how), among) };
            let fits = draft.fits(host, &ask);
            draft.relocate(*member, Some(host));
            fits
        });
        all_fit && members.iter().all(|(m, _)| self.dependents(*m).iter().all(|d| members.iter().any(|(m, _)| m == d)))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.how {
            How::Live => "",
            How::Restart => ", restarted",
        };
        write!(f, "{} {} → {}{how}", self.container, self.from, self.to)?;
        write!(f, " ({}, about {} ms", self.bytes, self.estimated_ms)?;
        if !self.after.is_empty() {
            let after: Vec<String> = self.after.iter().map(|s| (s + 1).to_string()).collect();
            write!(f, ", after {}", after.join(", "))?;
        }
        write!(f, "): {}", self.reasons.join("; "))
    }
}

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} stays: {}", self.container, self.reasons.join("; "))
    }
}
