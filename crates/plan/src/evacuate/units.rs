//! What leaves a host: containers one by one, or several together where they must be near each other.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use godwit_model::manifest::Spread;

use crate::draft::Draft;
use crate::fleet::{Fleet, HostId, LayerId, MemberId};
use crate::step::{How, Stay};

/// The most containers that go as one.
const MAX_TOGETHER: usize = 16;

pub(super) struct Unit {
    /// Those that others must be near come first.
    pub members: Vec<(MemberId, How)>,
}

/// What leaves the host, what is hardest to place first, and what does not.
pub(super) fn of_host(fleet: &Fleet, host: HostId, allow_restart: bool) -> (Vec<(MemberId, How)>, Vec<Stay>) {
    let mut stays = Vec::new();
    let mut leaving: Vec<(MemberId, How)> = Vec::new();
    let mut here = fleet.slot(host).occupied.members.clone();
    here.sort_by(|a, b| fleet.member(*a).container.name.cmp(&fleet.member(*b).container.name));
    for id in here {
        match how(fleet, host, id, allow_restart) {
            Ok(how) => leaving.push((id, how)),
            Err(reasons) => stays.push(Stay { container: fleet.member(id).container.name.clone(), reasons }),
        }
    }
    leaving.sort_by_cached_key(|(id, _)| {
        let c = &fleet.member(*id).container;
        let rules = c.labels.len() + c.near.len() + c.apart.len() + usize::from(c.spread == Spread::Strict);
        (Reverse(rules), Reverse(c.reserved_memory), c.name.clone())
    });
    (leaving, stays)
}

/// How it would go, or why it does not.
fn how(fleet: &Fleet, host: HostId, id: MemberId, allow_restart: bool) -> Result<How, Vec<String>> {
    let member = fleet.member(id);
    if member.home != Some(host) {
        return Err(vec!["a move of it to or from here has not ended yet".to_owned()]);
    }
    if !member.also.is_empty() {
        return Err(vec!["it is being moved already".to_owned()]);
    }
    let container = &member.container;
    if container.unmovable.is_empty() {
        return Ok(How::Live);
    }
    let mut reasons = container.unmovable.clone();
    if container.volumes_on.is_some() && !container.may_recreate_volumes {
        reasons.push("a restart elsewhere would leave its volumes behind".to_owned());
    } else if allow_restart {
        return Ok(How::Restart);
    } else {
        reasons.push("it could be restarted elsewhere if that were allowed".to_owned());
    }
    Err(reasons)
}

/// It and all that would miss it, or that it would miss and that would be left without it.
fn closure(draft: &Draft<'_>, first: MemberId) -> BTreeSet<MemberId> {
    let mut all = BTreeSet::from([first]);
    let mut waiting = vec![first];
    while let Some(member) = waiting.pop() {
        let mut next = draft.dependents(member);
        let Some(home) = draft.home(member) else { continue };
        // Its companion, if it is the only one here: then that one takes it along.
        for other in &draft.occupied(home).members {
            if draft.dependents(*other).contains(&member) {
                next.push(*other);
            }
        }
        waiting.extend(next.into_iter().filter(|m| all.insert(*m)));
    }
    all
}

impl Unit {
    /// The container with what must go along, as the draft has them now. `None`: not all of them can go.
    pub fn of(draft: &Draft<'_>, first: MemberId, leaving: &[(MemberId, How)]) -> Option<Self> {
        let all = closure(draft, first);
        let mut members: Vec<(MemberId, How)> = leaving.iter().filter(|(m, _)| all.contains(m)).copied().collect();
        if members.len() < all.len() || all.len() > MAX_TOGETHER {
            return None;
        }
        let wanted: BTreeSet<LayerId> =
            members.iter().flat_map(|(m, _)| draft.member(*m).ties.near.iter().copied()).collect();
        members.sort_by_key(|(m, _)| !wanted.contains(&draft.member(*m).ties.layer));
        Some(Self { members })
    }

    /// The best host for all of it, by what its first wants.
    pub fn host(&self, draft: &Draft<'_>, among: &[HostId]) -> Option<HostId> {
        let (first, how) = self.members[0];
        let ask = Draft::among(draft.ask(first, how), among);
        if self.members.len() == 1 {
            return draft.best(&ask).map(|(host, _)| host);
        }
        let hosts = draft.fleet.host_ids.values().copied();
        let fitting = hosts.filter(|host| draft.take_together(*host, &self.members, among));
        fitting.min_by_key(|host| (draft.score(*host, &ask), &draft.slot(*host).host.name))
    }
}
