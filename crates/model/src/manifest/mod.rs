//! Compose files as environments. Services are layers.
//!
//! ```text
//! text ─ node: tree with places ─ field: typed reading, variables ─ service: layers ─ check: across layers ─▶ Manifest
//!                                      every step reports to one list of errors
//! ```
//! A key without a meaning here is an error, never ignored; so is a value that would mean something else
//! than in Compose. Two things differ from Compose on purpose: a variable that is not set and has no
//! default is an error, and a service without `restart` is started again when it ends (`always`).

mod check;
mod error;
mod field;
mod interpolate;
mod mounts;
mod node;
mod ports;
mod process;
mod resources;
mod rules;
mod service;
mod text;

pub use error::{MAX_ERRORS, ManifestError, ManifestErrors};
pub use rules::{Contradiction, Rules, contradictions};

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::container::{HealthCheck, HostPathMount, RestartPolicy, TmpfsMount, VolumeMount};
use crate::ids::{EnvName, LayerName};
use crate::units::{Bytes, Cloudlets, MilliCpu};
use error::Report;
use field::{Field, File};

/// One environment as a person wrote it, checked. Two equal manifests describe the same environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub name: EnvName,
    /// By name, so that the order in the file does not matter.
    pub layers: BTreeMap<LayerName, Layer>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub image: String,
    pub entrypoint: Option<Vec<String>>,
    pub command: Option<Vec<String>>,
    pub environment: BTreeMap<String, String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub replicas: u32,
    pub resources: LayerResources,
    pub volumes: Vec<VolumeMount>,
    pub tmpfs: Vec<TmpfsMount>,
    pub host_paths: Vec<HostPathMount>,
    pub ports: Vec<PublishedPort>,
    pub health: Option<HealthCheck>,
    pub depends_on: BTreeMap<LayerName, Dependency>,
    pub restart: RestartPolicy,
    pub stop_signal: Option<String>,
    pub stop_grace_ms: u64,
    pub read_only_root: bool,
    pub open_files: Option<u64>,
    /// Further names that lead to the layer inside its network.
    pub aliases: Vec<String>,
    pub spread: Spread,
    #[serde(default)]
    pub rules: Rules,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct LayerResources {
    pub memory: Option<Bytes>,
    pub cpu: Option<MilliCpu>,
    pub pids: Option<u32>,
    pub reserved_memory: Option<Bytes>,
    pub reserved_cpu: Option<MilliCpu>,
    /// Both ways of saying it may not be mixed: cloudlets, or memory and CPUs.
    pub cloudlets: Option<CloudletRange>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudletRange {
    pub reserved: Cloudlets,
    pub limit: Cloudlets,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// The port on every host.
    pub host_port: u16,
    pub container_port: u16,
    pub udp: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dependency {
    Started,
    Healthy,
    CompletedSuccessfully,
}

/// How the containers of a layer are spread over hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Spread {
    /// Never two on one host; what does not fit waits.
    Strict,
    /// As evenly as possible.
    #[default]
    Preferred,
    None,
}

impl Manifest {
    /// The same environment in one form, whatever the order of lists in the file. [`parse`] returns it.
    #[must_use]
    pub fn normalized(mut self) -> Self {
        for layer in self.layers.values_mut() {
            layer.volumes.sort_by(|a, b| a.target.cmp(&b.target));
            layer.tmpfs.sort_by(|a, b| a.target.cmp(&b.target));
            layer.host_paths.sort_by(|a, b| a.target.cmp(&b.target));
            layer.ports.sort_by_key(|port| (port.host_port, port.udp, port.container_port));
            layer.ports.dedup();
            layer.aliases.sort();
            layer.aliases.dedup();
        }
        self
    }
}

/// Reads a Compose file.
///
/// `file_name` goes into messages, and relative host paths start at its directory. `default_name` names
/// the environment if the file does not. `vars` are the variables that the text may use.
pub fn parse(
    file_name: &str,
    text: &str,
    default_name: Option<&str>,
    vars: &BTreeMap<String, String>,
) -> Result<Manifest, ManifestErrors> {
    let file = File { report: Report::new(file_name), vars, name: file_name };
    let manifest = node::load(text, &file.report)
        .and_then(|root| document(&Field::root(&file, root), default_name))
        .map(Manifest::normalized);
    match manifest {
        Some(manifest) if file.report.is_empty() => Ok(manifest),
        _ => Err(file.report.finish()),
    }
}

fn document(root: &Field<'_>, default_name: Option<&str>) -> Option<Manifest> {
    let unsupported = [
        ("version", "remove it, it has no meaning any more"),
        ("secrets", "use environment with a variable: ${SECRET?}"),
        ("configs", "put the file into the image or a volume"),
        ("include", "write one file"),
    ];
    let known = root.known_beside(&["name", "services", "volumes", "networks", "x-godwit"], &unsupported, fragment)?;
    let extension = known.get("x-godwit").and_then(|field| field.known(&["spread"], &[]));
    let spread = extension.and_then(|x| x.get("spread").and_then(service::spread)).unwrap_or_default();
    let volumes = known.get("volumes").map(volumes).unwrap_or_default();
    let network = known.get("networks").and_then(network).unwrap_or_else(|| "default".to_owned());
    let name = match (known.get("name"), default_name) {
        (Some(field), _) => field.parsed(),
        (None, Some(name)) => EnvName::new(name)
            .map_or_else(|error| root.error_hint(error.to_string(), "add name: NAME to the file"), Some),
        (None, None) => root.error_hint("the environment has no name", "add name: NAME"),
    };
    let Some(field) = known.get("services") else {
        return root.error_hint("there are no services", "add services: {NAME: {image: …}}");
    };
    let entries = field.entries()?;
    if entries.is_empty() {
        return field.error_hint("there are no services", "add services: {NAME: {image: …}}");
    }
    let mut services = Vec::with_capacity(entries.len());
    for (name, field) in entries {
        let layer_name = LayerName::new(name).map_or_else(|error| field.key_error(error.to_string(), None), Some);
        let service = service::service(&field, spread);
        services.extend(layer_name.zip(service));
    }
    check::all(&services, &volumes, &network);
    let (mut layers, mut places) = (BTreeMap::new(), BTreeMap::new());
    for (name, mut service) in services {
        for (on, condition, _) in service.depends_on {
            // A name that is none was reported, as there is no such service.
            service.layer.depends_on.extend(LayerName::new(on).ok().map(|on| (on, condition)));
        }
        places.insert(name.clone(), (service.field, service.rules));
        layers.insert(name, service.layer);
    }
    for wrong in contradictions(&layers) {
        let Some((service, rules)) = places.get(&wrong.layer) else { continue };
        let rule = rules.iter().find(|(key, item, _)| (*key, item) == (wrong.key, &wrong.item));
        let field = rule.map_or(service, |(_, _, field)| field);
        match wrong.hint {
            Some(hint) => field.error_hint::<()>(wrong.message, hint),
            None => field.error(wrong.message),
        };
    }
    Some(Manifest { name: name?, layers })
}

/// Whether an unknown top-level key is a fragment for use by alias: it has its effect where it is used.
fn fragment(name: &str, field: &Field<'_>) -> bool {
    name.starts_with("x-") && field.is_anchored()
}

/// The names of volumes that the file declares.
fn volumes(field: &Field<'_>) -> BTreeSet<String> {
    let unsupported = [
        ("external", "remove it; a volume is made with the container it belongs to"),
        ("name", "remove it; a volume has the name it is declared by"),
        ("driver_opts", "remove it; a volume is a directory on the host's disk"),
        ("labels", "remove it"),
    ];
    let mut names = BTreeSet::new();
    for (name, field) in field.entries().unwrap_or_default() {
        if let Some(driver) = field.known(&["driver"], &unsupported).as_ref().and_then(|known| known.get("driver")) {
            driver.one_of(&[("local", ())]);
        }
        names.extend(mounts::check_volume_name(&field, &name));
    }
    names
}

/// The name the file gives to the environment's private network.
fn network(field: &Field<'_>) -> Option<String> {
    let entries = field.entries()?;
    for (_, extra) in entries.iter().skip(1) {
        extra.key_error::<()>(
            "a second network is declared, an environment has one",
            Some("keep one; every service of an environment can reach the others".to_owned()),
        );
    }
    let (name, field) = entries.into_iter().next()?;
    let unsupported = [
        ("driver", "remove it; the network spans all hosts"),
        ("external", "remove it; environments cannot reach each other"),
        ("ipam", "remove it; addresses are given out by the controller"),
        ("internal", "remove it; containers may reach the outside"),
    ];
    field.known(&[], &unsupported);
    Some(name)
}
