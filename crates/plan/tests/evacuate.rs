//! A host is emptied without a rule being broken at any moment.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use godwit_model::HostName;
use godwit_plan::{EvacuateOptions, How, evacuate};
use proptest::prelude::*;
use support::{World, container, host, host_name, name, strict, worlds};

fn plan(world: &World, at: usize, options: &EvacuateOptions) -> godwit_plan::EvacuationPlan {
    evacuate(&world.fleet(), &host_name(at), options).unwrap()
}

#[test]
fn a_strict_layer_goes_to_the_hosts_that_are_left() {
    let world = World::new((1..=4).map(|n| host(n, 1024)))
        .with(1, strict("shop/db-1", 100))
        .with(2, strict("shop/db-2", 100))
        .with(3, strict("shop/db-3", 100));
    let first = plan(&world, 1, &EvacuateOptions::default());
    assert!(first.empties() && first.steps.len() == 1);
    assert_eq!(first.steps[0].to, host_name(4));
    let mut smaller = world.clone();
    smaller.hosts.remove(&host_name(4));
    let none_left = evacuate(&smaller.fleet(), &host_name(1), &EvacuateOptions::default()).unwrap();
    assert!(none_left.steps.is_empty());
    assert!(none_left.stays[0].reasons[0].contains("h2: another container of the layer db"), "{none_left}");
}

#[test]
fn a_chain_frees_a_place_and_waits_for_it() {
    // db-1 may go to neither h2 nor h3 (strict), and h4 is full of something that fits on h2.
    let world = World::new([host(1, 1024), host(2, 1024), host(3, 1024), host(4, 512)])
        .with(1, strict("shop/db-1", 400))
        .with(2, strict("shop/db-2", 400))
        .with(3, strict("shop/db-3", 400))
        .with(4, container("shop/web-1", 300));
    let plan = plan(&world, 1, &EvacuateOptions { parallel: 4, ..EvacuateOptions::default() });
    assert!(plan.empties(), "{plan}");
    let (first, second) = (&plan.steps[0], &plan.steps[1]);
    assert_eq!((&first.container, &second.container), (&name("shop/web-1"), &name("shop/db-1")));
    assert_eq!((&second.after, second.wave), (&vec![0], 1));
}

#[test]
fn what_cannot_move_is_restarted_only_if_allowed_and_never_without_its_volumes() {
    let mut stuck = container("shop/db-1", 100);
    stuck.unmovable = vec!["it holds a path of the host".into()];
    let mut with_volume = container("shop/db-2", 100);
    with_volume.unmovable = vec!["it is traced".into()];
    with_volume.volumes_on = Some(host_name(1));
    let world = World::new([host(1, 1024), host(2, 1024)]).with(1, stuck).with(1, with_volume);
    let first = plan(&world, 1, &EvacuateOptions::default());
    assert!(first.steps.is_empty() && first.stays.len() == 2, "{first}");
    let second = plan(&world, 1, &EvacuateOptions { allow_restart: true, ..EvacuateOptions::default() });
    assert_eq!(second.steps.iter().map(|s| s.how).collect::<Vec<_>>(), [How::Restart]);
    assert!(second.stays[0].reasons.iter().any(|r| r.contains("volumes behind")), "{second}");
}

#[test]
fn companions_go_one_after_the_other_to_the_same_host() {
    let mut sidecar = container("shop/log-1", 100);
    sidecar.near.insert("web".parse().unwrap());
    let world =
        World::new([host(1, 1024), host(2, 150), host(3, 1024)]).with(1, container("shop/web-1", 100)).with(1, sidecar);
    let plan = plan(&world, 1, &EvacuateOptions::default());
    let to: Vec<&HostName> = plan.steps.iter().map(|s| &s.to).collect();
    assert_eq!(to, [&host_name(3), &host_name(3)], "{plan}");
    assert_eq!(plan.steps[0].container, name("shop/web-1"));
    assert_eq!((plan.steps[1].unit, &plan.steps[1].after), (Some(0), &vec![0]));
}

#[test]
fn destinations_and_deadline_are_as_asked_and_unknown_hosts_are_errors() {
    let world = World::new((1..=3).map(|n| host(n, 1024))).with(1, container("shop/web-1", 512));
    let options = EvacuateOptions { to: vec![host_name(3)], deadline_ms: Some(2000), ..EvacuateOptions::default() };
    let to_third = plan(&world, 1, &options);
    assert_eq!(to_third.steps[0].to, host_name(3));
    // 512 MiB at 1 Gbit/s take 4.3 s and setting up 1 s.
    assert_eq!((to_third.estimated_ms, to_third.keeps_deadline), (5295, Some(false)));
    let unknown = EvacuateOptions { to: vec![host_name(9)], ..EvacuateOptions::default() };
    assert_eq!(evacuate(&world.fleet(), &host_name(1), &unknown).unwrap_err().to_string(), "there is no host h9");
}

#[test]
fn a_running_container_goes_only_to_a_machine_that_takes_it() {
    let features = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    let mut world = World::new((1..=3).map(|n| host(n, 1024))).with(1, container("shop/web-1", 100));
    for (n, names) in [(1, &["avx", "sse"][..]), (2, &["sse"]), (3, &["aes", "avx", "sse"])] {
        world.hosts.get_mut(&host_name(n)).unwrap().machine.features = features(names);
    }
    assert_eq!(plan(&world, 1, &EvacuateOptions::default()).steps[0].to, host_name(3));
    let only = EvacuateOptions { to: vec![host_name(2)], allow_restart: true, ..EvacuateOptions::default() };
    let refused = plan(&world, 1, &only);
    assert!(refused.stays[0].reasons[0].contains("h2: its processor lacks avx"), "{refused}");
    // A new start does not care where it ran before.
    world.containers.get_mut(&name("shop/web-1")).unwrap().unmovable = vec!["it is traced".into()];
    assert_eq!(plan(&world, 1, &only).steps[0].to, host_name(2));
}

#[test]
fn plans_are_values_that_can_be_kept_and_read_again() {
    let world = World::new((1..=3).map(|n| host(n, 1024))).with(1, strict("shop/db-1", 100));
    let plan = plan(&world, 1, &EvacuateOptions::default());
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<godwit_plan::EvacuationPlan>(&text).unwrap(), plan);
    let explanation = world.fleet().explain_move(&name("shop/db-1")).unwrap();
    let text = serde_json::to_string(&explanation).unwrap();
    assert_eq!(serde_json::from_str::<godwit_plan::Explanation>(&text).unwrap(), explanation);
    assert_eq!((explanation.fitting.len(), explanation.out.len()), (2, 1));
}

#[test]
fn what_is_being_moved_is_left_to_its_move() {
    let mut world = World::new((1..=3).map(|n| host(n, 1024))).with(1, container("shop/web-1", 100));
    world.on.get_mut(&name("shop/web-1")).unwrap().insert(host_name(2));
    let plan = plan(&world, 1, &EvacuateOptions::default());
    assert!(plan.steps.is_empty() && plan.stays[0].reasons == ["it is being moved already"], "{plan}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_rule_is_broken_at_any_moment_in_any_permitted_order(
        world in worlds(2..7, 24, true), at in 0usize..7, parallel in 1usize..5, draws in prop::collection::vec(any::<u8>(), 0..160),
    ) {
        let at = at % world.hosts.len();
        let plan = plan(&world, at, &EvacuateOptions { parallel: parallel as u32, ..EvacuateOptions::default() });
        let here = world.members(&host_name(at)).len();
        let leaving = plan.steps.iter().filter(|s| s.from == host_name(at)).count();
        prop_assert_eq!(leaving + plan.stays.len(), here, "{}", plan);
        prop_assert!(plan.steps.iter().all(|s| s.to != host_name(at)));
        let mut after = world.clone();
        if let Err(wrong) = after.carry_out(&plan.steps, parallel, &draws) {
            return Err(TestCaseError::fail(format!("{wrong}\n{plan}")));
        }
    }
}
