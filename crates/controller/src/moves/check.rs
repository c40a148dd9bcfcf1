//! Whether a container may be moved to a host, by everything that is known before anything changes.

use godwit_model::container::{ContainerState, ContainerStatus, Movable};
use godwit_model::host::HostFacts;

/// Processor features whose absence is told by name; the rest is counted.
const NAMED_FEATURES: usize = 5;

/// What speaks against moving the container as it is now; `seen` is newer than its status.
pub fn of_container(status: Option<&ContainerStatus>, seen: Option<&Movable>) -> Vec<String> {
    let Some(status) = status else { return vec!["its host has not reported it yet".to_owned()] };
    let mut because = Vec::new();
    if status.state != ContainerState::Running {
        because.push(format!("it does not run (it is {})", status.state.as_str()));
    }
    because.extend(seen.unwrap_or(&status.movable).because.iter().cloned());
    because
}

/// What speaks against these two hosts as source and destination.
pub fn of_hosts(from: &HostFacts, to: &HostFacts) -> Vec<String> {
    let mut because = Vec::new();
    if from.architecture != to.architecture {
        because.push(format!("{} is {} and {} is {}", from.name, from.architecture, to.name, to.architecture));
    }
    for host in [from, to] {
        if host.criu.is_none() {
            because.push(format!("{} has no usable CRIU; `godwit doctor` there says why", host.name));
        }
    }
    if let (Some(ours), Some(theirs)) = (&from.criu, &to.criu)
        && major(ours) != major(theirs)
    {
        because.push(format!("{} has CRIU {ours} and {} has {theirs}: their images differ", from.name, to.name));
    }
    let missing: Vec<&str> =
        from.cpu_features.iter().filter(|f| to.cpu_features.binary_search(f).is_err()).map(String::as_str).collect();
    if !missing.is_empty() {
        let named = missing[..missing.len().min(NAMED_FEATURES)].join(", ");
        let more = missing.len().saturating_sub(NAMED_FEATURES);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        because.push(format!("the processor of {} lacks {named}{more}, which {} has", to.name, from.name));
    }
    because
}

fn major(version: &str) -> &str {
    version.split('.').next().unwrap_or(version)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use godwit_model::{Bytes, HostName, MilliCpu};

    fn host(name: &str, criu: Option<&str>, features: &[&str]) -> HostFacts {
        HostFacts {
            name: HostName::new(name).unwrap(),
            godwit_version: String::new(),
            kernel: String::new(),
            architecture: "x86_64".into(),
            criu: criu.map(str::to_owned),
            cpu_features: features.iter().map(|f| (*f).to_owned()).collect(),
            cpu_model: String::new(),
            cpus: MilliCpu(1000),
            cpu_mhz: 2500,
            memory: Bytes(1),
            disk_free: Bytes(1),
            tunnel_address: [127, 0, 0, 1].into(),
            migration_address: ([127, 0, 0, 1], 1).into(),
            certificate_sha256: String::new(),
            labels: Default::default(),
            written_pages: godwit_model::host::WrittenPages::Tracked { by: Default::default() },
        }
    }

    #[test]
    fn a_destination_needs_every_feature_and_a_criu_of_the_same_line() {
        let from = host("a", Some("4.1.1"), &["avx", "sse"]);
        assert!(of_hosts(&from, &host("b", Some("4.2"), &["aes", "avx", "sse"])).is_empty());
        assert_eq!(of_hosts(&from, &host("b", Some("4.2"), &["sse"])).len(), 1);
        assert_eq!(of_hosts(&from, &host("b", Some("5.0"), &["avx", "sse"])).len(), 1);
        assert_eq!(of_hosts(&from, &host("b", None, &["avx", "sse"])).len(), 1);
    }

    #[test]
    fn what_nobody_reports_is_not_moved() {
        assert_eq!(of_container(None, None).len(), 1);
    }
}
