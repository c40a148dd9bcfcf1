//! One service: a layer, and what it claims of the rest of the environment.

use super::field::{Field, Known, Unsupported};
use super::mounts::{Mount, mounts};
use super::{Dependency, Layer, PublishedPort, Spread, ports, process, resources, rules};
use crate::container::RestartPolicy;
use crate::ids::LayerName;

/// Most containers of one layer.
const MAX_REPLICAS: u32 = 1000;

const KEYS: [&str; 28] = [
    "image",
    "command",
    "entrypoint",
    "environment",
    "working_dir",
    "user",
    "labels",
    "deploy",
    "scale",
    "mem_limit",
    "mem_reservation",
    "cpus",
    "pids_limit",
    "volumes",
    "tmpfs",
    "ports",
    "expose",
    "healthcheck",
    "depends_on",
    "restart",
    "stop_signal",
    "stop_grace_period",
    "read_only",
    "ulimits",
    "networks",
    "privileged",
    "security_opt",
    "x-godwit",
];

const EXTENSION_KEYS: [&str; 8] =
    ["cloudlets", "spread", "max-per-host", "apart", "near", "require", "importance", "volumes-may-be-lost"];

/// What Compose has and containers here do not.
const UNSUPPORTED: [Unsupported; 34] = [
    ("build", "build the image first and name it under image"),
    ("cap_add", "remove it; a container keeps a fixed set of capabilities, more would reach out of it"),
    ("cap_drop", "remove it; every capability that could reach out of the container is dropped already"),
    ("cgroup_parent", "remove it; limits are given by deploy.resources"),
    ("configs", "put the file into the image or a volume"),
    ("container_name", "remove it; containers are named SERVICE-NUMBER"),
    ("cpu_shares", "use deploy.resources.reservations.cpus"),
    ("cpu_quota", "use cpus"),
    ("cpu_period", "use cpus"),
    ("cpuset", "use cpus; a container must not depend on single CPUs of a host"),
    ("devices", "remove it; devices of the host would make the container not movable"),
    ("dns", "remove it; names are answered on every host"),
    ("domainname", "remove it; use networks: {default: {aliases: [NAME]}} for another name"),
    ("env_file", "write the variables under environment"),
    ("extends", "use YAML anchors and <<"),
    ("external_links", "remove it; environments cannot reach each other"),
    ("extra_hosts", "use networks: {default: {aliases: [NAME]}} on the service that should have the name"),
    ("group_add", "use user: USER:GROUP"),
    (
        "hostname",
        "remove it, the host name is SERVICE-NUMBER; use networks: {default: {aliases: [NAME]}} for another name",
    ),
    ("init", "remove it; the keeper of a container reaps its processes"),
    ("ipc", "remove it; every container has its own"),
    ("links", "remove it; services reach each other by name"),
    ("logging", "remove it; see: godwit logs"),
    ("mac_address", "remove it; a container keeps the address it is given for life"),
    ("network_mode", "remove it; an environment has one private network"),
    ("oom_kill_disable", "use deploy.resources.limits.memory"),
    ("pid", "remove it; every container has its own"),
    ("profiles", "write what should run now, or another file for another purpose"),
    ("pull_policy", "remove it; an image is pulled when it is not there"),
    ("secrets", "use environment with a variable: ${SECRET?}"),
    ("shm_size", "use tmpfs: /dev/shm:size=SIZE"),
    ("sysctls", "remove it; settings of the kernel belong to the host"),
    ("tty", "remove it; godwit exec -it has a terminal"),
    ("userns_mode", "remove it; every container has its own range of users"),
];

/// A layer with what has to be checked against the others, each with the field that says it.
pub(super) struct Service<'a> {
    pub field: Field<'a>,
    pub layer: Layer,
    pub ports: Vec<(PublishedPort, Field<'a>)>,
    pub volumes: Vec<(String, Field<'a>)>,
    pub depends_on: Vec<(String, Dependency, Field<'a>)>,
    pub networks: Vec<(String, Field<'a>)>,
    pub aliases: Vec<(LayerName, Field<'a>)>,
    pub rules: rules::Places<'a>,
}

/// Reads a service. What could not be read has a default value then, and an error was reported.
pub(super) fn service<'a>(field: &Field<'a>, default_spread: Spread) -> Option<Service<'a>> {
    if field.is_null() {
        return field.error_hint("the service has nothing in it", "add at least image: NAME");
    }
    let known = field.known(&KEYS, &UNSUPPORTED)?;
    refuse_privileges(&known);
    let image = match known.get("image") {
        Some(image) => image_name(image),
        None => field.key_error(
            "the key \"image\" is missing",
            Some("add image: NAME, for example image: oci:/srv/images/redis:latest".to_owned()),
        ),
    };
    let deploy = known.get("deploy").and_then(deploy);
    let extension = known.get("x-godwit").and_then(|field| field.known(&EXTENSION_KEYS, &[]));
    let (rules, rule_places) = extension.as_ref().map(rules::rules).unwrap_or_default();
    let mut volumes = Vec::new();
    let (mut volume_mounts, mut tmpfs, mut host_paths) = (Vec::new(), Vec::new(), Vec::new());
    for (mount, field) in mounts(known.get("volumes"), known.get("tmpfs")) {
        match mount {
            Mount::Volume(mount) => {
                volumes.push((mount.volume.clone(), field));
                volume_mounts.push(mount);
            }
            Mount::Tmpfs(mount) => tmpfs.push(mount),
            Mount::HostPath(mount) => host_paths.push(mount),
        }
    }
    if let Some(field) = known.get("expose") {
        ports::expose(field);
    }
    let published = known.get("ports").map(ports::ports).unwrap_or_default();
    let (networks, aliases) = known.get("networks").map(networks).unwrap_or_default();
    let depends_on = known.get("depends_on").and_then(depends_on).unwrap_or_default();
    let layer = Layer {
        image: image.unwrap_or_default(),
        entrypoint: known.get("entrypoint").and_then(process::argv),
        command: known.get("command").and_then(process::argv),
        environment: known.get("environment").and_then(environment).unwrap_or_default(),
        working_dir: known.get("working_dir").and_then(working_dir),
        user: known.get("user").and_then(Field::filled_text),
        labels: known.get("labels").and_then(|f| f.pairs(|_, _| Some(String::new()))).unwrap_or_default(),
        replicas: replicas(&known, deploy.as_ref()),
        resources: resources::resources(&known, deploy.as_ref(), extension.as_ref()),
        volumes: volume_mounts,
        tmpfs,
        host_paths,
        ports: published.iter().map(|(port, _)| port.clone()).collect(),
        health: known.get("healthcheck").and_then(process::health),
        // Filled in once all names are known.
        depends_on: Default::default(),
        restart: known.get("restart").and_then(process::restart).unwrap_or(RestartPolicy::default()),
        stop_signal: known.get("stop_signal").and_then(process::signal),
        stop_grace_ms: process::stop_grace_ms(&known),
        read_only_root: known.get("read_only").and_then(Field::boolean).unwrap_or(false),
        open_files: known.get("ulimits").and_then(process::open_files),
        aliases: aliases.iter().map(|(name, _)| name.to_string()).collect(),
        spread: extension.and_then(|x| x.get("spread").and_then(spread)).unwrap_or(default_spread),
        rules,
    };
    Some(Service {
        field: field.clone(),
        layer,
        ports: published,
        volumes,
        depends_on,
        networks,
        aliases,
        rules: rule_places,
    })
}

/// Keys that some files carry with the value that holds here anyway.
fn refuse_privileges(known: &Known<'_>) {
    if let Some(field) = known.get("privileged")
        && field.boolean() == Some(true)
    {
        field.error_hint::<()>(
            "a privileged container could reach its host and its neighbours",
            "remove it; root inside a container is nobody outside",
        );
    }
    for item in known.get("security_opt").and_then(Field::items).unwrap_or_default() {
        if let Some(option) = item.text()
            && !matches!(option.as_str(), "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true")
        {
            item.error_hint::<()>(
                format!("the option {option:?} is not supported"),
                "remove it; seccomp and no-new-privileges always hold",
            );
        }
    }
}

fn image_name(field: &Field<'_>) -> Option<String> {
    let name = field.filled_text()?;
    if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return field.error(format!("{name:?} is not the name of an image, it has a space or control character"));
    }
    Some(name)
}

fn deploy<'a>(field: &Field<'a>) -> Option<Known<'a>> {
    let unsupported = [
        ("restart_policy", "use restart"),
        ("placement", "use x-godwit: {spread: strict}, max-per-host or require: {LABEL: VALUE}"),
        ("labels", "use labels of the service"),
        ("endpoint_mode", "remove it; the name of a service is answered with all its containers in turn"),
        ("update_config", "remove it"),
        ("rollback_config", "remove it"),
    ];
    let known = field.known(&["replicas", "resources", "mode"], &unsupported)?;
    if let Some(mode) = known.get("mode") {
        mode.one_of(&[("replicated", ())]);
    }
    Some(known)
}

fn replicas(service: &Known<'_>, deploy: Option<&Known<'_>>) -> u32 {
    let number = |field: &Field<'_>| field.number_u32(0, MAX_REPLICAS);
    let deployed = deploy.and_then(|d| d.get("replicas"));
    let scale = service.get("scale");
    if let (Some(deployed), Some(scale)) = (deployed, scale) {
        scale.error_hint::<()>(format!("{} says the same already", deployed.path), "keep one of them");
    }
    deployed.or(scale).and_then(number).unwrap_or(1)
}

fn environment(field: &Field<'_>) -> Option<std::collections::BTreeMap<String, String>> {
    field.pairs(|item, name| match item.file.vars.get(name) {
        Some(value) => Some(value.clone()),
        None => item.error_hint(
            format!("{name} has no value here, and the variable is not set where this runs either"),
            format!("set it, or write {name}: \"\""),
        ),
    })
}

fn working_dir(field: &Field<'_>) -> Option<String> {
    let path = field.filled_text()?;
    if path.starts_with('/') { Some(path) } else { field.error(format!("{path:?} does not begin with '/'")) }
}

pub(super) fn spread(field: &Field<'_>) -> Option<Spread> {
    field.one_of(&[("strict", Spread::Strict), ("preferred", Spread::Preferred), ("none", Spread::None)])
}

fn depends_on<'a>(field: &Field<'a>) -> Option<Vec<(String, Dependency, Field<'a>)>> {
    let mut found = Vec::new();
    if field.is_list() {
        for item in field.items()? {
            found.extend(item.text().map(|name| (name, Dependency::Started, item)));
        }
        return Some(found);
    }
    let conditions = [
        ("service_started", Dependency::Started),
        ("service_healthy", Dependency::Healthy),
        ("service_completed_successfully", Dependency::CompletedSuccessfully),
    ];
    let unsupported = [
        ("restart", "remove it; a restart of one service does not restart others"),
        ("required", "remove it; what is named here is required"),
    ];
    for (name, entry) in field.entries()? {
        let Some(known) = entry.known(&["condition"], &unsupported) else { continue };
        let condition = match known.get("condition") {
            Some(condition) => condition.one_of(&conditions),
            None => Some(Dependency::Started),
        };
        found.extend(condition.map(|condition| (name, condition, entry)));
    }
    Some(found)
}

type Networks<'a> = (Vec<(String, Field<'a>)>, Vec<(LayerName, Field<'a>)>);

/// The networks a service names, and its further names in them.
fn networks<'a>(field: &Field<'a>) -> Networks<'a> {
    let (mut networks, mut aliases) = (Vec::new(), Vec::new());
    if field.is_list() {
        for item in field.items().unwrap_or_default() {
            networks.extend(item.text().map(|name| (name, item)));
        }
        return (networks, aliases);
    }
    let address = "remove it; a container keeps the address it is given for life";
    for (name, entry) in field.entries().unwrap_or_default() {
        let known = entry.known(&["aliases"], &[("ipv4_address", address), ("ipv6_address", address)]);
        for item in known.as_ref().and_then(|k| k.get("aliases")).and_then(Field::items).unwrap_or_default() {
            aliases.extend(item.parsed::<LayerName>().map(|alias| (alias, item)));
        }
        networks.push((name, entry));
    }
    (networks, aliases)
}
