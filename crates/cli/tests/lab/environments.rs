//! Environments from a file to running containers and back to nothing.

use std::time::{Duration, Instant};

use godwit_lab::Node;
use serde_json::{Value, json};

use crate::world::{World, text};

const SHOP: &str = r#"
name: s
services:
  web:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "mkdir -p /w && hostname >/w/index.html && httpd -f -p 80 -h /w"]
    ports: ["8080:80"]
    deploy: {replicas: 3}
    depends_on: {db: {condition: service_healthy}}
    x-godwit: {spread: strict}
  db:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "echo ready; exec sleep 100000"]
    volumes: ["files:/data"]
    healthcheck: {test: [CMD, test, -d, /data], interval: 1s}
volumes: {files: {}}
"#;

fn get(world: &World, host: u32) -> Option<String> {
    let url = format!("http://{}:8080/", world.host_address(host));
    let output = world.on_client(&["curl", "-sf", "--max-time", "5", &url]);
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

#[test]
fn an_environment_lives_and_goes() {
    let Some(world) = World::up("env", 3, &[]) else { return };
    world.apply(SHOP);
    for name in ["s/web-1", "s/web-2", "s/web-3"] {
        world.wait_running(name);
    }
    world.wait_healthy("s/db-1");
    let mut hosts: Vec<String> = ["s/web-1", "s/web-2", "s/web-3"].iter().map(|n| world.host_of(n)).collect();
    hosts.sort();
    assert_eq!(hosts, ["h1", "h2", "h3"], "spread strictly");

    // The same file again changes nothing; a wrong one changes nothing either and says where it is wrong.
    let before = world.json(&["env", "show", "s"]);
    let path = world.manifest(SHOP);
    let again = world.json(&["env", "apply", "-f", path.to_str().unwrap()]);
    assert_eq!(again["changes"], json!([]), "{again:#}");
    let wrong = world.manifest(&SHOP.replace("    depends_on", "    privileged: true\n    depends_on"));
    let said = world.refused(1, &["env", "apply", "-f", wrong.to_str().unwrap()]);
    assert!(said.contains("compose.yaml:9:") && said.contains("privileged"), "{said}");
    let same =
        |view: &Value| view["containers"].as_array().unwrap().iter().map(|c| c["id"].clone()).collect::<Vec<_>>();
    assert_eq!(same(&world.json(&["env", "show", "s"])), same(&before));

    // Names on every host, and published ports on every host whichever the container is on.
    for name in ["s/web-1", "s/web-2", "s/web-3"] {
        let out = world.ok(&[
            "exec",
            name,
            "--",
            "sh",
            "-c",
            "nslookup db 2>&1; nslookup db-1 2>&1; wget -qO- http://web-2/",
        ]);
        let address = world.container("s/db-1").unwrap()["address"].as_str().unwrap().to_owned();
        assert!(out.matches(&address).count() >= 2 && out.contains("web-2"), "{name}: {out}");
    }
    for host in 1..=3 {
        let answers: Vec<String> = (0..12).filter_map(|_| get(&world, host)).collect();
        assert_eq!(answers.len(), 12, "h{host}\n{}", world.logs());
        assert!(
            answers.iter().any(|a| *a != answers[0]),
            "h{host}: one connection after the other to another container"
        );
    }

    // localhost is each container's own.
    let out = world
        .godwit(&["exec", "s/db-1", "--", "timeout", "3", "wget", "-qO-", "http://127.0.0.1:80/"])
        .output()
        .unwrap();
    assert!(!out.status.success(), "{}", text(&out));

    // Logs, exit codes of exec, stop, start, remove.
    assert!(world.ok(&["logs", "s/db-1"]).contains("ready"));
    assert_eq!(world.godwit(&["exec", "s/db-1", "--", "sh", "-c", "exit 42"]).status().unwrap().code(), Some(42));
    world.ok(&["exec", "s/db-1", "--", "sh", "-c", "echo kept >/data/file"]);
    world.ok(&["stop", "s/db-1"]);
    world.wait("s/db-1", "stopped", |c| c["state"] == "stopped");
    world.ok(&["start", "s/db-1"]);
    world.wait_healthy("s/db-1");
    assert_eq!(world.ok(&["exec", "s/db-1", "--", "cat", "/data/file"]), "kept\n");

    // A change that needs another container keeps address, host and volume.
    let old = world.container("s/db-1").unwrap();
    world.apply(&SHOP.replace("echo ready", "echo again"));
    let new = world
        .wait("s/db-1", "replaced", |c| c["id"] != old["id"] && c["state"] == "running" && c["health"] == "healthy");
    assert_eq!((&new["address"], &new["host"]), (&old["address"], &old["host"]));
    assert_eq!(world.ok(&["exec", "s/db-1", "--", "cat", "/data/file"]), "kept\n");

    // A program that ends is started again, and how it ended is known.
    world.ok(&["exec", "s/db-1", "--", "sh", "-c", "kill -9 1; kill -15 1; true"]);

    world.ok(&["env", "delete", "s", "--yes"]);
    let gone = world.until(Duration::from_secs(60), || (world.json(&["ps"]) == json!([])).then_some(()));
    assert!(gone.is_some(), "{:#}\n{}", world.json(&["ps"]), world.logs());
    let gone = world.until(Duration::from_secs(10), || (world.json(&["env", "list"]) == json!([])).then_some(()));
    assert!(gone.is_some());
    for host in 1..=3 {
        let state = world.lab.paths().host_state(Node::Host(host)).join("agent");
        for directory in ["containers", "volumes"] {
            assert_eq!(std::fs::read_dir(state.join(directory)).unwrap().count(), 0, "h{host} {directory}");
        }
        let links = || {
            let output = world.lab.exec(Node::Host(host), &["ls", "/sys/class/net"]).unwrap().output().unwrap();
            String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        let gone = world.until(Duration::from_secs(10), || (links() == "eth0 lo").then_some(()));
        assert!(gone.is_some(), "h{host}: {}", links());
    }
    world.down();
}

const LIVES: &str = r#"
name: l
services:
  a:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "i=0; while true; do i=$$((i+1)); echo tick $$i; sleep 0.1; done"]
    deploy: {replicas: 2}
  once:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "sleep 3; exit 7"]
    restart: "no"
"#;

/// `kill -9` of every agent and the controller: containers go on, are adopted, and exit codes are still known.
#[test]
fn containers_outlive_godwit() {
    let Some(world) = World::up("outlive", 2, &[]) else { return };
    world.apply(LIVES);
    world.wait_running("l/once-1");
    let pid = |name: &str| world.wait_running(name)["status"]["pid"].as_u64().unwrap();
    let before = [pid("l/a-1"), pid("l/a-2")];
    world.lab.kill_controller().unwrap();
    for host in 1..=2 {
        world.lab.kill_agent(host).unwrap();
    }
    // `once` ends while nobody but its keeper is there.
    std::thread::sleep(Duration::from_secs(4));
    for host in 1..=2 {
        world.lab.start_agent(host).unwrap();
    }
    world.lab.start_controller().unwrap();
    let begun = Instant::now();
    let once = world.wait("l/once-1", "known to have ended", |c| c["state"] == "stopped");
    assert_eq!(once["status"]["exit"]["code"], 7, "{once:#}");
    assert_eq!([pid("l/a-1"), pid("l/a-2")], before, "the same processes");
    println!("adopted and reported after {:.1} s", begun.elapsed().as_secs_f64());
    // No tick is missing.
    for name in ["l/a-1", "l/a-2"] {
        let log = world.ok(&["logs", name]);
        let ticks: Vec<u64> = log.lines().filter_map(|l| l.split_once("tick ")?.1.trim().parse().ok()).collect();
        assert!(ticks.len() > 40 && ticks.windows(2).all(|w| w[1] == w[0] + 1), "{name}: {} ticks", ticks.len());
        assert_eq!(world.container(name).unwrap()["status"]["restarts"], 0);
    }
    world.down();
}

/// A lab of which everything was killed is removed all the same.
#[test]
fn a_lab_is_removed_after_kill_9_of_everything() {
    let Some(world) = World::up("killed", 2, &[]) else { return };
    world.apply(LIVES);
    world.wait_running("l/a-1");
    world.lab.kill_controller().unwrap();
    for host in 1..=2 {
        world.lab.kill_agent(host).unwrap();
    }
    // As if one had been killed while something stood still.
    let switch = "/sys/kernel/rcu_expedited";
    let off = std::fs::read_to_string(switch).is_ok_and(|now| now.trim() == "0");
    if off {
        std::fs::write(world.lab.paths().host_state(godwit_lab::Node::Host(1)).join("agent/rcu-expedited"), "")
            .unwrap();
        std::fs::write(switch, "1").unwrap();
    }
    world.down();
    assert!(!off || std::fs::read_to_string(switch).unwrap().trim() == "0", "{switch} was left at 1");
}
