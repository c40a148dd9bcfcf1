//! How a move sends: slowing down, rate, deadline and compression, with real containers on real links.

use std::time::Duration;

use godwit_lab::Node;
use serde_json::Value;

use crate::moves::{WORKLOAD, status, wait_listening};
use crate::world::World;

pub const WRITER: &str = r#"
name: t
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "64", --dirty-pages-per-second, "20000"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
volumes: {files: {}}
"#;

/// Processor time of a container on its host: the quota in microseconds, `None` without a limit.
fn cpu_quota(world: &World, name: &str) -> Option<u64> {
    let container = world.container(name).unwrap();
    let host: u32 = container["host"].as_str().unwrap()[1..].parse().unwrap();
    let path = format!(
        "{}/{}",
        &world.lab.paths().containers_cgroup(Node::Host(host))[1..],
        container["id"].as_str().unwrap()
    );
    let v1 = std::path::Path::new("/sys/fs/cgroup/cpu").join(&path).join("cpu.cfs_quota_us");
    let v2 = std::path::Path::new("/sys/fs/cgroup").join(&path).join("cpu.max");
    let text = std::fs::read_to_string(&v1).or_else(|_| std::fs::read_to_string(&v2)).unwrap();
    text.split_ascii_whitespace().next().unwrap().parse().ok()
}

/// 80 MB/s of written pages on a link of 25 MB/s: it moves because it is slowed down for a while, or not at all.
#[test]
fn what_writes_faster_than_the_link_is_slowed_down_and_given_its_time_back() {
    let Some(world) = World::up("slowed", 2, &["--link", "200mbit"]) else { return };
    world.apply(WRITER);
    world.wait_running("t/w-1");
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
    let to = if world.host_of("t/w-1") == "h1" { "h2" } else { "h1" };
    let never = ["migrate", "t/w-1", "--to", to, "--mode", "pre-copy", "--max-downtime", "400", "--never-slow"];
    let said = world.refused(1, &[&never[..], &["--compress", "never"]].concat());
    assert!(said.contains("it writes faster than that can be sent"), "{said}");
    let begun = world.ok(&["migrate", "t/w-1", "--to", to, "--max-downtime", "400", "--compress", "never", "--detach"]);
    let slowed = world.until(Duration::from_secs(30), || cpu_quota(&world, "t/w-1"));
    assert!(slowed.is_some(), "it was never slowed down\n{}", world.logs());
    world.ok(&["move", "cancel", begun.trim()]);
    let back = world.until(Duration::from_secs(5), || cpu_quota(&world, "t/w-1").is_none().then_some(()));
    assert!(back.is_some(), "its time is given back after a move that was cancelled");
    let over = || world.container("t/w-1").unwrap()["moving"].is_null().then_some(());
    assert!(world.until(Duration::from_secs(10), over).is_some());
    let done = world.json(&["migrate", "t/w-1", "--to", to, "--max-downtime", "400", "--compress", "never"]);
    assert_eq!(done["outcome"]["state"], "done", "{done:#}");
    let percent = done["summary"]["slowed_to_percent"].as_u64();
    assert!(percent.is_some_and(|p| (6..=50).contains(&p)), "{done:#}");
    assert_eq!(cpu_quota(&world, "t/w-1"), None, "and at the destination it has all of it");
    println!("slowed to {percent:?} %, downtime {} ms", done["summary"]["downtime_ms"]);
    let after = status(&world);
    assert_eq!((&after["ok"], &after["streams_broken"]), (&true.into(), &0.into()), "{after:#}");
    client.finish();
    world.down();
}

/// Memory goes over several connections at once, also while it is written to, and arrives as it was.
#[test]
fn memory_travels_on_several_connections() {
    let Some(world) = World::up("several", 2, &["--link", "10gbit", "--hold-points"]) else { return };
    world.apply(&WRITER.replace("\"20000\"", "\"2000\"").replace("\"64\"", "\"256\""));
    world.wait_running("t/w-1");
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
    for (connections, more) in
        [("4", None), ("8", Some(["--bandwidth", "2gbit"])), ("2", Some(["--mode", "post-copy"]))]
    {
        let from = world.host_of("t/w-1");
        let to: u32 = if from == "h1" { 2 } else { 1 };
        world.hold(Node::Host(from[1..].parse().unwrap()), "copy");
        let name = format!("h{to}");
        let mut argv = vec!["migrate", "t/w-1", "--to", &name, "--connections", connections, "--detach"];
        argv.extend(more.iter().flatten());
        let id = world.ok(&argv).trim().to_owned();
        if more.is_none_or(|more| more[0] != "--mode") {
            let held = || world.is_held(Node::Host(from[1..].parse().unwrap()), "copy").then_some(());
            assert!(world.until(Duration::from_secs(20), held).is_some(), "{}", world.logs());
            // By ss(8)'s source: connections to the port on which containers arrive.
            let open = established(&world, to);
            assert_eq!(open.to_string(), connections, "connections that carry the move");
        }
        world.let_go(Node::Host(from[1..].parse().unwrap()), "copy");
        let over = || {
            let one = world.json(&["move", "show", &id]);
            (one["outcome"]["state"] == "done" || one["outcome"]["state"] == "failed").then_some(one)
        };
        let done = world.until(Duration::from_secs(60), over).expect("the move ends");
        assert_eq!(done["outcome"]["state"], "done", "{done:#}\n{}", world.logs());
        let memory = done["summary"]["memory_bytes"].as_u64().unwrap();
        assert!(memory >= 200 << 20 && done["summary"]["bytes_sent"].as_u64().unwrap() > memory, "{done:#}");
        let after = status(&world);
        assert_eq!((&after["ok"], &after["streams_broken"]), (&true.into(), &0.into()), "{after:#}");
    }
    client.finish();
    world.down();
}

/// TCP connections that are open at the port of a host on which containers arrive (/proc/net/tcp, state 1).
fn established(world: &World, host: u32) -> usize {
    let output = world.lab.exec(Node::Host(host), &["cat", "/proc/net/tcp"]).unwrap().output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let port = format!(":{:04X}", 7718);
    let rows = text.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&port) && row[3] == "01").count()
}

/// A rate, a deadline and compression are kept, and what arrives is right.
#[test]
fn how_a_move_sends_can_be_chosen() {
    let Some(world) = World::up("chosen", 2, &["--link", "10gbit"]) else { return };
    world.apply(&WORKLOAD.replace("\"32\"", "\"64\""));
    world.wait_running("t/w-1");
    wait_listening(&world, &format!("{}:7000", world.host_address(1)));
    let mut from = world.host_of("t/w-1");
    let other = |host: &str| if host == "h1" { "h2" } else { "h1" };
    let late = ["migrate", "t/w-1", "--to", other(&from), "--bandwidth", "40mbit", "--deadline", "1s"];
    let said = world.refused(1, &late);
    assert!(said.contains("it did not stand still within its deadline of 1 s"), "{said}");
    let said = world.refused(1, &["migrate", "t/w-1", "--to", other(&from), "--bandwidth", "100kbit"]);
    assert!(said.contains("less than 1mbit"), "{said}");
    let mut sent = Vec::new();
    for choice in [["--compress", "always"], ["--compress", "never"], ["--bandwidth", "250mbit"]] {
        let to = other(&from);
        let done = world.json(&["migrate", "t/w-1", "--to", to, choice[0], choice[1]]);
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        let summary = &done["summary"];
        println!("{choice:?}: {} bytes in {} ms", summary["bytes_sent"], summary["total_ms"]);
        sent.push((summary["bytes_sent"].as_u64().unwrap(), summary["total_ms"].as_f64().unwrap()));
        from = to.to_owned();
        let after = status(&world);
        assert_eq!((&after["ok"], &after["streams_broken"]), (&true.into(), &0.into()), "{after:#}");
    }
    let [packed, plain, slow] = sent[..] else { unreachable!() };
    assert!(packed.0 < plain.0, "compressed {} bytes, plain {}", packed.0, plain.0);
    // At 31 MB/s; the last pages, which are not held back, are a small part.
    let least_ms = slow.0 as f64 / 31.25e6 * 1e3 * 0.7;
    assert!(slow.1 > least_ms && slow.1 > plain.1, "{} bytes took {} ms, {least_ms} at least", slow.0, slow.1);
    world.down();
}

const THREE: &str = r#"
name: t
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "32"]
    volumes: ["files:/data"]
    deploy: {replicas: 3, resources: {limits: {cpus: "CPUS", memory: MEMORY}}}
volumes: {files: {}}
"#;

/// Three moves between two hosts share the link, and what is asked of the containers meanwhile holds on the other side.
#[test]
fn several_move_at_once_and_are_resized_meanwhile() {
    let Some(world) = World::up("at-once", 2, &["--link", "10gbit"]) else { return };
    let manifest = |cpus: &str, memory: &str| THREE.replace("CPUS", cpus).replace("MEMORY", memory);
    world.apply(&manifest("1.5", "512m"));
    let names = ["t/w-1", "t/w-2", "t/w-3"];
    let started = |name: &str| world.container(name).unwrap()["status"]["started_at_ms"].clone();
    let before: Vec<(String, Value)> = names
        .iter()
        .map(|name| {
            world.wait_running(name);
            (world.host_of(name), started(name))
        })
        .collect();
    let moves: Vec<String> = names
        .iter()
        .zip(&before)
        .map(|(name, (host, _))| {
            let to = if host == "h1" { "h2" } else { "h1" };
            world.ok(&["migrate", name, "--to", to, "--bandwidth", "80mbit", "--detach"]).trim().to_owned()
        })
        .collect();
    let shown = |id: &String| world.json(&["move", "show", id]);
    let copying = || moves.iter().all(|id| shown(id)["phase"] == "copy").then_some(());
    assert!(world.until(Duration::from_secs(20), copying).is_some(), "they never copied at the same time");
    world.apply(&manifest("0.5", "384m"));
    let over = || {
        let all: Vec<Value> = moves.iter().map(shown).collect();
        all.iter().all(|m| m["outcome"]["state"] == "done" || m["outcome"]["state"] == "failed").then_some(all)
    };
    for one in world.until(Duration::from_secs(60), over).expect("the moves end") {
        assert_eq!(one["outcome"]["state"], "done", "{one:#}\n{}", world.logs());
    }
    for (name, (from, started_at)) in names.iter().zip(&before) {
        assert_ne!(world.host_of(name), *from);
        assert!(started_at.is_u64(), "{started_at}");
        let resized = || (cpu_quota(&world, name) == Some(50_000)).then_some(());
        assert!(world.until(Duration::from_secs(10), resized).is_some(), "{name}: {:?}", cpu_quota(&world, name));
        assert_eq!(started(name), *started_at, "{name} is the same process");
    }
    world.down();
}
