//! What services claim of each other and of their environment.

use std::collections::{BTreeMap, BTreeSet};

use super::Dependency;
use super::service::Service;
use super::text::nearest;
use crate::container::RestartPolicy;
use crate::ids::LayerName;

/// Services by name, in the order of the file.
pub(super) type Services<'s, 'a> = &'s [(LayerName, Service<'a>)];

pub(super) fn all(services: Services<'_, '_>, volumes: &BTreeSet<String>, network: &str) {
    ports(services);
    volume_claims(services, volumes);
    networks(services, network);
    names(services);
    dependencies(services);
}

/// A port of the hosts leads to one layer.
fn ports(services: Services<'_, '_>) {
    let mut taken = BTreeMap::new();
    for (name, service) in services {
        for (port, field) in &service.ports {
            let protocol = if port.udp { "udp" } else { "tcp" };
            let first = taken.entry((port.host_port, port.udp)).or_insert((name, field));
            if first.1.path != field.path {
                field.error_hint::<()>(
                    format!("port {}/{protocol} of the hosts is published by {} already", port.host_port, first.0),
                    "choose another port on the hosts",
                );
            }
        }
    }
}

/// A volume is declared, and belongs to one layer.
fn volume_claims(services: Services<'_, '_>, declared: &BTreeSet<String>) {
    let mut owners: BTreeMap<&str, &LayerName> = BTreeMap::new();
    for (name, service) in services {
        for (volume, field) in &service.volumes {
            if !declared.contains(volume) {
                let hint = match nearest(volume, declared.iter().map(String::as_str)) {
                    Some(near) => format!("did you mean {near:?}?"),
                    None => format!(
                        "declare it at the end of the file, volumes: {{{volume}: {{}}}}, or write ./{volume} for a path on the host"
                    ),
                };
                field.error_hint::<()>(format!("the volume {volume:?} is not declared"), hint);
            }
            let owner = *owners.entry(volume).or_insert(name);
            if owner != name {
                field.error_hint::<()>(
                    format!("the volume {volume:?} belongs to {owner} already: each container has its own instance on its own host, so two services would not see the same files"),
                    "declare a second volume, or let the services talk over the network",
                );
            }
        }
    }
}

fn networks(services: Services<'_, '_>, network: &str) {
    for (_, service) in services {
        for (name, field) in &service.networks {
            if name != network {
                field.error_hint::<()>(
                    format!("the network {name:?} does not exist"),
                    format!("an environment has one private network, here {network:?}; leave networks out to use it"),
                );
            }
        }
    }
}

/// Layers, further names and containers (`db-1`) are answered by the same DNS.
fn names(services: Services<'_, '_>) {
    let layers: BTreeSet<&str> = services.iter().map(|(name, _)| name.as_str()).collect();
    let container_of = |name: &str| {
        let (layer, number) = name.rsplit_once('-')?;
        let numbered = !number.starts_with('0') && number.parse::<u32>().is_ok();
        (numbered && layers.contains(layer)).then(|| layer.to_owned())
    };
    let mut aliases: BTreeMap<&str, &LayerName> = BTreeMap::new();
    for (name, service) in services {
        if let Some(layer) = container_of(name.as_str()) {
            service.field.key_error::<()>(
                format!("{name} is also the name of a container of {layer}"),
                Some("choose another name".to_owned()),
            );
        }
        for (alias, field) in &service.aliases {
            let owner = *aliases.entry(alias.as_str()).or_insert(name);
            let taken = if let Some(layer) = container_of(alias.as_str()) {
                format!("a container of {layer}")
            } else if layers.contains(alias.as_str()) {
                "a service".to_owned()
            } else if owner != name {
                format!("{owner} too")
            } else {
                continue;
            };
            field.error_hint::<()>(format!("{alias} is the name of {taken}"), "choose another name");
        }
    }
}

fn dependencies(services: Services<'_, '_>) {
    let by_name: BTreeMap<&str, &Service<'_>> = services.iter().map(|(name, s)| (name.as_str(), s)).collect();
    for (name, service) in services {
        let mut seen = BTreeSet::new();
        for (on, condition, field) in &service.depends_on {
            if !seen.insert(on) {
                field.key_error::<()>(format!("{on} is here twice"), None);
            }
            let Some(target) = by_name.get(on.as_str()) else {
                let hint = nearest(on, by_name.keys().copied()).map(|near| format!("did you mean {near:?}?"));
                field.key_error::<()>(format!("there is no service {on:?}"), hint);
                continue;
            };
            match condition {
                Dependency::Healthy if target.layer.health.is_none() => field.key_error::<()>(
                    format!("{on} can never be healthy, it has no health check"),
                    Some(format!("add healthcheck to {on}, or wait for service_started")),
                ),
                Dependency::CompletedSuccessfully
                    if matches!(target.layer.restart, RestartPolicy::Always | RestartPolicy::UnlessStopped) =>
                {
                    field.key_error::<()>(
                        format!("{on} can never complete, it is started again whenever it ends"),
                        Some(format!("add restart: on-failure to {on}, or wait for service_started")),
                    )
                }
                _ if target.layer.replicas == 0 => field.key_error::<()>(
                    format!("{on} never starts, it has 0 replicas"),
                    Some(format!("give {on} a replica, or remove the dependency")),
                ),
                _ => None,
            };
            if let Some(way) = path_between(&by_name, on, name.as_str()) {
                let circle = way.join(" → ");
                field.key_error::<()>(
                    format!("{name} would wait for itself: {name} → {circle}"),
                    Some("remove one of these dependencies".to_owned()),
                );
            }
        }
    }
}

/// The services on a way of dependencies from `from` to `to`, both included. `None`: there is none.
fn path_between<'a>(by_name: &BTreeMap<&'a str, &'a Service<'_>>, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
    let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut waiting = vec![from];
    let mut seen = BTreeSet::from([from]);
    while let Some(at) = waiting.pop() {
        if at == to {
            let mut way = vec![at];
            while let Some(previous) = way.last().and_then(|last| came_from.get(last)) {
                way.push(previous);
            }
            way.reverse();
            return Some(way);
        }
        for (on, ..) in by_name.get(at).map(|service| &service.depends_on[..]).unwrap_or_default() {
            if seen.insert(on) {
                came_from.insert(on, at);
                waiting.push(on);
            }
        }
    }
    None
}
