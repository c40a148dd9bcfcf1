//! Forgets what hosts have let go of: containers that leave, records of removed containers and environments.

use godwit_model::ContainerName;
use godwit_model::event::EventKind;
use godwit_model::host::HostState;

use crate::core::Core;
use crate::state::records::{ContainerRecord, Leaving};
use crate::state::{About, StateError, Tx, Versioned, World};

/// The most records changed in one transaction.
const MAX_AT_ONCE: usize = 40;

pub async fn pass(core: &Core) -> Result<(), StateError> {
    core.state.transact(|world| Ok::<_, StateError>((decide(core, world), ()))).await.map(|_| ())
}

fn decide(core: &Core, world: &World) -> Tx {
    let mut tx = Tx::new();
    let mut changed = 0;
    let mut gone: Vec<&ContainerName> = Vec::new();
    for container in world.containers.values().filter(|c| !c.leaving.is_empty() || c.removed) {
        if changed == MAX_AT_ONCE {
            break;
        }
        let left: Vec<Leaving> =
            container.leaving.iter().filter(|l| held(core, world, container, l)).cloned().collect();
        if container.removed && left.is_empty() {
            tx.delete_container(container);
            tx.event(
                EventKind::ContainerRemoved,
                About::container(container.name(), None),
                format!("{} is removed", container.name()),
            );
            gone.push(container.name());
            changed += 1;
        } else if left.len() < container.leaving.len() {
            tx.put_container(Some(container), &ContainerRecord { leaving: left, ..container.value.clone() });
            changed += 1;
        }
    }
    for env in world.envs.values().filter(|env| env.deleted) {
        if world.containers_of(&env.manifest.name).all(|c| gone.contains(&c.name())) {
            tx.delete_env(env);
        }
    }
    tx
}

/// Whether the host may still hold it: until it reports without it, after it has seen that it is to go. A host that
/// is lost runs nothing, and learns what it has to remove when it comes back.
fn held(core: &Core, world: &World, container: &Versioned<ContainerRecord>, leaving: &Leaving) -> bool {
    if world.hosts.get(&leaving.host).is_some_and(|host| host.state == HostState::Failed) {
        return false;
    }
    match core.links.report(&leaving.host) {
        Some(report) if report.current => {
            report.applied_revision < container.revision.0 || report.containers.contains_key(&leaving.id)
        }
        _ => true,
    }
}
