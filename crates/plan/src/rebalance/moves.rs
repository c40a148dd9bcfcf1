//! The three reasons to move something.

use crate::fleet::{HostId, LayerId, MemberId, is_spread};
use crate::rank::Score;
use crate::rules::Ask;
use crate::step::How;

use super::{EMPTIEST, FULLEST, Purpose, Work};

type SpreadParts = (u32, u32, u32);

fn parts(score: &Score) -> SpreadParts {
    (score.of_layer, score.of_environment, score.of_layer_in_zone)
}

impl<'f> Work<'f, '_> {
    fn ask(&self, member: MemberId) -> Ask<'f> {
        self.draft.ask(member, How::Live)
    }

    /// What would be beside it on that host, also where its own spread does not ask for it: others' may.
    fn beside(&self, id: MemberId, host: HostId) -> SpreadParts {
        let ties = &self.draft.member(id).ties;
        let zone = self.draft.slot(host).zone;
        (
            self.draft.of_layer(host, ties.layer, Some(id)),
            self.draft.of_env(host, ties.env, Some(id)),
            self.draft.of_zone(zone, ties.layer, Some(id)),
        )
    }

    /// Layers whose containers could be spread more evenly. Returns whether the advice is full; so do the others.
    pub(super) fn repair_spread(&mut self) -> bool {
        let fleet = self.draft.fleet;
        let could = |id: &MemberId| {
            let member = fleet.member(*id);
            let home = self.draft.home(*id);
            is_spread(member.container.spread)
                && home.is_some_and(|home| self.could_be_better(*id, member.ties.layer, home))
        };
        let mut doubled: Vec<MemberId> = fleet.member_ids.values().copied().filter(could).collect();
        // Of those that are in each other's way the cheapest goes.
        doubled.sort_by_key(|id| fleet.member(*id).container.move_cost());
        for id in doubled {
            let Some(home) = self.draft.home(id) else { continue };
            let here = self.beside(id, home);
            if here == (0, 0, 0) || !self.may_move(id) {
                continue;
            }
            let Some((to, score)) = self.draft.best(&self.ask(id)) else { continue };
            let there = parts(&score);
            if there >= here {
                continue;
            }
            if self.is_full() {
                return true;
            }
            let fewer = if here.0 != there.0 {
                here.0 - there.0
            } else if here.1 != there.1 {
                here.1 - there.1
            } else {
                here.2 - there.2
            };
            let (layer, env, zone) = here;
            let reason = format!(
                "beside it are {layer} of its layer and {env} of its environment, {zone} of its layer in the zone; there {}, {} and {}",
                there.0, there.1, there.2
            );
            self.go(id, to, Purpose::Spread, u64::from(fewer), vec![reason]);
        }
        false
    }

    /// A quick look that spares most containers the search for a better host.
    fn could_be_better(&self, id: MemberId, layer: LayerId, home: HostId) -> bool {
        let member = self.draft.member(id);
        if self.draft.of_layer(home, layer, Some(id)) > 0 || self.draft.of_env(home, member.ties.env, Some(id)) > 0 {
            return true;
        }
        let in_zone = self.draft.of_zone(self.draft.slot(home).zone, layer, Some(id));
        in_zone > 0 && self.draft.fleet.index.zones().any(|zone| self.draft.of_zone(zone, layer, Some(id)) < in_zone)
    }

    /// Hosts that have been overloaded for the hold time.
    pub(super) fn relieve(&mut self) -> bool {
        let fleet = self.draft.fleet;
        let (policy, now_ms) = (self.policy, self.now_ms);
        for host in fleet.host_ids.values().copied() {
            let slot = fleet.slot(host);
            let held = slot.host.overloaded_since_ms.is_some_and(|at| at.saturating_add(policy.hold_ms) <= now_ms);
            if !slot.host.connected || !held {
                continue;
            }
            // Each turn moves one of its containers away, so there are at most as many turns as containers.
            loop {
                let parts = self.fullness.of(&self.draft, host);
                let overloaded = parts.used_cpu >= u64::from(policy.cpu_threshold_permille)
                    || parts.used_memory >= u64::from(policy.memory_threshold_permille);
                if !overloaded {
                    break;
                }
                match self.ease(host, Purpose::Overload) {
                    Eased::Moved => {}
                    Eased::No => break,
                    Eased::Full => return true,
                }
            }
        }
        false
    }

    /// Much fuller hosts than the emptiest.
    pub(super) fn level(&mut self) -> bool {
        // Each turn moves a container, which then rests.
        loop {
            let Some((least, _)) = self.fullness.by_reserved().next() else { return false };
            let gap = u64::from(self.policy.level_permille);
            let fullest = self.fullness.by_reserved().rev().take_while(|(full, _)| *full >= least + gap).take(FULLEST);
            let fullest: Vec<HostId> = fullest.map(|(_, host)| host).collect();
            let mut moved = false;
            for host in fullest {
                match self.ease(host, Purpose::Level) {
                    Eased::Moved => {
                        moved = true;
                        break;
                    }
                    Eased::No => {}
                    Eased::Full => return true,
                }
            }
            if !moved {
                return false;
            }
        }
    }

    /// Moves one container from a host to one of the emptiest: that with the most gain for its cost.
    fn ease(&mut self, host: HostId, purpose: Purpose) -> Eased {
        let parts = self.fullness.of(&self.draft, host);
        let full = parts.fullest();
        let gap = u64::from(self.policy.level_permille);
        let emptiest: Vec<HostId> = match purpose {
            Purpose::Level => {
                let far = self.fullness.by_reserved().take_while(|(empty, _)| empty + gap <= parts.reserved());
                far.take(EMPTIEST).map(|(_, host)| host).collect()
            }
            _ => self.fullness.emptiest().take(EMPTIEST).map(|(_, host)| host).collect(),
        };
        let mut best: Option<(u128, u64, MemberId, HostId)> = None;
        for id in self.draft.occupied(host).members.iter().copied() {
            if self.draft.home(id) != Some(host) || !self.may_move(id) {
                continue;
            }
            let ask = self.ask(id);
            let here = self.beside(id, host);
            let left = self.fullness.with(&self.draft, host, id, false).fullest();
            for to in emptiest.iter().copied() {
                let there = self.fullness.with(&self.draft, to, id, true).fullest();
                let gain = full.saturating_sub(left.max(there));
                if gain == 0 || gain < u64::from(self.policy.least_gain_permille) || !self.draft.fits(to, &ask) {
                    continue;
                }
                if self.beside(id, to) > here {
                    continue;
                }
                // Per million of cost, so that a fraction counts.
                let worth =
                    u128::from(gain) * 1_000_000 / u128::from(self.draft.member(id).container.move_cost().max(1));
                let name = |id| &self.draft.member(id).container.name;
                let better = best.is_none_or(|(best_worth, _, best_id, _)| {
                    (worth, std::cmp::Reverse(name(id))) > (best_worth, std::cmp::Reverse(name(best_id)))
                });
                if better {
                    best = Some((worth, gain, id, to));
                }
            }
        }
        let Some((_, gain, id, to)) = best else { return Eased::No };
        if self.is_full() {
            return Eased::Full;
        }
        let after = self.fullness.with(&self.draft, to, id, true).fullest();
        let (from, there) = (&self.draft.slot(host).host.name, &self.draft.slot(to).host.name);
        let reason = format!("{from} is full to {full}‰, {there} will be to {after}‰");
        self.go(id, to, purpose, gain, vec![reason]);
        Eased::Moved
    }
}

enum Eased {
    Moved,
    /// Nothing would help.
    No,
    /// Something would, but the advice is full.
    Full,
}
