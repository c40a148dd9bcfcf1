//! Moving everything off a host, as a plan.
//!
//! First every container goes to its best host. Who finds none then asks for a place: containers of this plan are
//! planned elsewhere, which costs nothing, and at last containers of other hosts move too (a chain).

mod units;

use std::collections::BTreeMap;
use std::fmt;

use godwit_model::{Bytes, HostName};
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::fleet::{Fleet, FleetError, HostId, MemberId};
use crate::search::{MAX_NODES_OF_PLAN, Place, Search, Wish};
use crate::step::{How, Leg, Stay, Step, in_order, steps, total_ms};
use units::Unit;

/// How a host is to be emptied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvacuateOptions {
    /// Only to these hosts; empty: to any.
    pub to: Vec<HostName>,
    /// The most steps that run at the same time; at least 1 is taken.
    pub parallel: u32,
    /// What cannot move live may be stopped here and started elsewhere.
    pub allow_restart: bool,
    /// When the host must be empty, in milliseconds from the start. The plan says whether that is to be expected; it
    /// is not made differently.
    pub deadline_ms: Option<u64>,
}

impl Default for EvacuateOptions {
    fn default() -> Self {
        Self { to: Vec::new(), parallel: 2, allow_restart: false, deadline_ms: None }
    }
}

/// How a host becomes empty. Every rule holds after each step in every order that `after` permits, also when steps
/// fail: what waits for a failed step must then not begin, everything else may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuationPlan {
    pub host: HostName,
    /// In the order in which they should begin, as far as `after` and `parallel` allow.
    pub steps: Vec<Step>,
    /// What will still be there at the end, and why.
    pub stays: Vec<Stay>,
    pub parallel: u32,
    /// All bytes that are sent.
    pub bytes: Bytes,
    /// How long all of it takes, `parallel` steps at a time.
    pub estimated_ms: u64,
    /// Whether the deadline is expected to be kept; `None`: there is none.
    pub keeps_deadline: Option<bool>,
}

impl EvacuationPlan {
    /// Whether the host will be empty at the end.
    pub fn empties(&self) -> bool {
        self.stays.is_empty()
    }
}

/// Plans how everything leaves `host`. Changes nothing; the host's own state does not matter: it takes nothing from
/// the first step on. Containers that are being moved already are left to their moves and told as staying, so a plan
/// made again later goes on where this one ended.
///
/// Errors: a host that the fleet does not have, here or in [`EvacuateOptions::to`].
pub fn evacuate(fleet: &Fleet, host: &HostName, options: &EvacuateOptions) -> Result<EvacuationPlan, FleetError> {
    let source = fleet.host_id(host)?;
    let among = options.to.iter().map(|name| fleet.host_id(name)).collect::<Result<Vec<HostId>, _>>()?;
    let mut closed = Draft::new(fleet);
    closed.close(source);
    let (leaving, mut stays) = units::of_host(fleet, source, options.allow_restart);
    let hows = leaving.iter().copied().collect();
    let mut plan = Plan {
        draft: closed.clone(),
        closed,
        among: &among,
        hows,
        alone: BTreeMap::new(),
        units: Vec::new(),
        nodes_left: MAX_NODES_OF_PLAN,
        hopeless: Vec::new(),
    };
    let mut left = Vec::new();
    for (member, _) in &leaving {
        if plan.draft.home(*member) == Some(source) && !plan.find_host(*member, &leaving) {
            left.push(*member);
        }
    }
    // Again, because what it must be near may have left meanwhile; then by making a place.
    for member in &left {
        if plan.draft.home(*member) == Some(source) && !plan.find_host(*member, &leaving) {
            plan.make_place(*member);
        }
    }
    // One of them may have gone along with a later one.
    left.retain(|member| plan.draft.home(*member) == Some(source));
    stays.extend(left.into_iter().map(|member| plan.stay(member, &leaving)));
    let (legs, stuck) = plan.legs();
    stays.extend(stuck.into_iter().map(|member| plan.stay(member, &leaving)));
    stays.sort_by(|a, b| a.container.cmp(&b.container));
    Ok(told(fleet, host, options, &legs, stays))
}

/// What is decided so far.
struct Plan<'f, 'o> {
    /// The fleet with the host closed and nothing moved.
    closed: Draft<'f>,
    /// The same with everything moved that is decided.
    draft: Draft<'f>,
    among: &'o [HostId],
    hows: BTreeMap<MemberId, How>,
    /// Where containers go that go by themselves.
    alone: BTreeMap<MemberId, HostId>,
    units: Vec<(Unit, HostId)>,
    /// What searches for places may still cost.
    nodes_left: u32,
    /// Who found no place: what is as large and has no fewer rules will not either.
    hopeless: Vec<MemberId>,
}

impl Plan<'_, '_> {
    /// Lets a container, and what must go along, go to its best host; whether there is one.
    fn find_host(&mut self, member: MemberId, leaving: &[(MemberId, How)]) -> bool {
        let Some(unit) = Unit::of(&self.draft, member, leaving) else { return false };
        let Some(to) = unit.host(&self.draft, self.among) else { return false };
        for (member, _) in &unit.members {
            self.draft.relocate(*member, Some(to));
        }
        match unit.members[..] {
            [(only, _)] => drop(self.alone.insert(only, to)),
            _ => self.units.push((unit, to)),
        }
        true
    }

    /// Makes a place for a container that found none: first by planning others of this plan elsewhere, then with
    /// chains.
    fn make_place(&mut self, member: MemberId) -> bool {
        if !self.draft.dependents(member).is_empty() || self.hopeless.iter().any(|m| self.is_no_easier(member, *m)) {
            return false;
        }
        let wish = Wish { member, how: self.how(member), cost: 0, place: Place::Elsewhere };
        for chains in [false, true] {
            let leads_there = |targets: &[(MemberId, HostId)]| {
                let mut alone = self.alone.clone();
                alone.extend(targets.iter().copied());
                in_order(self.closed.clone(), self.moves(&alone)).1.is_empty()
            };
            let mut search = Search::new(self.draft.clone(), self.among, chains, &leads_there, self.nodes_left);
            self.alone.keys().for_each(|m| search.move_freely(*m, self.how(*m)));
            let (found, nodes) = search.solve(vec![wish]);
            self.nodes_left -= nodes;
            if let Some(found) = found {
                self.alone.extend(found.targets.iter().copied());
                for (moved, to) in &found.targets {
                    self.draft.relocate(*moved, Some(*to));
                }
                return true;
            }
        }
        self.hopeless.push(member);
        false
    }

    /// Whether whatever keeps `failed` out keeps `member` out too: it is as large, and of its layer or `failed` has no
    /// rules of its own.
    fn is_no_easier(&self, member: MemberId, failed: MemberId) -> bool {
        let (member, failed) = (self.closed.member(member), self.closed.member(failed));
        let (ours, theirs) = (&member.container, &failed.container);
        let free_of_rules = theirs.most_per_host().is_none()
            && theirs.apart.is_empty()
            && theirs.near.is_empty()
            && theirs.labels.is_empty();
        ours.reserved_memory >= theirs.reserved_memory
            && ours.reserved_cpu >= theirs.reserved_cpu
            && (free_of_rules || member.ties.layer == failed.ties.layer)
    }

    fn how(&self, member: MemberId) -> How {
        self.hows.get(&member).copied().unwrap_or(How::Live)
    }

    /// Every move that is decided, by weight, so that what matters most has left when something goes wrong later.
    fn moves(&self, alone: &BTreeMap<MemberId, HostId>) -> Vec<Vec<Leg>> {
        let leg = |member: MemberId, to: HostId, why: Option<&str>| {
            let from = self.closed.home(member)?;
            let reasons = why.map(str::to_owned).into_iter().collect();
            Some(Leg { member, from, to, how: self.how(member), unit: None, reasons })
        };
        let alone = alone.iter().map(|(member, to)| Vec::from_iter(leg(*member, *to, None)));
        let along = "it goes together with what it must be near";
        let units = self
            .units
            .iter()
            .map(|(unit, to)| unit.members.iter().filter_map(|(member, _)| leg(*member, *to, Some(along))).collect());
        let mut moves: Vec<Vec<Leg>> = alone.chain(units).filter(|legs: &Vec<Leg>| !legs.is_empty()).collect();
        moves.sort_by_cached_key(|legs| {
            let c = &self.closed.member(legs[0].member).container;
            (legs[0].how == How::Restart, std::cmp::Reverse((c.importance, c.bytes)), c.name.clone())
        });
        moves
    }

    /// Every move in an order that keeps the rules, with reasons; and what no such order was found for.
    fn legs(&self) -> (Vec<Leg>, Vec<MemberId>) {
        let (mut legs, stuck) = in_order(self.closed.clone(), self.moves(&self.alone));
        let mut draft = self.closed.clone();
        for leg in &mut legs {
            if leg.unit.is_none() {
                let ask = draft.ask(leg.member, leg.how);
                leg.reasons = draft.reasons_for(leg.to, &ask, &draft.score(leg.to, &ask));
            }
            draft.relocate(leg.member, Some(leg.to));
        }
        let evacuees = stuck.into_iter().flatten().map(|leg| leg.member);
        (legs, evacuees.filter(|member| self.hows.contains_key(member)).collect())
    }

    fn stay(&self, member: MemberId, leaving: &[(MemberId, How)]) -> Stay {
        let alone = Unit::of(&self.draft, member, leaving).is_some_and(|unit| unit.members.len() == 1);
        let reason = if alone {
            let ask = Draft::among(self.draft.ask(member, self.how(member)), self.among);
            self.draft.refusal(&ask).to_string()
        } else {
            "no host takes it together with the containers that must be near it".to_owned()
        };
        Stay { container: self.closed.member(member).container.name.clone(), reasons: vec![reason] }
    }
}

fn told(fleet: &Fleet, host: &HostName, options: &EvacuateOptions, legs: &[Leg], stays: Vec<Stay>) -> EvacuationPlan {
    let steps = steps(fleet, legs);
    let parallel = options.parallel.max(1);
    let estimated_ms = total_ms(fleet, &steps, parallel as usize);
    let bytes = Bytes(steps.iter().fold(0, |sum, step| step.bytes.0.saturating_add(sum)));
    let keeps_deadline = options.deadline_ms.map(|deadline| estimated_ms <= deadline);
    EvacuationPlan { host: host.clone(), steps, stays, parallel, bytes, estimated_ms, keeps_deadline }
}

impl fmt::Display for EvacuationPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (steps, time) = (self.steps.len(), self.estimated_ms);
        writeln!(f, "{}: {steps} steps, {}, about {time} ms, {} at a time", self.host, self.bytes, self.parallel)?;
        for (at, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {}. {step}", at + 1)?;
        }
        for stay in &self.stays {
            writeln!(f, "  {stay}")?;
        }
        match self.keeps_deadline {
            Some(true) => writeln!(f, "  the deadline is kept"),
            Some(false) => writeln!(f, "  the deadline is not kept"),
            None => Ok(()),
        }
    }
}
