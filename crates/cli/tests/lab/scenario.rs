//! What an operator does with five hosts in a day: an application is spread, a host is emptied, opened and filled again, the
//! application grows and shrinks, a host dies. Clients work on every layer.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::moves::wait_listening;
use crate::site::kill_everything;
use crate::world::{Client, World};

const LAYERS: [(&str, u16); 3] = [("front", 7000), ("middle", 7001), ("back", 7002)];
/// From the death of a host until everything it had runs elsewhere, in seconds.
const RECOVERY_LIMIT_S: u64 = 30;

fn manifest(replicas: u32) -> String {
    let mut text = "name: shop\nservices:\n".to_owned();
    for (layer, port) in LAYERS {
        text.push_str(&format!(
            r#"
  {layer}:
    image: oci:${{WORKLOAD}}:workload
    command: [memory-files-streams, --port, "{port}", --dir, /data, --memory-mib, "16"]
    ports: ["{port}:{port}"]
    deploy: {{replicas: {replicas}}}
    x-godwit: {{spread: strict}}
"#
        ));
    }
    text
}

/// The hosts of a layer's members, all of which run.
fn hosts(world: &World, layer: &str, replicas: u32) -> Vec<String> {
    let name = |n| format!("shop/{layer}-{n}");
    (1..=replicas).map(|n| world.wait_running(&name(n))["host"].as_str().unwrap().to_owned()).collect()
}

fn assert_spread(world: &World, replicas: u32) {
    for (layer, _) in LAYERS {
        let on = hosts(world, layer, replicas);
        assert_eq!(on.iter().collect::<BTreeSet<_>>().len(), on.len(), "{layer} is on {on:?}");
    }
}

/// Over the ports of this host.
fn clients(world: &World, via: u32) -> Vec<Client> {
    let client = |(_, port): (&str, u16)| {
        let address = format!("{}:{port}", world.host_address(via));
        wait_listening(world, &address);
        world.client(&[
            "client",
            "--address",
            &address,
            "--connections",
            "6",
            "--interval-us",
            "5000",
            "--until-stdin-closes",
        ])
    };
    LAYERS.into_iter().map(client).collect()
}

fn how_many_on(world: &World, host: &str) -> usize {
    world.json(&["ps"]).as_array().unwrap().iter().filter(|c| c["host"] == host).count()
}

#[test]
fn five_hosts_live_through_a_day() {
    let Some(world) = World::up("day", 5, &["--link", "10gbit"]) else { return };
    world.apply(&manifest(3));
    assert_spread(&world, 3);
    let working = clients(&world, 1);

    let emptied = world.host_of("shop/front-1");
    let ended = world.json(&["host", "evacuate", &emptied]);
    assert_eq!((ended["state"].as_str(), ended["containers"].as_u64()), (Some("evacuated"), Some(0)), "{ended:#}");
    assert_spread(&world, 3);

    // It comes back empty, which balancing finds out.
    world.ok(&["host", "activate", &emptied]);
    world.ok(&["balance", "automatic", "--rest", "1s"]);
    let filled = || (how_many_on(&world, &emptied) > 0).then_some(());
    assert!(world.until(Duration::from_secs(60), filled).is_some(), "{}", world.logs());
    let moves = || world.json(&["move", "list"]);
    let over = || moves().as_array().unwrap().iter().all(|m| m["finished_at_ms"].is_u64()).then_some(());
    assert!(world.until(Duration::from_secs(60), over).is_some(), "{:#}", moves());
    world.ok(&["balance", "off"]);
    assert_spread(&world, 3);

    world.apply(&manifest(4));
    assert_spread(&world, 4);
    // Those that came last go; nobody is connected to them.
    world.apply(&manifest(3));
    let shrunk = || (world.json(&["ps"]).as_array().unwrap().len() == 9).then_some(());
    assert!(world.until(Duration::from_secs(60), shrunk).is_some(), "{}", world.logs());
    assert_spread(&world, 3);
    for client in working {
        let report = client.finish();
        println!("longest client gap {:.0} ms", report["client_gap_ms"].as_f64().unwrap());
    }

    // Whose member dies has to connect again; whoever comes then finds every layer whole.
    let dead = world.host_of("shop/back-2");
    let before = world.json(&["ps"]);
    let number: u32 = dead[1..].parse().unwrap();
    kill_everything(&world, number);
    let died = Instant::now();
    let away = || {
        let all = world.json(&["ps"]);
        all.as_array().unwrap().iter().all(|c| c["state"] == "running" && c["host"] != dead.as_str()).then_some(all)
    };
    let after = world.until(Duration::from_secs(RECOVERY_LIMIT_S), away);
    let after = after.unwrap_or_else(|| panic!("not recovered within {RECOVERY_LIMIT_S} s\n{}", world.logs()));
    println!("all run again {:.1} s after a host died", died.elapsed().as_secs_f64());
    for was in before.as_array().unwrap().iter().filter(|c| c["host"] != dead.as_str()) {
        let is = after.as_array().unwrap().iter().find(|c| c["name"] == was["name"]).unwrap();
        if (&is["host"], &is["status"]["pid"]) != (&was["host"], &was["status"]["pid"]) {
            let name = was["name"].as_str().unwrap();
            let said = world.ok(&["logs", "--tail", "20", name]);
            panic!("{name} was started anew: {was:#}\n{is:#}\n{said}\n{}\n{}", world.ok(&["events"]), world.logs());
        }
    }
    assert_spread(&world, 3);
    for client in clients(&world, number % 5 + 1) {
        client.finish();
    }
    world.down();
}
