//! Hosts that are emptied while clients work, and filled again.

use std::time::Duration;

use serde_json::Value;

use crate::moves::wait_listening;
use crate::world::{Client, World};

/// Three layers: one with files and streams that check themselves, one that is spread strictly, one that is small.
const APPLICATION: &str = r#"
name: e
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "32"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
  x:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7001", --dir, /data, --memory-mib, "16"]
    deploy: {replicas: 2}
    volumes: ["more:/data"]
    x-godwit: {spread: strict}
  y:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "sleep 100000"]
    deploy: {replicas: 3}
volumes: {files: {}, more: {}}
"#;

const ALL: [&str; 6] = ["e/w-1", "e/x-1", "e/x-2", "e/y-1", "e/y-2", "e/y-3"];

fn begin(tag: &str, hosts: u32) -> Option<(World, Client)> {
    let world = World::up(tag, hosts, &["--link", "10gbit"])?;
    world.apply(APPLICATION);
    for name in ALL {
        world.wait_running(name);
    }
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
    Some((world, client))
}

fn state_of(world: &World, host: &str) -> Value {
    world.json(&["host", "list"]).as_array().unwrap().iter().find(|h| h["name"] == host).unwrap().clone()
}

fn on(world: &World, host: &str) -> Vec<&'static str> {
    ALL.into_iter().filter(|name| world.host_of(name) == host).collect()
}

fn apart(world: &World) -> bool {
    world.host_of("e/x-1") != world.host_of("e/x-2")
}

#[test]
fn a_host_is_emptied_and_filled_again_and_nobody_notices() {
    let Some((world, client)) = begin("emptied", 4) else { return };
    let host = world.host_of("e/w-1");
    let there = on(&world, &host);
    let planned = world.json(&["host", "evacuate", &host, "--dry-run"]);
    assert_eq!(planned["steps"].as_array().unwrap().len(), there.len(), "{planned:#}");
    assert_eq!(state_of(&world, &host)["state"], "active");
    assert_eq!(world.json(&["move", "list"]), serde_json::json!([]));

    let ended = world.json(&["host", "evacuate", &host, "--parallel", "2"]);
    assert_eq!((ended["state"].as_str(), ended["containers"].as_u64()), (Some("evacuated"), Some(0)), "{ended:#}");
    assert!(on(&world, &host).is_empty() && apart(&world));
    let said = world.refused(1, &["migrate", "e/w-1", "--to", &host]);
    assert!(said.contains(&host), "{said}");

    world.ok(&["host", "activate", &host, "--bring-back"]);
    let back = || (on(&world, &host) == there).then_some(());
    assert!(
        world.until(Duration::from_secs(30), back).is_some(),
        "{:?} of {there:?}\n{}",
        on(&world, &host),
        world.logs()
    );
    assert!(apart(&world));
    assert_eq!(state_of(&world, &host)["state"], "active");
    let report = client.finish();
    println!("longest client gap {:.0} ms", report["client_gap_ms"].as_f64().unwrap());
    world.down();
}

/// The controller is killed as soon as the first container is on its way.
#[test]
fn an_evacuation_goes_on_after_the_controller_was_killed() {
    let Some((world, client)) = begin("survives", 4) else { return };
    let host = world.host_of("e/w-1");
    world.ok(&["host", "evacuate", &host, "--parallel", "1", "--detach"]);
    let begun = || (!world.json(&["move", "list"]).as_array().unwrap().is_empty()).then_some(());
    assert!(world.until(Duration::from_secs(10), begun).is_some(), "{}", world.logs());
    world.lab.kill_controller().unwrap();
    world.lab.start_controller().unwrap();
    let over = || (state_of(&world, &host)["state"] != "evacuating").then_some(());
    assert!(world.until(Duration::from_secs(60), over).is_some(), "{}", world.logs());
    assert_eq!(state_of(&world, &host)["state"], "evacuated", "{}", world.logs());
    assert!(on(&world, &host).is_empty() && apart(&world));
    client.finish();
    world.down();
}

/// Two hosts, and a layer that must be on two: one of them stays, the others go, and the host says why.
#[test]
fn what_has_no_other_place_stays_and_the_rest_goes() {
    let Some((world, client)) = begin("stays", 2) else { return };
    let host = world.host_of("e/x-1");
    let said = world.refused(1, &["host", "evacuate", &host]);
    assert!(said.contains("is not empty: e/x-1") && said.contains("spread strictly"), "{said}");
    let view = state_of(&world, &host);
    assert_eq!((view["state"].as_str(), on(&world, &host)), (Some("evacuation-failed"), vec!["e/x-1"]), "{view:#}");
    assert!(view["evacuation"]["stays"]["e/x-1"].is_array(), "{view:#}");
    world.ok(&["host", "activate", &host]);
    assert_eq!(state_of(&world, &host)["state"], "active");
    client.finish();
    world.down();
}

/// What cannot move live stays, unless whoever empties the host allows it to be started anew elsewhere.
#[test]
fn what_cannot_move_is_started_anew_only_if_that_is_allowed() {
    let Some(world) = World::up("restarted", 2, &["--link", "10gbit"]) else { return };
    world.apply(
        r#"
name: e
services:
  y:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "sleep 100000"]
    volumes: ["/etc/hostname:/of-the-host:ro"]
"#,
    );
    let was = world.wait_running("e/y-1");
    let host = was["host"].as_str().unwrap().to_owned();
    let said = world.refused(1, &["host", "evacuate", &host]);
    assert!(said.contains("is not empty: e/y-1"), "{said}");
    let is = world.wait_running("e/y-1");
    assert_eq!((&is["host"], &is["status"]["pid"]), (&was["host"], &was["status"]["pid"]), "it was left alone");

    let planned = world.json(&["host", "evacuate", &host, "--allow-restart", "--dry-run"]);
    assert_eq!(planned["steps"][0]["how"], "restart", "{planned:#}");
    let ended = world.json(&["host", "evacuate", &host, "--allow-restart"]);
    assert_eq!(ended["state"], "evacuated", "{ended:#}");
    let is = world.wait_running("e/y-1");
    assert_ne!(is["host"], was["host"]);
    assert_ne!(is["status"]["pid"], was["status"]["pid"]);
    world.down();
}
