//! Advice makes things better, keeps the rules, and has an end: what was advised is not advised away again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use godwit_model::{Bytes, MilliCpu};
use godwit_plan::{Advice, Container, Policy, Purpose, Step, rebalance};
use proptest::prelude::*;
use support::{World, container, host, host_name, name, worlds};

const NOW_MS: u64 = 10_000_000;

fn advice(world: &World, policy: &Policy) -> Advice {
    rebalance(&world.fleet(), policy, NOW_MS)
}

/// A container that uses a share of its host's four cores.
fn busy(text: &str, cpu: u32) -> Container {
    Container { used_cpu: MilliCpu(cpu), used_memory: Bytes::mib(1), ..container(text, 10) }
}

/// What agents would measure, and since when it is too much.
fn measure(world: &mut World, policy: &Policy) {
    let names: Vec<_> = world.hosts.keys().cloned().collect();
    for at in names {
        let here = world.members(&at);
        let cpu: u64 = here.iter().map(|c| u64::from(c.used_cpu.0)).sum();
        let memory: u64 = here.iter().map(|c| c.used_memory.0).sum();
        let h = world.hosts.get_mut(&at).unwrap();
        h.cpu_load_permille = (cpu * 1000 / u64::from(h.cpu.0)).min(1000) as u16;
        h.memory_load_permille = (memory * 1000 / h.memory.0).min(1000) as u16;
        let over = h.cpu_load_permille >= policy.cpu_threshold_permille
            || h.memory_load_permille >= policy.memory_threshold_permille;
        h.overloaded_since_ms = over.then_some(0);
    }
}

#[test]
fn a_broken_spread_is_repaired() {
    let world = World::new((1..=3).map(|n| host(n, 1024)))
        .with(1, container("shop/web-1", 10))
        .with(1, container("shop/web-2", 10))
        .with(2, container("shop/db-1", 10));
    let advice = advice(&world, &Policy::default());
    assert_eq!(advice.moves.len(), 1, "{advice}");
    assert_eq!((advice.moves[0].purpose, &advice.moves[0].step.to), (Purpose::Spread, &host_name(3)));
}

#[test]
fn overload_moves_something_only_when_it_has_lasted() {
    let mut world =
        World::new([host(1, 1024), host(2, 1024)]).with(1, busy("a/x-1", 2000)).with(1, busy("b/x-1", 1800));
    let policy = Policy::default();
    measure(&mut world, &policy);
    world.hosts.get_mut(&host_name(1)).unwrap().overloaded_since_ms = Some(NOW_MS - 1000);
    assert_eq!(advice(&world, &policy).moves, []);
    world.hosts.get_mut(&host_name(1)).unwrap().overloaded_since_ms = Some(NOW_MS - policy.hold_ms);
    let relief = advice(&world, &policy);
    assert_eq!(relief.moves.iter().map(|m| m.purpose).collect::<Vec<_>>(), [Purpose::Overload], "{relief}");
    assert_eq!(relief.moves[0].gain, 450, "950 of 1000 become 500 and 450");
}

#[test]
fn what_moved_lately_rests_and_what_cannot_move_stays() {
    let mut world = World::new((1..=3).map(|n| host(n, 1024)))
        .with(1, Container { last_moved_ms: Some(NOW_MS - 1000), ..container("shop/web-1", 10) })
        .with(1, Container { unmovable: vec!["it is traced".into()], ..container("shop/web-2", 10) });
    assert_eq!(advice(&world, &Policy::default()).moves, []);
    world.containers.get_mut(&name("shop/web-1")).unwrap().last_moved_ms = Some(NOW_MS - 1_800_000);
    assert_eq!(advice(&world, &Policy::default()).moves.len(), 1);
}

#[test]
fn a_new_host_is_filled_until_the_gap_is_small() {
    let mut world = World::new((1..=3).map(|n| host(n, 1000)));
    for n in 0..8 {
        world.add(&host_name(1 + n % 2), container(&format!("e{n}/web-1"), 200));
    }
    let advice = advice(&world, &Policy::default());
    // Two hosts at 800 ‰ and one at 0: 600, 600, 400.
    assert_eq!(advice.moves.len(), 2, "{advice}");
    assert!(advice.moves.iter().all(|m| m.purpose == Purpose::Level && m.step.to == host_name(3)));
    assert_eq!(advice.moves[0].gain, 200);
}

#[test]
fn an_advice_has_an_end_and_says_if_there_is_more() {
    let mut world = World::new((1..=2).map(|n| host(n, 1024)));
    for n in 1..=6 {
        world.add(&host_name(1), container(&format!("shop/web-{n}"), 10));
    }
    let first = advice(&world, &Policy { max_moves: 2, ..Policy::default() });
    assert_eq!((first.moves.len(), first.more), (2, true));
    let all = advice(&world, &Policy::default());
    assert_eq!((all.moves.len(), all.more), (3, false), "{all}");
}

fn spread_pairs(world: &World) -> [u64; 3] {
    let pairs = |n: usize| (n * n.saturating_sub(1) / 2) as u64;
    let mut sums = [0; 3];
    for at in world.hosts.keys() {
        let mut layers = std::collections::BTreeMap::<_, usize>::new();
        let mut envs = std::collections::BTreeMap::<_, usize>::new();
        for c in world.members(at) {
            *layers.entry((&c.name.env, &c.name.layer)).or_default() += 1;
            *envs.entry(&c.name.env).or_default() += 1;
        }
        sums[0] += layers.values().map(|n| pairs(*n)).sum::<u64>();
        sums[1] += envs.values().map(|n| pairs(*n)).sum::<u64>();
    }
    let mut zones = std::collections::BTreeMap::<_, usize>::new();
    for (name, on) in &world.on {
        *zones.entry((&name.env, &name.layer, world.hosts[on.first().unwrap()].zone())).or_default() += 1;
    }
    sums[2] = zones.values().map(|n| pairs(*n)).sum();
    sums
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn advice_keeps_rules_makes_spread_no_worse_and_is_not_taken_back(
        world in worlds(2..7, 30, true), uses in prop::collection::vec(0u32..12, 30), draws in prop::collection::vec(any::<u8>(), 0..80),
        rest in any::<bool>(),
    ) {
        let mut world = world;
        for (c, use_) in world.containers.values_mut().zip(&uses) {
            // Even all of it on one host is no more than it has.
            c.used_cpu = MilliCpu(use_ * 10);
        }
        let rest_ms = if rest { 1_000 } else { 0 };
        let policy = Policy { max_moves: 500, rest_ms, cpu_threshold_permille: 250, ..Policy::default() };
        measure(&mut world, &policy);
        // Without a rest another round may move again what this one has moved once; each makes things better, so
        // there is an end.
        let mut rounds = 0;
        loop {
            let advice = advice(&world, &policy);
            prop_assert!(!advice.more);
            if advice.moves.is_empty() {
                break;
            }
            rounds += 1;
            prop_assert!(rounds <= if rest { 1 } else { 20 }, "again, in round {}: {}", rounds, advice);
            let before = spread_pairs(&world);
            let steps: Vec<Step> = advice.moves.iter().map(|m| m.step.clone()).collect();
            let mut shaken = world.clone();
            shaken.carry_out(&steps, 3, &draws).map_err(|e| TestCaseError::fail(format!("{e}\n{advice}")))?;
            for step in &steps {
                world.on.insert(step.container.clone(), [step.to.clone()].into());
                world.containers.get_mut(&step.container).unwrap().last_moved_ms = Some(NOW_MS);
            }
            prop_assert!(spread_pairs(&world) <= before);
            measure(&mut world, &policy);
        }
    }
}
