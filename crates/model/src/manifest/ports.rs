//! `ports` and `expose`.

use std::ops::RangeInclusive;

use super::PublishedPort;
use super::field::Field;

/// Most ports that one range stands for.
const MAX_RANGE_PORTS: usize = 100;

/// What `ports` publishes, with the field that says so.
pub(super) fn ports<'a>(field: &Field<'a>) -> Vec<(PublishedPort, Field<'a>)> {
    let mut ports = Vec::new();
    for item in field.items().unwrap_or_default() {
        let found = if item.is_map() { long(&item) } else { item.text().and_then(|text| short(&item, &text)) };
        ports.extend(found.unwrap_or_default().into_iter().map(|port| (port, item.clone())));
    }
    ports
}

/// `expose` documents what a layer listens on; inside its network every port can be reached anyway.
pub(super) fn expose(field: &Field<'_>) {
    for item in field.items().unwrap_or_default() {
        if let Some(text) = item.text() {
            let (numbers, _) = protocol(&item, &text).unwrap_or((&text, false));
            range(&item, numbers);
        }
    }
}

fn short(item: &Field<'_>, text: &str) -> Option<Vec<PublishedPort>> {
    let (numbers, udp) = protocol(item, text)?;
    let Some((host, container)) = numbers.rsplit_once(':') else {
        range(item, numbers)?;
        return item.error_hint(
            format!("port {numbers} is published without a port on the hosts"),
            format!("write \"HOSTPORT:{numbers}\", or leave it out: inside the environment it can be reached anyway"),
        );
    };
    if let Some((address, host)) = host.rsplit_once(':') {
        return item.error_hint(
            format!(
                "the host address {address:?} is not supported, a published port is open on all addresses of every host"
            ),
            format!("write \"{host}:{container}\""),
        );
    }
    pair(item, range(item, host)?, range(item, container)?, udp)
}

fn long(item: &Field<'_>) -> Option<Vec<PublishedPort>> {
    let everywhere = "remove it, a published port is open on all addresses of every host";
    let unsupported =
        [("host_ip", everywhere), ("mode", everywhere), ("name", "remove it"), ("app_protocol", "remove it")];
    let known = item.known(&["target", "published", "protocol"], &unsupported)?;
    let udp = match known.get("protocol") {
        Some(field) => field.one_of(&[("tcp", false), ("udp", true)])?,
        None => false,
    };
    let Some(target) = known.get("target") else {
        return item.error("the key \"target\" (the container's port) is missing");
    };
    let Some(published) = known.get("published") else {
        return item.error_hint(
            "the key \"published\" (the port on the hosts) is missing",
            "add it, or remove the entry: inside the environment the port can be reached anyway",
        );
    };
    let target_port = range(target, &target.text()?)?;
    pair(item, range(published, &published.text()?)?, target_port, udp)
}

fn protocol<'t>(item: &Field<'_>, text: &'t str) -> Option<(&'t str, bool)> {
    match text.split_once('/') {
        None => Some((text, false)),
        Some((numbers, "tcp")) => Some((numbers, false)),
        Some((numbers, "udp")) => Some((numbers, true)),
        Some((_, other)) => item.error_hint(format!("the protocol {other:?} is not supported"), "write /tcp or /udp"),
    }
}

fn range(item: &Field<'_>, text: &str) -> Option<RangeInclusive<u16>> {
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Some(first..=last),
        _ => item
            .error_hint(format!("{text:?} is not a port"), "a port is a number from 1 to 65535, a range is FIRST-LAST"),
    }
}

fn pair(
    item: &Field<'_>,
    host: RangeInclusive<u16>,
    container: RangeInclusive<u16>,
    udp: bool,
) -> Option<Vec<PublishedPort>> {
    if host.len() != container.len() {
        return item.error(format!(
            "{} ports on the hosts cannot lead to {} ports of a container",
            host.len(),
            container.len()
        ));
    }
    if host.len() > MAX_RANGE_PORTS {
        return item.error(format!("the range has {} ports, at most {MAX_RANGE_PORTS} are allowed", host.len()));
    }
    Some(
        host.zip(container)
            .map(|(host_port, container_port)| PublishedPort { host_port, container_port, udp })
            .collect(),
    )
}
