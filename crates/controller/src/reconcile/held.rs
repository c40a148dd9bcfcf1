//! Room that is held for containers that are to grow: everything that decides about places counts it as taken.
//!
//! A grower holds what it will have where it will have it (in the store), and each step of its plan that has not begun
//! holds its place (in memory: a controller that was restarted plans anew).

use godwit_model::container::Resources;
use godwit_model::migration::Cause;
use godwit_model::{ContainerName, HostName};
use godwit_plan::{Container, Fleet};

use crate::core::Core;
use crate::state::World;

/// Whose holds are not counted: nobody stands in his own way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spared<'a> {
    /// What is held for this container.
    pub container: Option<&'a ContainerName>,
    /// What is held on behalf of this grower.
    pub grower: Option<&'a ContainerName>,
    /// What is held for containers of this host: they have to leave it, whatever else was planned for them.
    pub host: Option<&'a HostName>,
}

impl<'a> Spared<'a> {
    /// A move of `container`.
    pub fn of_move(container: &'a ContainerName, cause: Option<&'a Cause>) -> Self {
        let grower = match cause {
            Some(Cause::Room { grower }) => Some(grower),
            _ => None,
        };
        Self { container: Some(container), grower, host: None }
    }

    /// The plan of a grower.
    pub fn of_plan(grower: &'a ContainerName) -> Self {
        Self { container: Some(grower), grower: Some(grower), host: None }
    }

    /// The plan that empties a host.
    pub fn of_evacuation(host: &'a HostName) -> Self {
        Self { host: Some(host), ..Self::default() }
    }
}

/// `container` has room on `host`.
struct Held {
    container: ContainerName,
    host: HostName,
    /// What it will have there, where that is not what it has.
    resources: Option<Resources>,
}

fn all(core: &Core, world: &World, spared: Spared<'_>) -> Vec<Held> {
    let mut held = Vec::new();
    for (grower, record) in world.containers.iter().filter(|(name, _)| Some(*name) != spared.grower) {
        let Some(growth) = record.growth.as_ref().filter(|_| record.owner().is_some()) else { continue };
        let own = growth.host.iter().map(|host| Held {
            container: grower.clone(),
            host: host.clone(),
            resources: Some(growth.resources),
        });
        held.extend(own);
        let steps = core.rooms.steps(grower).into_iter();
        held.extend(steps.map(|(container, host)| Held { container, host, resources: None }));
    }
    let is_on = |name: &ContainerName, host| world.containers.get(name).is_some_and(|c| c.owner() == Some(host));
    held.retain(|held| {
        let leaves = spared.host.is_some_and(|host| is_on(&held.container, host));
        !leaves && Some(&held.container) != spared.container
    });
    held
}

/// Counts what is held in a fleet. A grower that will be elsewhere is counted as large where it is, too: little is lost
/// by that, as it does not fit there.
pub fn count(core: &Core, world: &World, spared: Spared<'_>, fleet: &mut Fleet) {
    for held in all(core, world, spared) {
        let Some(container) = fleet.container(&held.container).cloned() else { continue };
        if let Some(resources) = held.resources {
            let (reserved_memory, reserved_cpu) = (resources.reserved_memory, resources.reserved_cpu);
            fleet.set_container(Container { reserved_memory, reserved_cpu, ..container });
        }
        if fleet.host(&held.host).is_some()
            && let Err(error) = fleet.claim(&held.container, &held.host)
        {
            tracing::error!(%error, "held room is missing in what plans see");
        }
    }
}
