//! A container that wants more than its host has, while clients work.

use std::path::Path;
use std::time::Duration;

use godwit_lab::Node;
use serde_json::Value;

use crate::moves::wait_listening;
use crate::world::{Client, World};

/// `w` is to grow; `x` beside it is smaller, so that it is cheaper to move. A host has 1 GiB.
const APPLICATION: &str = r#"
name: e
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "96"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
    deploy: {resources: {limits: {memory: 400m}, reservations: {memory: 300m}}}
  x:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7001", --dir, /data, --memory-mib, "8"]
    volumes: ["more:/data"]
    ports: ["7001:7001"]
    deploy: {resources: {limits: {memory: 500m}, reservations: {memory: 500m}}}
volumes: {files: {}, more: {}}
"#;

fn with_w(limit: &str, reserved: &str) -> String {
    APPLICATION
        .replace("memory: 400m", &format!("memory: {limit}"))
        .replace("memory: 300m", &format!("memory: {reserved}"))
}

/// Both on h1, a client on each.
fn begin(tag: &str, hosts: u32) -> Option<(World, [Client; 2])> {
    let world = World::up(tag, hosts, &["--link", "10gbit", "--memory", "1gb"])?;
    let others: Vec<String> = (2..=hosts).map(|n| format!("h{n}")).collect();
    others.iter().for_each(|host| drop(world.ok(&["host", "cordon", host])));
    world.apply(APPLICATION);
    let on_h1 = |name: &str| assert_eq!(world.wait_running(name)["host"], "h1");
    ["e/w-1", "e/x-1"].into_iter().for_each(on_h1);
    let clients = ["7000", "7001"].map(|port| {
        let address = format!("{}:{port}", world.host_address(1));
        wait_listening(&world, &address);
        world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"])
    });
    others.iter().for_each(|host| drop(world.ok(&["host", "activate", host])));
    Some((world, clients))
}

/// The memory limit that the kernel keeps, in bytes.
fn limit(world: &World, host: u32, view: &Value) -> u64 {
    let containers = world.lab.paths().containers_cgroup(Node::Host(host));
    let below = format!("{}/{}", &containers[1..], view["id"].as_str().unwrap());
    let files = [("memory", "memory.limit_in_bytes"), ("", "memory.max")];
    let read = |(root, file)| std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(root).join(&below).join(file));
    let text = files.into_iter().find_map(|file| read(file).ok()).expect("a cgroup with a memory limit");
    text.trim().parse().unwrap()
}

fn events(world: &World) -> Vec<Value> {
    let lines = world.ok(&["events", "--output", "json"]);
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn same(before: &Value, after: &Value, what: &[&str]) {
    for field in what {
        assert_eq!(after["status"][field], before["status"][field], "{field} of {after:#}");
    }
}

#[test]
fn a_neighbour_makes_way_for_one_that_grows_and_nobody_notices() {
    let Some((world, clients)) = begin("room", 3) else { return };
    // What a move costs follows from what hosts report of memory, some seconds after a start.
    let filled = |c: &Value| c["status"]["memory"].as_u64().is_some_and(|bytes| bytes > 96 << 20);
    world.wait("e/w-1", "filled", filled);
    let before = ["e/w-1", "e/x-1"].map(|name| world.container(name).unwrap());
    assert_eq!(limit(&world, 1, &before[0]), 400 << 20);
    world.apply(&with_w("800m", "700m"));
    let grown = world.wait("e/w-1", "grown", |c| {
        c["growth"].is_null() && c["resources"]["reserved_memory"].as_u64() == Some(700 << 20)
    });
    let set = || (limit(&world, 1, &grown) == 800 << 20).then_some(());
    assert!(world.until(Duration::from_secs(10), set).is_some(), "{}", limit(&world, 1, &grown));
    let neighbour = world.wait_running("e/x-1");
    assert!(grown["host"] == "h1" && neighbour["host"] != "h1", "{grown:#}{neighbour:#}");
    same(&before[0], &world.wait_running("e/w-1"), &["pid", "restarts", "started_at_ms"]);
    same(&before[1], &neighbour, &["restarts", "started_at_ms"]);

    let all = events(&world);
    let at = |kind: &str, text: &str| {
        let found = all.iter().position(|e| e["kind"] == kind && e["message"].as_str().unwrap().contains(text));
        found.unwrap_or_else(|| panic!("no {kind} with {text:?} in {all:#?}"))
    };
    let moved = at("move-done", "it makes room for e/w-1");
    assert!(at("container-growing", "e/x-1 → ") < moved && moved < at("container-grown", "e/w-1 has 700 MiB"));
    assert!(world.ok(&["explain", "e/x-1"]).contains("it makes room for e/w-1"));

    // More than any host has: it runs on as it is, and it is said why.
    world.apply(&with_w("1500m", "1400m"));
    let refused = world.wait("e/w-1", "refused", |c| c["growth"]["refused"].is_string());
    assert_eq!(limit(&world, 1, &refused), 800 << 20);
    for verb in [["explain", "e/w-1"], ["ps", "e"]] {
        let said = world.ok(&verb);
        assert!(said.contains("shall have 1.37 GiB") && said.contains("there is no way"), "{said}");
    }
    // Asked for no more, nothing is left of it.
    world.apply(&with_w("800m", "700m"));
    assert!(world.container("e/w-1").unwrap()["growth"].is_null());
    for client in clients {
        let report = client.finish();
        println!("longest client gap {:.0} ms", report["client_gap_ms"].as_f64().unwrap());
    }
    world.down();
}
