//! A dead host's containers start elsewhere, the most important first, and never without volumes they had.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use godwit_plan::{Container, recover};
use proptest::prelude::*;
use support::{World, container, host, host_name, name, strict, worlds};

#[test]
fn the_most_important_take_what_room_there_is() {
    let world = World::new([host(1, 1024), host(2, 500)])
        .with(1, Container { importance: 1, ..container("shop/web-1", 300) })
        .with(1, Container { importance: 5, ..container("shop/db-1", 300) });
    let plan = recover(&world.fleet(), &host_name(1)).unwrap();
    assert_eq!(plan.starts.iter().map(|s| &s.container).collect::<Vec<_>>(), [&name("shop/db-1")]);
    assert!(
        plan.stays[0].container == name("shop/web-1") && plan.stays[0].reasons[0].contains("h2: 300 MiB"),
        "{plan}"
    );
}

#[test]
fn local_volumes_are_told_and_not_made_anew_unless_they_may_be() {
    let with_volumes = Container { volumes_on: Some(host_name(1)), ..container("shop/db-1", 100) };
    let cache = Container { may_recreate_volumes: true, ..with_volumes.clone() };
    let world = World::new([host(1, 1024), host(2, 1024)])
        .with(1, with_volumes)
        .with(1, Container { name: name("shop/cache-1"), ..cache });
    let plan = recover(&world.fleet(), &host_name(1)).unwrap();
    assert_eq!((plan.starts.len(), plan.starts[0].recreates_volumes), (1, true));
    assert_eq!(plan.stays[0].reasons, ["its volumes are on h1; it is not started without them"]);
}

#[test]
fn what_must_be_near_something_starts_after_it_on_the_same_host() {
    let mut sidecar = Container { importance: 9, ..container("shop/log-1", 100) };
    sidecar.near.insert("web".parse().unwrap());
    let world = World::new((1..=3).map(|n| host(n, 1024))).with(1, container("shop/web-1", 100)).with(1, sidecar);
    let plan = recover(&world.fleet(), &host_name(1)).unwrap();
    assert_eq!((plan.starts[0].container.clone(), plan.starts[1].after.clone()), (name("shop/web-1"), vec![0]));
    assert_eq!(plan.starts[0].to, plan.starts[1].to);
}

#[test]
fn a_strict_layer_waits_where_no_host_is_left() {
    let world =
        World::new([host(1, 1024), host(2, 1024)]).with(1, strict("shop/db-1", 10)).with(2, strict("shop/db-2", 10));
    let plan = recover(&world.fleet(), &host_name(1)).unwrap();
    assert!(plan.starts.is_empty() && plan.stays[0].reasons[0].contains("spread strictly"), "{plan}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_rule_holds_after_each_start_and_who_waits_fits_nowhere(world in worlds(1..7, 24, true), at in 0usize..7) {
        let at = host_name(at % world.hosts.len());
        let plan = recover(&world.fleet(), &at).unwrap();
        let mut after = world.clone();
        after.hosts.get_mut(&at).unwrap().connected = false;
        after.on.retain(|_, on| !on.contains(&at));
        prop_assert_eq!(plan.starts.len() + plan.stays.len(), world.on.len() - after.on.len());
        for (n, start) in plan.starts.iter().enumerate() {
            prop_assert!(start.after.iter().all(|s| *s < n));
            let c = world.containers[&start.container].clone();
            prop_assert!(after.takes(&c, &start.to), "{}", plan);
            after.add(&start.to, c);
        }
        for stay in &plan.stays {
            let c = &world.containers[&stay.container];
            prop_assert!(!after.hosts.keys().any(|h| after.takes(c, h)), "{} fits\n{}", c.name, plan);
        }
    }
}
