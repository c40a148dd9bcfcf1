//! Containers that are spread over a host that comes back, while clients work.

use std::time::Duration;

use serde_json::Value;

use crate::moves::wait_listening;
use crate::world::World;

const APPLICATION: &str = r#"
name: e
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "16"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
    deploy: {replicas: 6}
volumes: {files: {}}
"#;

/// How long it has to stay quiet after it is done, in seconds: many passes of balancing.
const QUIET_S: u64 = 10;

fn on(world: &World, host: &str) -> usize {
    world.json(&["ps"]).as_array().unwrap().iter().filter(|c| c["host"] == host).count()
}

fn events(world: &World, kind: &str) -> Vec<Value> {
    let lines = world.ok(&["events", "--output", "json"]);
    let all = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|event| event["kind"] == kind).collect()
}

fn wait_done(world: &World, times: usize) {
    let done = || (events(world, "balance-done").len() == times).then_some(());
    assert!(
        world.until(Duration::from_secs(60), done).is_some(),
        "{}\n{}",
        world.ok(&["balance", "show"]),
        world.logs()
    );
}

#[test]
fn containers_spread_onto_a_host_that_is_back_and_then_stay() {
    let Some(world) = World::up("balance", 3, &["--link", "10gbit"]) else { return };
    world.ok(&["host", "cordon", "h3"]);
    world.apply(APPLICATION);
    let names: Vec<String> = (1..=6).map(|n| format!("e/w-{n}")).collect();
    names.iter().for_each(|name| drop(world.wait_running(name)));
    assert_eq!((on(&world, "h1"), on(&world, "h2")), (3, 3));
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "12", "--until-stdin-closes"]);

    // Advice first: it is told and not carried out.
    world.ok(&["host", "activate", "h3"]);
    let advised = || (!events(&world, "balance-advised").is_empty()).then_some(());
    assert!(world.until(Duration::from_secs(30), advised).is_some(), "{}", world.logs());
    let view = world.json(&["balance", "show"]);
    assert_eq!(
        (view["mode"].as_str(), view["advice"]["moves"].as_array().unwrap().len()),
        (Some("advise"), 2),
        "{view:#}"
    );
    assert_eq!(world.json(&["move", "list"]), serde_json::json!([]));

    // Without a rest: only that nothing is better keeps it quiet.
    world.ok(&["balance", "automatic", "--rest", "0s", "--hold", "1s", "--at-once", "2"]);
    wait_done(&world, 1);
    assert_eq!([on(&world, "h1"), on(&world, "h2"), on(&world, "h3")], [2, 2, 2]);
    assert_eq!(events(&world, "move-started").len(), 2);

    // Emptied by hand and open again, it is filled again.
    world.ok(&["host", "evacuate", "h3"]);
    assert_eq!(on(&world, "h3"), 0);
    let emptied = events(&world, "move-started").len();
    assert_eq!(emptied, 4);
    world.ok(&["host", "activate", "h3"]);
    wait_done(&world, 2);
    assert_eq!([on(&world, "h1"), on(&world, "h2"), on(&world, "h3")], [2, 2, 2]);
    let more = || (events(&world, "move-started").len() > emptied + 2).then_some(());
    assert!(world.until(Duration::from_secs(QUIET_S), more).is_none(), "{:#?}", events(&world, "move-started"));
    let view = world.json(&["balance", "show"]);
    assert_eq!((&view["advice"]["moves"], &view["waits"]), (&serde_json::json!([]), &Value::Null), "{view:#}");
    assert!(events(&world, "move-failed").is_empty());
    for name in &names {
        assert_eq!(world.container(name).unwrap()["status"]["restarts"], 0, "{name}");
    }
    let report = client.finish();
    println!("longest client gap {:.0} ms", report["client_gap_ms"].as_f64().unwrap());
    world.down();
}
