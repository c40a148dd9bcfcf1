//! What can be asked of a fleet.

use godwit_model::{Bytes, ContainerName, HostName};

use super::{Container, DEFAULT_LINK, Fleet, FleetError, Host, HostId, HostSlot, Member, MemberId, Occupied};

/// Loads are compared in tenths: a finer order would let noise of measurements decide.
const LOAD_STEPS: u64 = 10;

impl Fleet {
    pub fn host(&self, name: &HostName) -> Option<&Host> {
        self.host_ids.get(name).map(|id| &self.slot(*id).host)
    }

    /// In order of their names.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.host_ids.values().map(|id| &self.slot(*id).host)
    }

    pub fn container(&self, name: &ContainerName) -> Option<&Container> {
        self.member_ids.get(name).map(|id| &self.member(*id).container)
    }

    /// In order of their names.
    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        self.member_ids.values().map(|id| &self.member(*id).container)
    }

    /// Where the container is; `None`: nowhere, or it is not known.
    pub fn home(&self, name: &ContainerName) -> Option<&HostName> {
        let home = self.member_ids.get(name).and_then(|id| self.member(*id).home)?;
        Some(&self.slot(home).host.name)
    }

    /// Further hosts on which room is held for it.
    pub fn claims(&self, name: &ContainerName) -> Vec<&HostName> {
        let also = self.member_ids.get(name).map(|id| &self.member(*id).also[..]).unwrap_or_default();
        also.iter().map(|id| &self.slot(*id).host.name).collect()
    }

    /// Everything that takes room on a host, in order of names.
    pub fn containers_on(&self, host: &HostName) -> Vec<&Container> {
        let members = self.host_ids.get(host).map(|id| &self.slot(*id).occupied.members[..]).unwrap_or_default();
        let mut found: Vec<&Container> = members.iter().map(|id| &self.member(*id).container).collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Memory of a host that no container has reserved.
    pub fn free_memory(&self, host: &HostName) -> Option<Bytes> {
        let slot = self.slot(*self.host_ids.get(host)?);
        Some(Bytes(slot.memory_free(&slot.occupied)))
    }

    /// CPU of a host that may still be reserved, overcommitment included, in thousandths of a core.
    pub fn free_cpu(&self, host: &HostName) -> Option<u64> {
        let slot = self.slot(*self.host_ids.get(host)?);
        Some(slot.cpu_free(&slot.occupied))
    }

    /// What part of each host is kept free for the loss of any one, in thousandths of its memory.
    pub fn reserve_permille(&self) -> u64 {
        self.reserve_permille
    }

    pub(crate) fn host_id(&self, name: &HostName) -> Result<HostId, FleetError> {
        self.host_ids.get(name).copied().ok_or_else(|| FleetError::NoSuchHost(name.clone()))
    }

    pub(crate) fn member_id(&self, name: &ContainerName) -> Result<MemberId, FleetError> {
        self.member_ids.get(name).copied().ok_or_else(|| FleetError::NoSuchContainer(name.clone()))
    }

    /// Ids are made here only and taken out of every table before their slot is emptied.
    #[allow(clippy::expect_used)]
    pub(crate) fn slot(&self, id: HostId) -> &HostSlot {
        self.hosts[id.at()].as_ref().expect("a host's number is used while the host is known")
    }

    #[allow(clippy::expect_used)]
    pub(crate) fn member(&self, id: MemberId) -> &Member {
        self.members[id.at()].as_ref().expect("a container's number is used while the container is known")
    }

    #[allow(clippy::expect_used)]
    pub(super) fn member_mut(&mut self, id: MemberId) -> &mut Member {
        self.members[id.at()].as_mut().expect("a container's number is used while the container is known")
    }

    /// Bytes free beyond what is kept for the loss of a host; negative: some of that is in use.
    pub(crate) fn room(&self, slot: &HostSlot, occupied: &Occupied) -> i64 {
        let kept = u128::from(slot.host.memory.0) * u128::from(self.reserve_permille) / 1000;
        let room = i128::from(slot.memory_free(occupied)) - kept as i128;
        room.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
    }
}

impl HostSlot {
    pub fn memory_free(&self, occupied: &Occupied) -> u64 {
        self.host.memory.0.saturating_sub(occupied.memory)
    }

    pub fn cpu_free(&self, occupied: &Occupied) -> u64 {
        self.host.cpu_capacity().saturating_sub(occupied.cpu)
    }

    /// The fullest of reserved memory, reserved CPU, measured memory and measured CPU, in tenths.
    pub fn load(&self, occupied: &Occupied) -> u8 {
        let tenths = |part: u64, whole: u64| match whole {
            0 => LOAD_STEPS,
            whole => (u128::from(part) * u128::from(LOAD_STEPS) / u128::from(whole)) as u64,
        };
        let measured = u64::from(self.host.cpu_load_permille.max(self.host.memory_load_permille));
        let reserved = tenths(occupied.memory, self.host.memory.0).max(tenths(occupied.cpu, self.host.cpu_capacity()));
        reserved.max(measured * LOAD_STEPS / 1000).min(LOAD_STEPS) as u8
    }

    /// What moves may use of its link, in bytes per second.
    pub fn link(&self) -> f64 {
        self.host.link_free.unwrap_or(DEFAULT_LINK).bytes_per_second().max(1.0)
    }
}
