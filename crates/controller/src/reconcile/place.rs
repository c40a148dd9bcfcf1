//! Gives every container without a host one, once what it depends on is there and what it replaces is gone.

use std::collections::BTreeMap;

use godwit_model::container::{ContainerState, Health};
use godwit_model::event::EventKind;
use godwit_model::manifest::Dependency;
use godwit_model::{ContainerName, HostName, LayerName};
use godwit_plan::{Container, Fleet};

use super::view;
use crate::core::Core;
use crate::state::records::{ContainerRecord, EnvRecord};
use crate::state::{About, Shared, StateError, Tx, World};

/// The most containers placed in one transaction: with each of them goes an event, and the store bounds both.
const MAX_AT_ONCE: usize = 40;

type Reasons = BTreeMap<ContainerName, String>;

pub async fn pass(core: &Core) -> Result<(), StateError> {
    let (reasons, _) = {
        let _alone = core.placing.lock().await;
        core.state.transact(|world| Ok::<_, StateError>(decide(core, world))).await?
    };
    let new = core.waiting.replace(reasons);
    if new.is_empty() {
        return Ok(());
    }
    let tell = |_: &World| {
        let mut tx = Tx::new();
        for (name, reason) in new.iter().take(MAX_AT_ONCE) {
            tx.event(EventKind::ContainerNotPlaced, About::container(name, None), format!("{name} waits: {reason}"));
        }
        Ok::<_, StateError>((tx, ()))
    };
    core.state.transact(tell).await.map(|_| ())
}

/// Places what can be placed; the reasons of what cannot.
fn decide(core: &Core, world: &World) -> (Tx, Reasons) {
    let mut tx = Tx::new();
    let mut reasons = Reasons::new();
    let mut waiting: Vec<_> = world.containers.values().filter(|c| c.host.is_none() && !c.removed && c.run).collect();
    if waiting.is_empty() {
        return (tx, reasons);
    }
    waiting.sort_by_cached_key(|c| view::turn(world, c.name()));
    let mut fleet = view::fleet(core, world);
    let mut placed = 0;
    for container in waiting {
        if placed == MAX_AT_ONCE {
            break;
        }
        let name = container.name();
        if let Some(reason) = held_back(core, world, container) {
            reasons.insert(name.clone(), reason);
            continue;
        }
        let member = view::member(core, world, container, None);
        let place = match missed(world, &fleet, &member) {
            Some(found) => Ok(found),
            None => fleet.place(&member).map(|placement| (placement.host, placement.reasons)),
        };
        match place {
            Ok((host, why)) => {
                if let Err(error) = fleet.put(name, &host) {
                    // The fleet was made of this world, so it has both.
                    tracing::error!(%error, "a container is missing in what placement sees");
                }
                let volumes_on = (!container.spec.volumes.is_empty()).then(|| host.clone());
                let record = ContainerRecord { host: Some(host.clone()), volumes_on, ..container.value.clone() };
                tx.put_container(Some(container), &record);
                let message = format!("{name} goes to {host}: {}", why.join("; "));
                tx.event(EventKind::ContainerPlaced, About::container(name, Some(&host)), message);
                placed += 1;
            }
            Err(refusal) => {
                reasons.insert(name.clone(), refusal.to_string());
            }
        }
    }
    (tx, reasons)
}

/// The host, if it may be there, of a container that must be near one like this and has none: what is made anew comes
/// back to those that stayed.
fn missed(world: &World, fleet: &Fleet, member: &Container) -> Option<(HostName, Vec<String>)> {
    let layer = &member.name.layer;
    let of_env = || world.containers_of(&member.name.env).filter(|c| c.owner().is_some());
    let near = |c: &&Shared<ContainerRecord>| fleet.container(c.name()).is_some_and(|c| c.near.contains(layer));
    of_env().filter(near).find_map(|waits| {
        let host = waits.owner()?;
        let has_one = of_env().any(|c| c.name().layer == *layer && c.owner() == Some(host));
        let free = !has_one && fleet.check(member, host).is_ok();
        free.then(|| (host.clone(), vec![format!("{} is there and must be near it", waits.name())]))
    })
}

/// Why this container is not placed yet, whatever room there is.
fn held_back(core: &Core, world: &World, container: &ContainerRecord) -> Option<String> {
    if !container.leaving.is_empty() {
        let hosts: Vec<&str> = container.leaving.iter().map(|l| l.host.as_str()).collect();
        return Some(format!("what it replaces is not gone yet from {}", hosts.join(", ")));
    }
    let name = container.name();
    let env = world.envs.get(&name.env)?;
    let layer = env.manifest.layers.get(&name.layer)?;
    layer.depends_on.iter().find_map(|(on, how)| unmet(core, world, env, on, *how))
}

fn unmet(core: &Core, world: &World, env: &EnvRecord, on: &LayerName, how: Dependency) -> Option<String> {
    let members = world.containers_of(&env.manifest.name).filter(|c| c.name().layer == *on && !c.removed);
    for member in members {
        let status = member.owner().and_then(|host: &HostName| core.links.report(host));
        let status = status.and_then(|report| report.containers.get(&member.spec.id).cloned());
        let (met, wanted) = match how {
            Dependency::Started => {
                (status.is_some_and(|s| matches!(s.state, ContainerState::Running | ContainerState::Frozen)), "running")
            }
            Dependency::Healthy => {
                let has_check = member.spec.health.is_some();
                let met = |s: godwit_model::container::ContainerStatus| match s.state {
                    ContainerState::Running | ContainerState::Frozen => !has_check || s.health == Some(Health::Healthy),
                    _ => false,
                };
                (status.is_some_and(met), "healthy")
            }
            Dependency::CompletedSuccessfully => {
                let met = |s: godwit_model::container::ContainerStatus| {
                    s.state == ContainerState::Stopped && s.exit.is_some_and(|e| e.code == 0)
                };
                (status.is_some_and(met), "done with exit code 0")
            }
        };
        if !met {
            return Some(format!("{} is not {wanted} yet", member.name()));
        }
    }
    None
}
