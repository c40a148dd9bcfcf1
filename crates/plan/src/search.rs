//! Making a place where there is none: who moves away so that somebody fits, at the least cost.
//!
//! A branch-and-bound search over where containers end up, not over the order of moves. Somebody who does not fit on a
//! host may displace containers from there; those then need places themselves, and may displace others. Every path is
//! bounded by what the best one found so far costs, by how many containers are displaced, and the whole by a number of
//! nodes. An answer counts only if an order of moves leads there ([`crate::step::in_order`]).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use crate::draft::Draft;
use crate::fleet::{HostId, MemberId};
use crate::rank::Score;
use crate::rules::{Ask, Why};
use crate::step::How;

/// The most containers that one answer displaces: the depth of a chain.
pub const MAX_DISPLACED: usize = 6;
/// Nodes of one search, a host that is scored in a scan of all counting as a part of one.
const MAX_NODES: u32 = 3_000;
/// Nodes of all searches of one plan.
pub(crate) const MAX_NODES_OF_PLAN: u32 = 12_000;
const HOSTS_PER_NODE: usize = 32;
/// What looking for an order of moves counts.
const NODES_PER_ORDER: u32 = 50;
/// Fleets up to so many hosts are searched host by host; in larger ones only the best host that fits and the cheapest
/// hosts to clear are tried.
const SMALL_FLEET: usize = 24;
const CLEARED_HOSTS: usize = 8;
/// Containers of one host that are tried for displacement by one that comes, the cheapest first.
const DISPLACED_OF_HOST: usize = 12;

/// Somebody who needs a place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    pub member: MemberId,
    pub how: How,
    /// What it costs if it ends anywhere but at home.
    pub cost: u64,
    pub place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the fleet has it; only memory and CPU count, it is there already.
    Home,
    Elsewhere,
}

/// Says of an answer whether an order of moves leads there.
pub(crate) type Judge<'o> = &'o dyn Fn(&[(MemberId, HostId)]) -> bool;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    pub cost: u64,
    /// Who ends where; only those whose place changes.
    pub targets: Vec<(MemberId, HostId)>,
}

pub(crate) struct Search<'f, 'o> {
    draft: Draft<'f>,
    leads_there: Judge<'o>,
    among: &'o [HostId],
    /// Whether containers may be displaced whose move costs something.
    chains: bool,
    /// Containers whose place is only planned.
    free: BTreeMap<MemberId, How>,
    displaced: BTreeSet<MemberId>,
    waiting: Vec<Wish>,
    placed: Vec<(MemberId, HostId)>,
    cost: u64,
    nodes_left: u32,
    best: Option<Found>,
}

impl<'f: 'o, 'o> Search<'f, 'o> {
    pub fn new(draft: Draft<'f>, among: &'o [HostId], chains: bool, leads_there: Judge<'o>, nodes: u32) -> Self {
        Self {
            draft,
            leads_there,
            among,
            chains,
            free: BTreeMap::new(),
            displaced: BTreeSet::new(),
            waiting: Vec::new(),
            placed: Vec::new(),
            cost: 0,
            nodes_left: MAX_NODES.min(nodes),
            best: None,
        }
    }

    /// The place of this one is only planned and may change at no cost.
    pub fn move_freely(&mut self, member: MemberId, how: How) {
        self.free.insert(member, how);
    }

    /// The cheapest way in which all that wait end on hosts that take them; the draft has them nowhere, or at home.
    /// Also how many nodes that took.
    pub fn solve(mut self, wishes: Vec<Wish>) -> (Option<Found>, u32) {
        let nodes = self.nodes_left;
        for wish in &wishes {
            self.draft.relocate(wish.member, None);
            self.displaced.insert(wish.member);
        }
        // Who makes way takes as much elsewhere: all there is free must be enough in any case.
        let free = |sum: (u128, u128), host: HostId| {
            let (slot, occupied) = (self.draft.slot(host), self.draft.occupied(host));
            (sum.0 + u128::from(slot.memory_free(occupied)), sum.1 + u128::from(slot.cpu_free(occupied)))
        };
        let open = self.draft.fleet.host_ids.values().copied().filter(|host| !self.draft.is_closed(*host));
        let free = open.fold((0, 0), free);
        let need = wishes.iter().map(|wish| self.draft.size(wish.member));
        let need = need.fold((0, 0), |sum, size| (sum.0 + u128::from(size.0), sum.1 + u128::from(size.1)));
        if need.0 <= free.0 && need.1 <= free.1 {
            self.waiting = wishes;
            self.next();
        }
        (self.best, nodes - self.nodes_left)
    }

    fn next(&mut self) {
        if self.nodes_left == 0 || self.is_beaten(0) {
            return;
        }
        self.nodes_left -= 1;
        let Some(wish) = self.waiting.pop() else {
            self.nodes_left = self.nodes_left.saturating_sub(NODES_PER_ORDER);
            if (self.leads_there)(&self.placed) {
                self.best = Some(Found { cost: self.cost, targets: self.placed.clone() });
            }
            return;
        };
        for host in self.candidates(&wish) {
            self.try_at(&wish, host, 0);
        }
        self.waiting.push(wish);
    }

    fn is_beaten(&self, more: u64) -> bool {
        self.best.as_ref().is_some_and(|best| self.cost.saturating_add(more) >= best.cost)
    }

    fn ask(&self, wish: &Wish) -> Ask<'o> {
        Draft::among(self.draft.ask(wish.member, wish.how), self.among(wish))
    }

    /// Only what the caller asked for is bound to the hosts that were named; who makes way is not.
    fn among(&self, wish: &Wish) -> &'o [HostId] {
        let makes_way = self.draft.member(wish.member).home.is_some_and(|home| !self.draft.is_closed(home));
        if makes_way { &[] } else { self.among }
    }

    /// Puts it there, displacing who is in the way; `skip` of those have been tried already.
    fn try_at(&mut self, wish: &Wish, host: HostId, skip: usize) {
        let at_home = self.draft.member(wish.member).home == Some(host);
        let cost = if at_home { 0 } else { wish.cost };
        if self.nodes_left == 0 || self.is_beaten(cost) {
            return;
        }
        let Some(obstacles) = self.obstacles(wish, host, &self.ask(wish)) else { return };
        if !obstacles.full && !obstacles.apart {
            self.draft.relocate(wish.member, Some(host));
            self.cost += cost;
            if !at_home {
                self.placed.push((wish.member, host));
            }
            self.next();
            if !at_home {
                self.placed.pop();
            }
            self.cost -= cost;
            self.draft.relocate(wish.member, None);
            return;
        }
        let Some(mut blockers) = self.blockers(wish, host, obstacles.apart) else { return };
        let name = |blocker: &Blocker| &self.draft.member(blocker.member).container.name;
        blockers.sort_by(|a, b| (a.cost, name(a)).cmp(&(b.cost, name(b))));
        blockers.truncate(DISPLACED_OF_HOST);
        if self.displaced.len() > MAX_DISPLACED + self.free.len() {
            return;
        }
        for (at, blocker) in blockers.iter().enumerate().skip(skip) {
            self.nodes_left = self.nodes_left.saturating_sub(1);
            let free = self.free.get(&blocker.member).copied();
            let back = self.draft.relocate(blocker.member, None);
            self.displaced.insert(blocker.member);
            let how = free.unwrap_or(How::Live);
            self.waiting.push(Wish { member: blocker.member, how, cost: 0, place: Place::Elsewhere });
            self.cost += blocker.cost;
            // The list is made anew without this one, so what comes after it has moved up to its place.
            self.try_at(wish, host, if blocker.must_go { 0 } else { at });
            self.cost -= blocker.cost;
            self.waiting.pop();
            self.displaced.remove(&blocker.member);
            self.draft.relocate(blocker.member, back);
            if blocker.must_go {
                break;
            }
        }
    }

    /// What keeps it out for now; `None`: nobody's going would help.
    fn obstacles(&self, wish: &Wish, host: HostId, ask: &Ask<'_>) -> Option<Obstacles> {
        let mut obstacles = Obstacles::default();
        let mut hopeless = false;
        self.draft.against(host, ask, |why| match why {
            Why::Memory { .. } | Why::Cpu { .. } => {
                obstacles.full = true;
                ControlFlow::Continue(())
            }
            // Reasons to come that do not count for who is there.
            _ if wish.place == Place::Home => ControlFlow::Continue(()),
            Why::LayerStrict(_) | Why::LayerFull { .. } | Why::Group(_) => {
                obstacles.apart = true;
                ControlFlow::Continue(())
            }
            _ => {
                hopeless = true;
                ControlFlow::Break(())
            }
        });
        let known = &self.draft.slot(host).host;
        let too_small = ask.memory > known.memory.0 || ask.cpu > known.cpu_capacity();
        (!hopeless && !too_small).then_some(obstacles)
    }

    /// Who could make way, in no order; `None`: somebody must who cannot, or nobody can.
    fn blockers(&self, wish: &Wish, host: HostId, apart: bool) -> Option<Vec<Blocker>> {
        let mut blockers = Vec::new();
        for id in &self.draft.occupied(host).members {
            let (in_the_way, must_go) = self.keeps_out(wish.member, *id);
            if apart && !in_the_way {
                continue;
            }
            match self.cost_of_displacing(*id, host) {
                Some(cost) => blockers.push(Blocker { member: *id, cost, must_go }),
                None if must_go => return None,
                None => {}
            }
        }
        (!blockers.is_empty()).then_some(blockers)
    }

    /// Whether what is there keeps the other out, perhaps; whether it does for certain.
    fn keeps_out(&self, comes: MemberId, there: MemberId) -> (bool, bool) {
        let (comes, there) = (self.draft.member(comes), self.draft.member(there));
        let most = comes.container.most_per_host().filter(|_| comes.ties.layer == there.ties.layer);
        let in_group = comes.ties.groups.iter().any(|group| there.ties.groups.contains(group));
        (most.is_some() || in_group, most == Some(1) || in_group)
    }

    /// `None`: it stays whatever comes.
    fn cost_of_displacing(&self, id: MemberId, host: HostId) -> Option<u64> {
        let member = self.draft.member(id);
        if self.displaced.contains(&id) || self.draft.home(id) != Some(host) {
            return None;
        }
        if self.free.contains_key(&id) {
            return Some(0);
        }
        let movable = self.chains && member.container.unmovable.is_empty() && member.also.is_empty();
        let moved = member.home != Some(host);
        (movable && !moved && self.draft.dependents(id).is_empty()).then(|| member.container.move_cost())
    }

    /// Hosts worth trying, the best first.
    fn candidates(&mut self, wish: &Wish) -> Vec<HostId> {
        if wish.place == Place::Home {
            return self.draft.member(wish.member).home.into_iter().collect();
        }
        let ask = self.ask(wish);
        let count = self.draft.fleet.host_ids.len();
        self.nodes_left = self.nodes_left.saturating_sub((count / HOSTS_PER_NODE) as u32);
        let direct = (count > SMALL_FLEET).then(|| self.draft.best(&ask)).flatten();
        if let Some((host, _)) = direct {
            return vec![host];
        }
        let mut hosts: Vec<(u64, Score, HostId)> = Vec::new();
        for host in self.draft.fleet.host_ids.values().copied() {
            let Some(obstacles) = self.obstacles(wish, host, &ask) else { continue };
            let cheapest = if obstacles.full || obstacles.apart {
                let Some(blockers) = self.blockers(wish, host, obstacles.apart) else { continue };
                blockers.iter().map(|b| b.cost).min().map_or(0, |cost| cost.saturating_add(1))
            } else {
                0
            };
            hosts.push((cheapest, self.draft.score(host, &ask), host));
        }
        hosts.sort_by(|a, b| {
            let name = |host| &self.draft.slot(host).host.name;
            (a.0, a.1, name(a.2)).cmp(&(b.0, b.1, name(b.2)))
        });
        if count > SMALL_FLEET {
            hosts.truncate(CLEARED_HOSTS);
        }
        hosts.into_iter().map(|(_, _, host)| host).collect()
    }
}

/// Why somebody does not fit, as far as others could make way.
#[derive(Debug, Clone, Copy, Default)]
struct Obstacles {
    /// Memory or CPU.
    full: bool,
    /// A rule keeps it and somebody there apart.
    apart: bool,
}

#[derive(Debug, Clone, Copy)]
struct Blocker {
    member: MemberId,
    cost: u64,
    /// Without its going the other cannot come, whoever else goes.
    must_go: bool,
}
