//! Room for a container that wants more than its host has: the cheapest set of moves.

use std::fmt;

use godwit_model::{Bytes, ContainerName, HostName, MilliCpu};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::draft::Draft;
use crate::fleet::{Fleet, FleetError, HostId, MemberId};
use crate::search::{MAX_NODES_OF_PLAN, Place, Search, Wish};
use crate::step::{How, Leg, Step, in_order, steps};

/// Why there is no way to grow.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RoomError {
    #[error(transparent)]
    Unknown(#[from] FleetError),
    #[error("{0} is on no host; it grows when it is placed")]
    NotPlaced(ContainerName),
    #[error("{0} is being moved; ask again when that is over")]
    Moving(ContainerName),
    #[error("{container} cannot have {memory} and {cpu} CPUs: {}", because.join("; "))]
    NoWay { container: ContainerName, memory: Bytes, cpu: MilliCpu, because: Vec<String> },
}

/// One way to get room, with what it costs, or why it is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// A sentence: who would move.
    pub what: String,
    /// Milliseconds of downtime times importance, and one for each mebibyte sent; `None`: it cannot be done.
    pub cost: Option<u64>,
}

/// How a container gets what it wants. The steps keep every rule in any order that `after` permits. When all are done
/// there is room on `host` and the container grows there: until then whoever carries this out lets nothing else in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomPlan {
    pub container: ContainerName,
    pub memory: Bytes,
    pub cpu: MilliCpu,
    /// Where it is in the end.
    pub host: HostName,
    /// Empty: it fits where it is.
    pub steps: Vec<Step>,
    /// Milliseconds of downtime times importance, and one for each mebibyte sent.
    pub cost: u64,
    /// What was weighed, the one that was taken first.
    pub ways: Vec<Way>,
}

/// Plans how a container can reserve `memory` and `cpu` instead of what it has: where it is, after neighbours have
/// moved away, or on another host, whichever costs least; at most [`crate::MAX_DISPLACED`] others move, in chains too.
pub fn make_room(
    fleet: &Fleet,
    container: &ContainerName,
    memory: Bytes,
    cpu: MilliCpu,
) -> Result<RoomPlan, RoomError> {
    let id = fleet.member_id(container)?;
    let member = fleet.member(id);
    let home = member.home.ok_or_else(|| RoomError::NotPlaced(container.clone()))?;
    if !member.also.is_empty() {
        return Err(RoomError::Moving(container.clone()));
    }
    let size = (memory.0, u64::from(cpu.0));
    let mut grown = Draft::new(fleet);
    grown.resize_on_arrival(id, size);
    let (fits, stays) = stays(&grown, id, home);
    let mut because = Vec::new();
    if fits {
        because.push(Way { what: "it fits where it is".to_owned(), cost: Some(0) });
        return Ok(told(fleet, container, (memory, cpu), home, &[], 0, because));
    }
    let mut found: Vec<(u64, HostId, Vec<Leg>, String)> = Vec::new();
    let mut ways = Vec::new();
    let cost = member.container.move_cost();
    let may_go = member.container.unmovable.is_empty() && grown.dependents(id).is_empty();
    for place in [Place::Home, Place::Elsewhere] {
        let who = match place {
            Place::Home => format!("neighbours leave {}", fleet.slot(home).host.name),
            _ => "it moves itself".to_owned(),
        };
        let possible = match place {
            Place::Home => stays,
            _ => may_go,
        };
        let wish = Wish { member: id, how: How::Live, cost, place };
        // It moves as it is and grows in the end, when everybody has made way.
        let order = |targets: &[(MemberId, HostId)]| in_order(Draft::new(fleet), legs(&grown, targets));
        let leads_there = |targets: &[(MemberId, HostId)]| order(targets).1.is_empty();
        let search = || Search::new(grown.clone(), &[], true, &leads_there, MAX_NODES_OF_PLAN).solve(vec![wish]).0;
        let answer = possible.then(search).flatten();
        match answer {
            Some(answer) => {
                let (legs, _) = order(&answer.targets);
                let to = answer.targets.iter().find(|(m, _)| *m == id).map_or(home, |(_, to)| *to);
                let others = legs.len() - usize::from(to != home);
                let what = format!("{who} ({others} others move)");
                found.push((answer.cost, to, legs, what));
            }
            None => ways.push(Way { what: who, cost: None }),
        }
    }
    // The one that leaves it where it is wins a tie.
    found.sort_by_key(|(cost, to, ..)| (*cost, *to != home));
    let Some((cost, host, legs, _)) = found.first() else {
        let mut because = vec![format!("nobody on {} can make way", fleet.slot(home).host.name)];
        because.extend(member.container.unmovable.iter().map(|reason| format!("it cannot move: {reason}")));
        if may_go {
            because.push(grown.refusal(&grown.ask(id, How::Live)).to_string());
        }
        return Err(RoomError::NoWay { container: container.clone(), memory, cpu, because });
    };
    let mut all: Vec<Way> = found.iter().map(|f| Way { what: f.3.clone(), cost: Some(f.0) }).collect();
    all.append(&mut ways);
    Ok(told(fleet, container, (memory, cpu), *host, legs, *cost, all))
}

/// Whether it fits where it is, and whether it may stay there if others make way.
fn stays(grown: &Draft<'_>, id: MemberId, home: HostId) -> (bool, bool) {
    let mut without = grown.clone();
    without.relocate(id, None);
    let (slot, occupied) = (without.slot(home), without.occupied(home));
    let (memory, cpu) = grown.size(id);
    let fits = memory <= slot.memory_free(occupied) && cpu <= slot.cpu_free(occupied);
    (fits, memory <= slot.host.memory.0 && cpu <= slot.host.cpu_capacity())
}

fn legs(draft: &Draft<'_>, targets: &[(MemberId, HostId)]) -> Vec<Vec<Leg>> {
    let leg = |(member, to): &(MemberId, HostId)| {
        let from = draft.home(*member)?;
        let reasons = vec!["it makes room".to_owned()];
        Some(vec![Leg { member: *member, from, to: *to, how: How::Live, unit: None, reasons }])
    };
    // Found from the one that wants outwards; who is last to be pushed goes first.
    targets.iter().rev().filter_map(leg).collect()
}

fn told(
    fleet: &Fleet,
    container: &ContainerName,
    (memory, cpu): (Bytes, MilliCpu),
    host: HostId,
    legs: &[Leg],
    cost: u64,
    ways: Vec<Way>,
) -> RoomPlan {
    let mut steps = steps(fleet, legs);
    for step in steps.iter_mut().filter(|step| step.container == *container) {
        step.reasons = vec![format!("there it will have room for {memory} and {cpu} CPUs")];
    }
    let host = fleet.slot(host).host.name.clone();
    RoomPlan { container: container.clone(), memory, cpu, host, steps, cost, ways }
}

impl fmt::Display for RoomPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (steps, cost) = (self.steps.len(), self.cost);
        writeln!(
            f,
            "{} gets {} and {} CPUs on {}: {steps} steps, cost {cost}",
            self.container, self.memory, self.cpu, self.host
        )?;
        for (at, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {}. {step}", at + 1)?;
        }
        for way in &self.ways {
            match way.cost {
                Some(cost) => writeln!(f, "  weighed: {}: {cost}", way.what)?,
                None => writeln!(f, "  weighed: {}: not possible", way.what)?,
            }
        }
        Ok(())
    }
}
