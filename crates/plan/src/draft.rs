//! A fleet as it would be after some moves, without a copy of it: only hosts that change are copied.

use std::collections::{BTreeMap, BTreeSet};

use crate::fleet::{Fleet, GroupId, HostId, HostSlot, LayerId, Member, MemberId, Occupied, ZoneId};

#[derive(Debug, Clone)]
pub(crate) struct Draft<'f> {
    pub fleet: &'f Fleet,
    changed: BTreeMap<HostId, Occupied>,
    homes: BTreeMap<MemberId, Option<HostId>>,
    /// What has come to a zone less what has gone from it, of each layer.
    zones: BTreeMap<(LayerId, ZoneId), i64>,
    /// Hosts that take nothing, whatever their state says.
    closed: BTreeSet<HostId>,
    /// What a container reserves wherever it arrives, instead of what the fleet says; bytes, thousandths of a core.
    sizes: BTreeMap<MemberId, (u64, u64)>,
    /// Those of them that have arrived somewhere.
    resized: BTreeSet<MemberId>,
}

impl<'f> Draft<'f> {
    pub fn new(fleet: &'f Fleet) -> Self {
        Self {
            fleet,
            changed: BTreeMap::new(),
            homes: BTreeMap::new(),
            zones: BTreeMap::new(),
            closed: BTreeSet::new(),
            sizes: BTreeMap::new(),
            resized: BTreeSet::new(),
        }
    }

    pub fn close(&mut self, host: HostId) {
        self.closed.insert(host);
    }

    pub fn is_closed(&self, host: HostId) -> bool {
        self.closed.contains(&host)
    }

    pub fn slot(&self, host: HostId) -> &'f HostSlot {
        self.fleet.slot(host)
    }

    pub fn member(&self, member: MemberId) -> &'f Member {
        self.fleet.member(member)
    }

    pub fn occupied(&self, host: HostId) -> &Occupied {
        self.changed.get(&host).unwrap_or(&self.fleet.slot(host).occupied)
    }

    pub fn is_changed(&self, host: HostId) -> bool {
        !self.changed.is_empty() && self.changed.contains_key(&host)
    }

    pub fn changed(&self) -> impl Iterator<Item = HostId> {
        self.changed.keys().copied()
    }

    pub fn home(&self, member: MemberId) -> Option<HostId> {
        self.homes.get(&member).copied().unwrap_or_else(|| self.member(member).home)
    }

    /// What it reserves where it arrives next: bytes, thousandths of a core.
    pub fn size(&self, member: MemberId) -> (u64, u64) {
        self.sizes.get(&member).copied().unwrap_or_else(|| self.known_size(member))
    }

    fn known_size(&self, member: MemberId) -> (u64, u64) {
        let container = &self.member(member).container;
        (container.reserved_memory.0, u64::from(container.reserved_cpu.0))
    }

    /// Lets a container reserve something else wherever it arrives; where it is, it is as it was.
    pub fn resize_on_arrival(&mut self, member: MemberId, size: (u64, u64)) {
        self.sizes.insert(member, size);
    }

    /// Moves a container; `None`: to nowhere. Returns where it was, so that the change can be taken back.
    pub fn relocate(&mut self, member: MemberId, to: Option<HostId>) -> Option<HostId> {
        let from = self.home(member);
        let layer = self.member(member).ties.layer;
        if let Some(from) = from {
            let size = if self.resized.contains(&member) { self.size(member) } else { self.known_size(member) };
            let occupied = self.occupied_mut(from);
            if let Some(at) = occupied.members.iter().position(|m| *m == member) {
                occupied.members.swap_remove(at);
            }
            occupied.memory = occupied.memory.saturating_sub(size.0);
            occupied.cpu = occupied.cpu.saturating_sub(size.1);
            *self.zones.entry((layer, self.slot(from).zone)).or_default() -= 1;
        }
        if let Some(to) = to {
            let size = self.size(member);
            if self.sizes.contains_key(&member) {
                self.resized.insert(member);
            }
            let occupied = self.occupied_mut(to);
            occupied.members.push(member);
            occupied.memory = occupied.memory.saturating_add(size.0);
            occupied.cpu += size.1;
            *self.zones.entry((layer, self.slot(to).zone)).or_default() += 1;
        }
        self.homes.insert(member, to);
        from
    }

    fn occupied_mut(&mut self, host: HostId) -> &mut Occupied {
        let fleet = self.fleet;
        self.changed.entry(host).or_insert_with(|| fleet.slot(host).occupied.clone())
    }

    fn count(&self, host: HostId, but: Option<MemberId>, counts: impl Fn(&Member) -> bool) -> u32 {
        let members = self.occupied(host).members.iter();
        members.filter(|m| Some(**m) != but && counts(self.member(**m))).count() as u32
    }

    /// Containers of the layer on a host, other than `but`.
    pub fn of_layer(&self, host: HostId, layer: LayerId, but: Option<MemberId>) -> u32 {
        if self.is_changed(host) {
            return self.count(host, but, |m| m.ties.layer == layer);
        }
        let all = self.fleet.tables.layers[layer.at()].on.get(&host).copied().unwrap_or_default();
        all - u32::from(self.counts_itself(host, but, |m| m.ties.layer == layer))
    }

    /// Containers of the environment on a host, other than `but`.
    pub fn of_env(&self, host: HostId, env: crate::fleet::EnvId, but: Option<MemberId>) -> u32 {
        if self.is_changed(host) {
            return self.count(host, but, |m| m.ties.env == env);
        }
        let all = self.fleet.tables.envs[env.at()].on.get(&host).copied().unwrap_or_default();
        all - u32::from(self.counts_itself(host, but, |m| m.ties.env == env))
    }

    /// Members of the group on a host, other than `but`.
    pub fn of_group(&self, host: HostId, group: GroupId, but: Option<MemberId>) -> u32 {
        if self.is_changed(host) {
            return self.count(host, but, |m| m.ties.groups.contains(&group));
        }
        let all = self.fleet.tables.groups[group.at()].get(&host).copied().unwrap_or_default();
        all - u32::from(self.counts_itself(host, but, |m| m.ties.groups.contains(&group)))
    }

    /// Containers of the layer in a zone, other than `but`.
    pub fn of_zone(&self, zone: ZoneId, layer: LayerId, but: Option<MemberId>) -> u32 {
        let base = self.fleet.tables.layers[layer.at()].zones.get(&zone).copied().unwrap_or_default();
        let delta = if self.zones.is_empty() { 0 } else { self.zones.get(&(layer, zone)).copied().unwrap_or_default() };
        let own = but.map_or(0, |but| {
            let member = self.member(but);
            if member.ties.layer != layer {
                return 0;
            }
            let hosts = self.home(but).into_iter().chain(member.also.iter().copied());
            hosts.filter(|host| self.slot(*host).zone == zone).count() as i64
        });
        (i64::from(base) + delta - own).max(0) as u32
    }

    fn counts_itself(&self, host: HostId, but: Option<MemberId>, counts: impl Fn(&Member) -> bool) -> bool {
        but.is_some_and(|but| {
            let member = self.member(but);
            counts(member) && (self.home(but) == Some(host) || member.also.contains(&host))
        })
    }

    /// Containers that would miss a companion if `member` left its host.
    pub fn dependents(&self, member: MemberId) -> Vec<MemberId> {
        let layer = self.member(member).ties.layer;
        let Some(home) = self.home(member) else { return Vec::new() };
        if self.fleet.tables.layers[layer.at()].wanted_near == 0 || self.of_layer(home, layer, Some(member)) > 0 {
            return Vec::new();
        }
        let others = self.occupied(home).members.iter().copied().filter(|m| *m != member);
        others.filter(|m| self.home(*m) == Some(home) && self.member(*m).ties.near.contains(&layer)).collect()
    }
}
