//! What a decision is made from.

use godwit_model::container::Resources;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, ContainerName, EnvName, HostName, LayerName, MilliCpu};

/// How often the CPU of a host may be reserved: reservations of CPU are shares, and an idle share is everyone's.
/// Memory is never overcommitted.
pub const CPU_OVERCOMMIT: u32 = 4;

/// Every host and everything placed on them, moves in flight included on both sides.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct View {
    pub hosts: Vec<HostView>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HostView {
    pub name: HostName,
    /// Takes new containers: not cordoned.
    pub active: bool,
    pub connected: bool,
    pub memory: Bytes,
    pub cpu: MilliCpu,
    pub placed: Vec<Placed>,
}

/// One container that has a place on a host.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub name: ContainerName,
    pub reserved_memory: Bytes,
    pub reserved_cpu: MilliCpu,
}

/// One container that needs a place.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub name: ContainerName,
    pub resources: Resources,
    pub spread: Spread,
    /// Only this host will do (its volumes are there); `None`: any.
    pub only: Option<HostName>,
    /// Not this host (it is to be moved away from there).
    pub not: Option<HostName>,
}

impl HostView {
    /// Memory that no container has reserved.
    pub fn free_memory(&self) -> Bytes {
        let reserved = self.placed.iter().fold(0u64, |sum, p| sum.saturating_add(p.reserved_memory.0));
        Bytes(self.memory.0.saturating_sub(reserved))
    }

    /// CPU that may still be reserved, in thousandths of a core, overcommitment included.
    pub fn free_cpu(&self) -> u64 {
        let reserved: u64 = self.placed.iter().map(|p| u64::from(p.reserved_cpu.0)).sum();
        self.cpu_capacity().saturating_sub(reserved)
    }

    /// CPU that may be reserved in all, in thousandths of a core.
    pub fn cpu_capacity(&self) -> u64 {
        u64::from(self.cpu.0) * u64::from(CPU_OVERCOMMIT)
    }

    /// Containers of this layer here, other than `but`.
    pub fn of_layer(&self, env: &EnvName, layer: &LayerName, but: &ContainerName) -> usize {
        self.placed.iter().filter(|p| p.name.env == *env && p.name.layer == *layer && p.name != *but).count()
    }

    /// Containers of this environment here, other than `but`.
    pub fn of_env(&self, env: &EnvName, but: &ContainerName) -> usize {
        self.placed.iter().filter(|p| p.name.env == *env && p.name != *but).count()
    }
}
