#![allow(clippy::unwrap_used)]

use godwit_model::container::{ContainerSpec, Health, Movable, NetworkIdentity, Resources, RestartPolicy};
use godwit_model::host::{HostFacts, HostState};
use godwit_model::migration::{Phase, Progress};
use godwit_model::network::MacAddress;
use godwit_model::{Generation, MoveId};
use godwit_store::Revision;

use super::*;
use crate::state::Versioned;

const ID: &str = "0123456789ab";

fn host_name(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn record(name: &str, host: Option<&str>) -> ContainerRecord {
    let spec = ContainerSpec {
        id: ID.parse().unwrap(),
        name: name.parse().unwrap(),
        image: "oci:/srv/images/redis".to_owned(),
        entrypoint: None,
        command: None,
        environment: BTreeMap::new(),
        working_dir: None,
        user: None,
        read_only_root: false,
        id_base: 1 << 20,
        resources: Resources { reserved_memory: Bytes::mib(64), reserved_cpu: MilliCpu(250), ..Resources::default() },
        network: NetworkIdentity {
            vni: 4097,
            address: [10, 64, 0, 11].into(),
            prefix_len: 20,
            gateway: [10, 64, 0, 1].into(),
            mac: MacAddress([2, 0, 0, 0, 0, 11]),
        },
        volumes: Vec::new(),
        tmpfs: Vec::new(),
        host_paths: Vec::new(),
        restart: RestartPolicy::Always,
        stop_signal: None,
        stop_grace_ms: 10_000,
        open_files: None,
        health: None,
        labels: BTreeMap::new(),
    };
    ContainerRecord {
        spec,
        host: host.map(host_name),
        generation: Generation(3),
        run: true,
        start_count: 0,
        moving: None,
        volumes_on: None,
        leaving: Vec::new(),
        removed: false,
        growth: None,
    }
}

fn status(record: &ContainerRecord, state: ContainerState) -> ContainerStatus {
    ContainerStatus {
        id: record.spec.id.clone(),
        name: record.name().clone(),
        generation: record.generation,
        state,
        message: None,
        health: Some(Health::Healthy),
        pid: Some(77),
        started_at_ms: Some(1),
        restarts: 0,
        exit: None,
        memory: None,
        working_set: None,
        cpu_usec: None,
        movable: Movable::default(),
        image_digest: None,
    }
}

fn report(connected: bool, containers: Vec<ContainerStatus>) -> Arc<HostReport> {
    Arc::new(HostReport {
        connected,
        current: connected,
        last_seen_ms: Some(1_764_000_000_000),
        containers: containers.into_iter().map(|c| (c.id.clone(), c)).collect(),
        ..HostReport::default()
    })
}

fn versioned<T>(value: T) -> Arc<Versioned<T>> {
    Arc::new(Versioned { value, revision: Revision(1) })
}

fn facts(name: &str) -> HostFacts {
    HostFacts {
        name: host_name(name),
        godwit_version: "0.1.0".to_owned(),
        kernel: "6.12".to_owned(),
        architecture: "x86_64".to_owned(),
        criu: None,
        cpu_features: Vec::new(),
        cpu_model: String::new(),
        cpus: MilliCpu(4000),
        cpu_mhz: 2400,
        memory: Bytes::mib(8192),
        disk_free: Bytes(0),
        tunnel_address: [10, 0, 0, 1].into(),
        migration_address: ([10, 0, 0, 1], 7718).into(),
        certificate_sha256: String::new(),
        labels: Default::default(),
        written_pages: godwit_model::host::WrittenPages::Tracked { by: Default::default() },
    }
}

/// One container, and what its host `h1` last said, if anything.
fn sight(record: ContainerRecord, report: Option<Arc<HostReport>>) -> Sight {
    let mut world = World::default();
    for (index, name) in ["h1", "h2"].into_iter().enumerate() {
        let host = HostRecord {
            lease: None,
            before_failure: None,
            declared_dead: false,
            facts: facts(name),
            state: HostState::Active,
            index: index as u32,
            evacuation: None,
            bring_back: Vec::new(),
        };
        world.hosts.insert(host_name(name), versioned(host));
    }
    world.containers.insert(record.name().clone(), versioned(record));
    let reports = report.into_iter().map(|report| (host_name("h1"), report)).collect();
    Sight { world: Arc::new(world), reports, ..Sight::default() }
}

fn seen(record: ContainerRecord, report: Option<Arc<HostReport>>) -> (String, Option<String>) {
    let view = sight(record, report).containers(None).remove(0);
    (view.state, view.message)
}

fn a_move(outcome: Outcome) -> Move {
    Move {
        id: "d0d0d0d0d0d0".parse().unwrap(),
        container: ID.parse().unwrap(),
        name: "shop/db-1".parse().unwrap(),
        from: host_name("h1"),
        to: host_name("h2"),
        generation: Generation(3),
        options: Default::default(),
        requested_at_ms: 1,
        finished_at_ms: None,
        phase: Phase::Copy,
        outcome,
        progress: Progress::default(),
        summary: None,
        cause: None,
    }
}

#[test]
fn a_container_is_what_its_host_says() {
    let record = record("shop/db-1", Some("h1"));
    let mut failed = status(&record, ContainerState::Failed);
    failed.message = Some("no such image".to_owned());
    let report = report(true, vec![failed]);
    assert_eq!(seen(record, Some(report)), ("failed".to_owned(), Some("no such image".to_owned())));
}

#[test]
fn before_the_first_report_it_is_being_prepared() {
    let record = record("shop/db-1", Some("h1"));
    assert_eq!(seen(record, Some(report(true, Vec::new()))).0, "preparing");
}

#[test]
fn what_is_said_of_an_earlier_generation_is_not_about_this_copy() {
    let record = record("shop/db-1", Some("h1"));
    let mut stale = status(&record, ContainerState::Running);
    stale.generation = Generation(2);
    let view = sight(record, Some(report(true, vec![stale]))).containers(None).remove(0);
    assert_eq!((view.state.as_str(), view.status, view.health), ("preparing", None, None));
}

#[test]
fn a_host_that_cannot_be_heard_leaves_its_containers_unknown() {
    let record = record("shop/db-1", Some("h1"));
    let last = status(&record, ContainerState::Running);
    let view = sight(record.clone(), Some(report(false, vec![last]))).containers(None).remove(0);
    assert_eq!(view.state, "unknown");
    assert_eq!(view.message.unwrap(), "h1 is not connected, it was last heard at 2025-11-24T16:00:00Z");
    // Old news, and marked as such: the report stays, the health does not.
    assert!(view.status.is_some() && view.health.is_none());
    let (state, message) = seen(record.clone(), None);
    assert_eq!(
        (state.as_str(), message.unwrap().as_str()),
        ("unknown", "h1 has not connected since the controller started")
    );
    let just_linked = Arc::new(HostReport { connected: true, ..HostReport::default() });
    assert_eq!(seen(record, Some(just_linked)).0, "unknown");
}

#[test]
fn without_a_host_it_waits_and_says_for_what() {
    let mut record = record("shop/db-1", None);
    let mut sight = sight(record.clone(), None);
    sight.waiting.insert(record.name().clone(), "no host has 4 GiB free".to_owned());
    let view = sight.containers(None).remove(0);
    assert_eq!((view.state.as_str(), view.message.unwrap().as_str()), ("waiting", "no host has 4 GiB free"));
    for host in ["h2", "h1", "h2"] {
        record.leaving.push(Leaving { id: ID.parse().unwrap(), host: host_name(host) });
    }
    let (state, message) = seen(record.clone(), None);
    let wanted = "waits until h1, h2 have removed what it replaces";
    assert_eq!((state.as_str(), message.unwrap().as_str()), ("waiting", wanted));
    record.leaving.clear();
    record.run = false;
    assert_eq!(seen(record, None).0, "stopped");
}

#[test]
fn what_is_to_go_is_seen_until_it_has_gone() {
    let mut record = record("shop/db-1", Some("h1"));
    record.leave_host();
    record.removed = true;
    let (state, message) = seen(record, Some(report(true, Vec::new())));
    assert_eq!((state.as_str(), message.unwrap().as_str()), ("removing", "waits until h1 have removed it"));
}

#[test]
fn a_move_is_seen_from_its_request_to_its_release() {
    let mut record = record("shop/db-1", Some("h1"));
    let running = report(true, vec![status(&record, ContainerState::Running)]);
    for (host, set, outcome) in
        [("h1", true, Some(Outcome::Moving)), ("h2", false, Some(Outcome::HandedOver)), ("h1", true, None)]
    {
        record.host = Some(host_name(host));
        record.moving = set.then(|| "d0d0d0d0d0d0".parse().unwrap());
        let mut sight = sight(record.clone(), Some(Arc::clone(&running)));
        sight.moves.extend(outcome.map(|outcome| (record.spec.id.clone(), a_move(outcome))));
        let view = sight.containers(None).remove(0);
        assert_eq!(view.state, "moving");
        assert_eq!(view.moving.as_ref().map(MoveId::as_str), Some("d0d0d0d0d0d0"));
        assert!(view.message.is_none_or(|m| m == "from h1 to h2: copy"));
    }
}

#[test]
fn hosts_count_what_placement_counts() {
    let mut record = record("shop/db-1", Some("h1"));
    let at = |sight: &Sight| -> Vec<(u32, u64)> {
        sight.hosts().iter().map(|h| (h.containers, h.reserved_memory.0 >> 20)).collect()
    };
    let mut there = sight(record.clone(), Some(report(true, Vec::new())));
    assert_eq!(at(&there), [(1, 64), (0, 0)]);
    there.moves.insert(record.spec.id.clone(), a_move(Outcome::Moving));
    assert_eq!(at(&there), [(1, 64), (0, 64)]);
    let hosts = there.hosts();
    assert!(hosts[0].connected && !hosts[1].connected);
    assert_eq!((hosts[1].last_seen_ms, hosts[0].cloudlets.0), (None, 24));
    record.leave_host();
    assert_eq!(at(&sight(record, None)), [(0, 64), (0, 0)]);
}

#[test]
fn layers_count_what_runs_and_can_be_heard() {
    let manifest = "name: shop\nservices:\n  db:\n    image: oci:/srv/images/redis\n    ports: ['8080:80']\n    deploy: {replicas: 2}\n";
    let manifest = godwit_model::manifest::parse("compose.yaml", manifest, None, &BTreeMap::new()).unwrap();
    let env = EnvRecord { manifest, slot: 1, deleted: false };
    let record = record("shop/db-1", Some("h1"));
    let status = status(&record, ContainerState::Running);
    for (connected, running) in [(true, 1), (false, 0)] {
        let view = sight(record.clone(), Some(report(connected, vec![status.clone()]))).environment(&env);
        assert_eq!((view.layers[0].wanted, view.layers[0].running), (2, running));
        assert_eq!(
            (view.layers[0].ports.join(" "), view.subnet, view.vni),
            ("8080:80/tcp".to_owned(), "10.64.16.0/20".to_owned(), 4098)
        );
        assert_eq!(view.containers.len(), 1);
    }
    let going = EnvRecord { deleted: true, ..env };
    assert_eq!(sight(record, None).environment(&going).layers[0].wanted, 0);
}
