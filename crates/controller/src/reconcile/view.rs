//! What placement sees: the store's records and the links, as `godwit_plan` wants them.

use godwit_model::HostName;
use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::migration::Outcome;
use godwit_plan::{HostView, Placed, Request, View};

use crate::core::Core;
use crate::state::World;
use crate::state::records::ContainerRecord;

/// Every host with what is there, on its way there, or not gone yet.
pub fn plan_view(core: &Core, world: &World) -> View {
    View { hosts: world.hosts.keys().filter_map(|name| host(core, world, name)).collect() }
}

fn host(core: &Core, world: &World, name: &HostName) -> Option<HostView> {
    let record = world.hosts.get(name)?;
    let arriving = |c: &ContainerRecord| {
        world.open_moves().any(|m| m.container == c.spec.id && m.to == *name && m.outcome == Outcome::Moving)
    };
    let leaving = |c: &ContainerRecord| c.leaving.iter().any(|l| l.host == *name);
    let here = world.containers.values().filter(|c| c.host.as_ref() == Some(name) || arriving(c) || leaving(c));
    Some(HostView {
        name: name.clone(),
        active: record.state == HostState::Active,
        connected: core.links.connected(name),
        memory: record.facts.memory,
        cpu: record.facts.cpus,
        placed: here.map(|c| placed(c)).collect(),
    })
}

pub fn placed(container: &ContainerRecord) -> Placed {
    Placed {
        name: container.name().clone(),
        reserved_memory: container.spec.resources.reserved_memory,
        reserved_cpu: container.spec.resources.reserved_cpu,
    }
}

/// What a container asks of its place.
pub fn request(world: &World, container: &ContainerRecord) -> Request {
    let name = container.name();
    let layer = world.envs.get(&name.env).and_then(|env| env.manifest.layers.get(&name.layer));
    Request {
        name: name.clone(),
        resources: container.spec.resources,
        spread: layer.map_or(Spread::default(), |layer| layer.spread),
        only: container.volumes_on.clone(),
        not: None,
    }
}
