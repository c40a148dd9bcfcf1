//! Scenarios that a reader can follow: what was asked, and every word of the answer.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fmt::Write;

use godwit_model::host::HostState;
use godwit_model::{Bytes, MilliCpu};
use godwit_plan::{Container, EvacuateOptions, Policy, evacuate, make_room, rebalance, recover};
use support::{World, container, host, host_name, name, strict};

/// Five hosts in two zones; an environment of three layers with three containers each, spread strictly, placed one
/// after the other.
fn shop() -> World {
    let mut world = World::new((1..=5).map(|n| {
        let mut h = host(n, 2048);
        h.labels.insert("zone".into(), if n <= 3 { "east" } else { "west" }.into());
        h
    }));
    for layer in ["db", "cache", "web"] {
        for number in 1..=3 {
            let mut c = strict(&format!("shop/{layer}-{number}"), if layer == "db" { 512 } else { 256 });
            c.image = layer.into();
            c.downtime_ms = if layer == "db" { 80 } else { 40 };
            let to = world.fleet().place(&c).unwrap().host;
            world.add(&to, c);
        }
    }
    world
}

fn table(world: &World) -> String {
    let mut text = String::new();
    for h in world.hosts.values() {
        let here: Vec<String> = world.members(&h.name).iter().map(|c| c.name.to_string()).collect();
        writeln!(text, "{} ({}, {}): {}", h.name, h.zone().unwrap_or("-"), h.memory, here.join(" ")).unwrap();
    }
    text
}

#[test]
fn an_environment_is_spread_over_hosts_and_zones() {
    let world = shop();
    let mut text = table(&world);
    let fourth = Container { image: "db".into(), ..strict("shop/db-4", 512) };
    writeln!(text, "\nshop/db-4, which is new:\n{}", world.fleet().explain(&fourth)).unwrap();
    let placement = world.fleet().place(&fourth).unwrap();
    writeln!(text, "→ {}: {}", placement.host, placement.reasons.join("; ")).unwrap();
    insta::assert_snapshot!(text);
}

#[test]
fn a_host_is_evacuated() {
    let world = shop();
    let plan = evacuate(&world.fleet(), &host_name(1), &EvacuateOptions::default()).unwrap();
    insta::assert_snapshot!(format!("{}\n{plan}", table(&world)));
}

#[test]
fn a_host_is_evacuated_where_only_a_chain_helps() {
    let world = World::new([host(1, 1024), host(2, 1024), host(3, 1024), host(4, 512)])
        .with(1, strict("shop/db-1", 400))
        .with(2, strict("shop/db-2", 400))
        .with(3, strict("shop/db-3", 400))
        .with(4, container("shop/web-1", 300));
    let plan = evacuate(&world.fleet(), &host_name(1), &EvacuateOptions::default()).unwrap();
    insta::assert_snapshot!(format!("{}\n{plan}", table(&world)));
}

#[test]
fn a_host_fails_with_a_local_volume_on_it() {
    let mut world = shop();
    let at = world.on[&name("shop/db-1")].first().unwrap().clone();
    world.containers.get_mut(&name("shop/db-1")).unwrap().volumes_on = Some(at.clone());
    world.hosts.get_mut(&at).unwrap().state = HostState::Failed;
    let plan = recover(&world.fleet(), &at).unwrap();
    insta::assert_snapshot!(format!("{}\n{plan}", table(&world)));
}

#[test]
fn a_container_grows_and_its_neighbour_leaves() {
    let world = World::new([host(1, 1024), host(2, 1024)])
        .with(1, Container { downtime_ms: 90, importance: 3, ..container("shop/db-1", 600) })
        .with(1, Container { downtime_ms: 20, ..container("blog/web-1", 300) })
        .with(2, container("blog/db-1", 500));
    let plan = make_room(&world.fleet(), &name("shop/db-1"), Bytes::mib(900), MilliCpu(100)).unwrap();
    let refused = make_room(&world.fleet(), &name("shop/db-1"), Bytes::mib(1100), MilliCpu(100)).unwrap_err();
    insta::assert_snapshot!(format!("{}\n{plan}\nand with 1100 MiB:\n{refused}", table(&world)));
}

#[test]
fn a_host_returns_and_is_filled_again() {
    let mut world = World::new((1..=3).map(|n| host(n, 1000)));
    for n in 1..=4 {
        world.add(&host_name(1), container(&format!("e{n}/web-1"), 200));
        world.add(&host_name(2), container(&format!("f{n}/web-1"), 200));
    }
    world.add(&host_name(1), container("e1/web-2", 10));
    let advice = rebalance(&world.fleet(), &Policy::default(), 0);
    insta::assert_snapshot!(format!("{}\n{advice}", table(&world)));
}
