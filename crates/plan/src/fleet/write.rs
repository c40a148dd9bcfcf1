//! What changes a fleet.

use std::cmp::Reverse;
use std::sync::Arc;

use godwit_model::{ContainerName, HostName};

use super::{Container, Count, Fleet, FleetError, Host, HostId, HostSlot, Key, Member, MemberId, Ties, lower, raise};

impl Fleet {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a host, or changes what is known of it; its containers stay.
    pub fn set_host(&mut self, host: Host) {
        let id = match self.host_ids.get(&host.name) {
            Some(id) => {
                let id = *id;
                self.forget_host(id, &host);
                id
            }
            None => self.free_hosts.pop().unwrap_or_else(|| {
                self.hosts.push(None);
                HostId::of(self.hosts.len() - 1)
            }),
        };
        let zone = self.tables.zone(host.zone());
        let machine = self.tables.machine(&host.machine);
        let before = self.hosts[id.at()].take();
        let occupied = before.map(|slot| slot.occupied).unwrap_or_default();
        let mut images = Count::new();
        for name in &host.images {
            raise(&mut images, self.tables.image(name));
        }
        for member in occupied.members.iter().filter_map(|m| self.members[m.at()].as_ref()) {
            member.ties.image.iter().for_each(|image| raise(&mut images, *image));
        }
        for (label, value) in &host.labels {
            self.labelled.entry(label.clone()).or_default().entry(value.clone()).or_default().insert(id);
        }
        let takes = host.state.takes_containers() && host.connected;
        let memory = host.memory.0;
        let name = Arc::new(host.name.clone());
        self.host_ids.insert(host.name.clone(), id);
        self.hosts[id.at()] = Some(HostSlot { host, name, zone, machine, occupied, images, key: None });
        if takes {
            raise(&mut self.sizes, memory);
            self.size_sum += u128::from(memory);
        }
        self.refresh_reserve();
        self.reindex(id);
    }

    /// What was measured of a host, in thousandths of what it has, and since when that is too much.
    pub fn measure(
        &mut self,
        name: &HostName,
        cpu_permille: u16,
        memory_permille: u16,
        overloaded_since_ms: Option<u64>,
    ) -> Result<(), FleetError> {
        let id = self.host_id(name)?;
        if let Some(slot) = self.hosts[id.at()].as_mut() {
            slot.host.cpu_load_permille = cpu_permille;
            slot.host.memory_load_permille = memory_permille;
            slot.host.overloaded_since_ms = overloaded_since_ms;
        }
        self.reindex(id);
        Ok(())
    }

    /// Takes the host's traces out of indexes, and its containers out of zones if the zone changes.
    fn forget_host(&mut self, id: HostId, next: &Host) {
        let next_zone = self.tables.zone(next.zone());
        let Some(slot) = self.hosts[id.at()].as_mut() else { return };
        if let Some(key) = slot.key.take() {
            self.index.remove(slot.zone, slot.images.keys().copied(), &key);
            lower(&mut self.sizes, &slot.host.memory.0);
            self.size_sum -= u128::from(slot.host.memory.0);
        }
        if slot.zone != next_zone {
            for member in slot.occupied.members.iter().filter_map(|m| self.members[m.at()].as_ref()) {
                let zones = &mut self.tables.layers[member.ties.layer.at()].zones;
                lower(zones, &slot.zone);
                raise(zones, next_zone);
            }
        }
        for (label, value) in &slot.host.labels {
            if let Some(hosts) = self.labelled.get_mut(label).and_then(|values| values.get_mut(value)) {
                hosts.remove(&id);
            }
        }
    }

    /// Removes a host on which nothing is.
    pub fn remove_host(&mut self, name: &HostName) -> Result<(), FleetError> {
        let id = self.host_id(name)?;
        let slot = self.slot(id);
        if !slot.occupied.members.is_empty() {
            return Err(FleetError::HostHasContainers { host: name.clone(), containers: slot.occupied.members.len() });
        }
        let host = slot.host.clone();
        self.forget_host(id, &host);
        self.hosts[id.at()] = None;
        self.host_ids.remove(name);
        self.free_hosts.push(id);
        self.refresh_reserve();
        Ok(())
    }

    /// Adds a container, which is on no host yet, or changes what is known of it; it stays where it is.
    pub fn set_container(&mut self, container: Container) {
        let known = self.member_ids.get(&container.name).copied();
        let (mut home, mut also) = (None, Vec::new());
        if let Some(id) = known
            && let Some(member) = self.members[id.at()].clone()
        {
            (home, also) = (member.home, member.also.clone());
            member.home.iter().chain(&member.also).for_each(|host| self.leave(id, *host));
            self.want_near(&member.ties, false);
        }
        let id = known.or_else(|| self.free_members.pop()).unwrap_or_else(|| {
            self.members.push(None);
            MemberId::of(self.members.len() - 1)
        });
        let ties = self.tables.ties(&container);
        self.want_near(&ties, true);
        self.member_ids.insert(container.name.clone(), id);
        let hosts: Vec<HostId> = home.iter().chain(&also).copied().collect();
        self.members[id.at()] = Some(Member { container, ties, home, also });
        hosts.into_iter().for_each(|host| self.arrive(id, host));
    }

    fn want_near(&mut self, ties: &Ties, more: bool) {
        for layer in &ties.near {
            let wanted = &mut self.tables.layers[layer.at()].wanted_near;
            *wanted = if more { *wanted + 1 } else { wanted.saturating_sub(1) };
        }
    }

    /// Forgets a container, wherever it is.
    pub fn remove_container(&mut self, name: &ContainerName) -> Result<(), FleetError> {
        let id = self.member_id(name)?;
        self.take(name)?;
        if let Some(member) = self.members[id.at()].take() {
            self.want_near(&member.ties, false);
        }
        self.member_ids.remove(name);
        self.free_members.push(id);
        Ok(())
    }

    /// The container is on this host and nowhere else.
    pub fn put(&mut self, name: &ContainerName, host: &HostName) -> Result<(), FleetError> {
        let at = self.host_id(host)?;
        self.take(name)?;
        let id = self.member_id(name)?;
        self.member_mut(id).home = Some(at);
        self.arrive(id, at);
        Ok(())
    }

    /// The container is on no host.
    pub fn take(&mut self, name: &ContainerName) -> Result<(), FleetError> {
        let id = self.member_id(name)?;
        let member = self.member_mut(id);
        let (home, also) = (member.home.take(), std::mem::take(&mut member.also));
        home.into_iter().chain(also).for_each(|host| self.leave(id, host));
        Ok(())
    }

    /// Holds room for the container on a further host: it is moving there, or is not gone from there yet.
    pub fn claim(&mut self, name: &ContainerName, host: &HostName) -> Result<(), FleetError> {
        let (id, at) = (self.member_id(name)?, self.host_id(host)?);
        if !self.member(id).is_on(at) {
            self.member_mut(id).also.push(at);
            self.arrive(id, at);
        }
        Ok(())
    }

    /// Gives back what [`Fleet::claim`] held.
    pub fn release(&mut self, name: &ContainerName, host: &HostName) -> Result<(), FleetError> {
        let (id, at) = (self.member_id(name)?, self.host_id(host)?);
        let member = self.member_mut(id);
        let Some(found) = member.also.iter().position(|h| *h == at) else {
            return Err(FleetError::NotThere { container: name.clone(), host: host.clone() });
        };
        member.also.remove(found);
        self.leave(id, at);
        Ok(())
    }

    fn arrive(&mut self, id: MemberId, at: HostId) {
        let (Some(member), Some(slot)) = (&self.members[id.at()], &mut self.hosts[at.at()]) else { return };
        slot.occupied.add(id, &member.container);
        self.tables.arrive(&member.ties, at, slot.zone);
        if let Some(image) = member.ties.image {
            raise(&mut slot.images, image);
            if let Some(key) = slot.key.as_ref().filter(|_| slot.images[&image] == 1) {
                self.index.insert_image(slot.zone, image, key);
            }
        }
        self.reindex(at);
    }

    fn leave(&mut self, id: MemberId, at: HostId) {
        let (Some(member), Some(slot)) = (&self.members[id.at()], &mut self.hosts[at.at()]) else { return };
        slot.occupied.remove(id, &member.container);
        self.tables.leave(&member.ties, at, slot.zone);
        if let Some(image) = member.ties.image {
            lower(&mut slot.images, &image);
            if let Some(key) = slot.key.as_ref().filter(|_| !slot.images.contains_key(&image)) {
                self.index.remove_image(slot.zone, image, key);
            }
        }
        self.reindex(at);
    }

    /// Puts a host where it belongs by what it has now.
    fn reindex(&mut self, id: HostId) {
        let key = self.key_of(id);
        let Some(slot) = self.hosts[id.at()].as_mut().filter(|slot| slot.key != key) else { return };
        if let Some(old) = slot.key.take() {
            self.index.remove(slot.zone, slot.images.keys().copied(), &old);
        }
        if let Some(new) = &key {
            self.index.insert(slot.zone, slot.images.keys().copied(), new);
        }
        slot.key = key;
    }

    fn key_of(&self, id: HostId) -> Option<Key> {
        let slot = self.hosts[id.at()].as_ref()?;
        if !(slot.host.state.takes_containers() && slot.host.connected) {
            return None;
        }
        Some(Key {
            load: slot.load(&slot.occupied),
            room: Reverse(self.room(slot, &slot.occupied)),
            cpu_free: Reverse(slot.cpu_free(&slot.occupied)),
            name: slot.name.clone(),
            id,
        })
    }

    /// The loss of any one host fits into what the others keep free if each keeps the largest host's part of all
    /// memory free. In thousandths, rounded up, so that a large fleet is not sorted anew with every host that comes.
    fn refresh_reserve(&mut self) {
        let largest = self.sizes.keys().next_back().copied().unwrap_or_default();
        let permille = match self.size_sum {
            0 => 0,
            sum => (u128::from(largest) * 1000).div_ceil(sum) as u64,
        };
        if permille != self.reserve_permille {
            self.reserve_permille = permille;
            (0..self.hosts.len()).for_each(|at| self.reindex(HostId::of(at)));
        }
    }
}
