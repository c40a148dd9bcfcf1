//! The switch and the links of a lab, by `ip` and `tc` of iproute2.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::namespaces::{NamespaceError, visit};
use crate::paths::LabPaths;
use crate::spec::{BitsPerSecond, LabSpec, Node};

/// The host's end of its link.
const HOST_DEVICE: &str = "eth0";
/// The bridge in the switch namespace; its ports are named after the hosts.
const BRIDGE: &str = "sw0";

/// A link that could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot start {program}: install the package iproute2")]
    Start { program: &'static str, source: io::Error },
    #[error("{program} failed in {}: {message}", .namespace.display())]
    Tool { program: &'static str, namespace: PathBuf, message: String },
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

/// Runs `ip` or `tc` over a list of commands, one per line, inside a network namespace. Stops at
/// the first that fails.
fn batch(program: &'static str, namespace: &Path, commands: &str) -> Result<(), LinkError> {
    let output = visit(namespace, || {
        let mut child = Command::new(program)
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(commands.as_bytes())?;
        }
        child.wait_with_output()
    })?
    .map_err(|source| LinkError::Start { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(LinkError::Tool { program, namespace: namespace.to_owned(), message })
}

/// Joins the pinned namespaces of all nodes by a switch. Links are up when this returns, long
/// before traffic: a veth that comes up late stays mute for up to a second.
pub(crate) fn make(paths: &LabPaths, spec: &LabSpec) -> Result<(), LinkError> {
    let mut switch = format!(
        "link set lo up\nlink add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set {BRIDGE} up\n"
    );
    for node in spec.nodes() {
        let namespace = paths.net_namespace(node);
        // Writing to a String cannot fail.
        let _ = write!(
            switch,
            "link add {node} type veth peer name {HOST_DEVICE} netns {}\nlink set {node} master {BRIDGE}\nlink set {node} up\n",
            namespace.display()
        );
    }
    batch("ip", &paths.switch_namespace(), &switch)?;
    for node in spec.nodes() {
        let commands = format!(
            "link set lo up\naddr add {}/{} dev {HOST_DEVICE}\nlink set {HOST_DEVICE} up\n",
            node.address(),
            Node::PREFIX_LENGTH
        );
        batch("ip", &paths.net_namespace(node), &commands)?;
    }
    if spec.link.is_some() {
        for node in spec.nodes() {
            set_rate(paths, node, spec.link)?;
        }
    }
    Ok(())
}

/// Limits both directions of a node's link, or lifts the limit. Frames in the queue of a limit
/// that is replaced are lost, as on a port that changes its speed.
pub(crate) fn set_rate(paths: &LabPaths, node: Node, rate: Option<BitsPerSecond>) -> Result<(), LinkError> {
    let ends = [(paths.net_namespace(node), HOST_DEVICE.to_owned()), (paths.switch_namespace(), node.to_string())];
    for (namespace, device) in ends {
        let command = match rate {
            Some(rate) => format!("qdisc replace dev {device} root {}\n", token_bucket(rate)),
            // Replacing works whether or not there is a limit; deleting would fail without one.
            None => format!("qdisc replace dev {device} root pfifo limit 1000\n"),
        };
        batch("tc", &namespace, &command)?;
    }
    Ok(())
}

/// tc-tbf(8): the burst must hold what flows between two looks at the clock and at least one full
/// frame; the queue holds 20 ms beyond that, as a shallow switch does.
fn token_bucket(rate: BitsPerSecond) -> String {
    let bytes = rate.bytes_per_second();
    let burst = (bytes / 1_000).clamp(16 << 10, 16 << 20);
    let queue = (burst + bytes / 50).clamp(256 << 10, 512 << 20);
    format!("tbf rate {}bit burst {burst} limit {queue}", rate.get())
}

/// Takes the node's port out of the switch. Both ends keep their carrier, as when a cable between
/// two switches further away is cut.
pub(crate) fn cut(paths: &LabPaths, node: Node) -> Result<(), LinkError> {
    batch("ip", &paths.switch_namespace(), &format!("link set {node} nomaster\n"))
}

/// Puts the node's port back into the switch; it forwards at once. Harmless if it was not cut.
pub(crate) fn restore(paths: &LabPaths, node: Node) -> Result<(), LinkError> {
    batch("ip", &paths.switch_namespace(), &format!("link set {node} master {BRIDGE}\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bucket_grows_with_the_rate() {
        let bucket = |rate: &str| token_bucket(rate.parse().unwrap());
        assert_eq!(bucket("64kbit"), "tbf rate 64000bit burst 16384 limit 262144");
        assert_eq!(bucket("1gbit"), "tbf rate 1000000000bit burst 125000 limit 2625000");
        assert_eq!(bucket("10gbit"), "tbf rate 10000000000bit burst 1250000 limit 26250000");
    }
}
