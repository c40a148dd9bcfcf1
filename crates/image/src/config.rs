//! The image configuration: what the image's author wants a container to be started with.

use crate::digest::Digest;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// What an image says about containers made from it (image-spec, config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Empty: `/`.
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty: root.
    pub user: String,
    /// `port/protocol` each, sorted; a missing protocol is written out as tcp.
    pub exposed_ports: Vec<String>,
    /// Paths in the container, sorted.
    pub volumes: Vec<String>,
    /// A signal's name or number; none: SIGTERM.
    pub stop_signal: Option<String>,
    pub labels: BTreeMap<String, String>,
}

/// The part of the configuration document that is read. Builders write `null` for what is empty.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigDocument {
    #[serde(default, deserialize_with = "null_is_default")]
    pub architecture: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    config: Execution,
    pub rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "null_is_default")]
    pub diff_ids: Vec<Digest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    #[serde(deserialize_with = "null_is_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    working_dir: String,
    #[serde(deserialize_with = "null_is_default")]
    user: String,
    #[serde(deserialize_with = "null_is_default")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "null_is_default")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    stop_signal: Option<String>,
    #[serde(deserialize_with = "null_is_default")]
    labels: BTreeMap<String, String>,
}

fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(input: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or_default())
}

impl ConfigDocument {
    pub fn into_config(self) -> ImageConfig {
        let run = self.config;
        let with_protocol = |port: String| if port.contains('/') { port } else { format!("{port}/tcp") };
        ImageConfig {
            entrypoint: run.entrypoint,
            cmd: run.cmd,
            env: run.env,
            working_dir: run.working_dir,
            user: run.user,
            exposed_ports: run.exposed_ports.into_keys().map(with_protocol).collect(),
            volumes: run.volumes.into_keys().collect(),
            stop_signal: run.stop_signal.filter(|signal| !signal.is_empty()),
            labels: run.labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_and_defaults() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Entrypoint":null,"Cmd":["a"],
            "ExposedPorts":{"80":{},"53/udp":{}},"Volumes":{"/data":{}},"Labels":null,"StopSignal":"",
            "Healthcheck":{"Test":["CMD","x"]}},"rootfs":{"type":"layers","diff_ids":null},"history":[]}"#;
        let config = serde_json::from_str::<ConfigDocument>(text).unwrap().into_config();
        assert_eq!(config.cmd, ["a"]);
        assert_eq!(config.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!(config.volumes, ["/data"]);
        assert_eq!(config.stop_signal, None);
        assert!(config.entrypoint.is_empty());
    }
}
