//! Plans beside the cheapest there are: every placement that moves can lead to is looked at (Dijkstra), on instances
//! small enough for that.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use godwit_model::{Bytes, ContainerName, HostName, MilliCpu};
use godwit_plan::{EvacuateOptions, EvacuationPlan, RoomError, evacuate, make_room};
use proptest::prelude::*;
use support::{World, host_name, worlds};

type State = Vec<HostName>;

/// The least cost of getting from the world to a placement for which `done` is true; `None`: no moves lead there.
fn cheapest(world: &World, closed: Option<&HostName>, done: impl Fn(&World) -> bool) -> Option<u64> {
    let names: Vec<ContainerName> = world.on.keys().cloned().collect();
    let state = |w: &World| -> State { names.iter().map(|n| w.on[n].first().unwrap().clone()).collect() };
    let mut best = BTreeMap::from([(state(world), 0u64)]);
    let mut queue = BinaryHeap::from([Reverse((0u64, state(world)))]);
    while let Some(Reverse((cost, at))) = queue.pop() {
        if best[&at] < cost {
            continue;
        }
        let mut here = world.clone();
        here.on = names.iter().cloned().zip(at.iter().map(|h| [h.clone()].into())).collect();
        if done(&here) {
            return Some(cost);
        }
        for (n, name) in names.iter().enumerate() {
            let c = &world.containers[name];
            for to in here.hosts.keys().filter(|to| Some(*to) != closed && **to != at[n]) {
                if !here.takes(c, to) {
                    continue;
                }
                let mut next = at.clone();
                next[n] = to.clone();
                // Who stays behind must not miss it.
                let mut after = here.clone();
                after.on.insert(name.clone(), [to.clone()].into());
                if !after.wrongs().is_empty() {
                    continue;
                }
                let cost = cost + c.move_cost();
                if best.get(&next).is_none_or(|known| cost < *known) {
                    best.insert(next.clone(), cost);
                    queue.push(Reverse((cost, next)));
                }
            }
        }
    }
    None
}

fn cost(world: &World, plan: &EvacuationPlan) -> u64 {
    plan.steps.iter().map(|s| world.containers[&s.container].move_cost()).sum()
}

/// At most 5 % more than the cheapest.
fn is_near(cost: u64, cheapest: u64) -> bool {
    cost * 100 <= cheapest * 105
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_evacuation_is_found_where_there_is_one_and_costs_little_more(world in worlds(2..5, 7, false), at in 0usize..5) {
        let at = host_name(at % world.hosts.len());
        let plan = evacuate(&world.fleet(), &at, &EvacuateOptions::default()).unwrap();
        let best = cheapest(&world, Some(&at), |w| w.members(&at).is_empty());
        prop_assert_eq!(plan.empties(), best.is_some(), "{}\n{:?}", plan, world.on);
        if let Some(best) = best {
            let cost = cost(&world, &plan);
            prop_assert!(cost >= best, "cheaper than the cheapest: {} {}\n{}", cost, best, plan);
            prop_assert!(is_near(cost, best), "{} instead of {}\n{}", cost, best, plan);
        }
    }

    #[test]
    fn room_is_made_where_it_can_be_at_little_more_than_the_least_cost(
        world in worlds(2..5, 7, false), which in 0usize..7, more in 1u64..1200, cpu in 100u32..17000,
    ) {
        prop_assume!(!world.on.is_empty());
        let name = world.on.keys().nth(which % world.on.len()).unwrap().clone();
        let c = &world.containers[&name];
        let (memory, cpu) = (Bytes(c.reserved_memory.0 + Bytes::mib(more).0), MilliCpu(cpu));
        // It is as it was until all have moved, then it grows.
        let grown = |w: &World| {
            let mut w = w.clone();
            let c = w.containers.get_mut(&name).unwrap();
            (c.reserved_memory, c.reserved_cpu) = (memory, cpu);
            w
        };
        let best = cheapest(&world, None, |w| grown(w).wrongs().is_empty());
        match make_room(&world.fleet(), &name, memory, cpu) {
            Ok(plan) => {
                let best = best.expect("a plan is a way");
                prop_assert!(plan.cost >= best, "cheaper than the cheapest: {} {}\n{}", plan.cost, best, plan);
                prop_assert!(is_near(plan.cost, best), "{} instead of {}\n{}\n{:?}", plan.cost, best, plan, world.on);
                let mut after = world.clone();
                after.carry_out(&plan.steps, 3, &[]).map_err(TestCaseError::fail)?;
                prop_assert_eq!(after.on[&name].first(), Some(&plan.host));
                prop_assert_eq!(grown(&after).wrongs(), Vec::<String>::new());
            }
            Err(RoomError::NoWay { .. }) => prop_assert_eq!(best, None, "no way found\n{:?}", world.on),
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        }
    }
}
