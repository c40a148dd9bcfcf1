//! The index's answer is the answer of scoring every host, and the fleet's tables stay right through any changes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::cmp::Reverse;

use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, HostName, MilliCpu};
use godwit_plan::{Container, Fleet};
use proptest::prelude::*;
use support::{World, host_name, worlds};

/// Counted from what the fleet was told, with none of its tables. Smaller is better.
fn by_force<'w>(world: &'w World, c: &Container) -> Option<&'w HostName> {
    let takes = |name: &HostName| {
        let h = &world.hosts[name];
        let memory: u64 = world.members(name).iter().map(|c| c.reserved_memory.0).sum();
        let cpu: u64 = world.members(name).iter().map(|c| u64::from(c.reserved_cpu.0)).sum();
        let mut after = world.clone();
        after.containers.insert(c.name.clone(), c.clone());
        after.on.entry(c.name.clone()).or_default().insert(name.clone());
        let wrongs = after.wrongs_of(c, name);
        h.state == HostState::Active
            && h.connected
            && memory + c.reserved_memory.0 <= h.memory.0
            && cpu + u64::from(c.reserved_cpu.0) <= u64::from(h.cpu.0) * 4
            && wrongs.iter().all(|w| w.contains("overfull"))
    };
    let taking = || world.hosts.values().filter(|h| h.state == HostState::Active && h.connected);
    let (largest, sum) =
        (taking().map(|h| h.memory.0).max().unwrap_or(0), taking().map(|h| u128::from(h.memory.0)).sum::<u128>());
    let permille = if sum == 0 { 0 } else { (u128::from(largest) * 1000).div_ceil(sum) };
    let rank = |name: &'w HostName| {
        let h = &world.hosts[name];
        let here = world.members(name);
        let others = || here.iter().filter(|o| o.name != c.name);
        let same_layer = |o: &Container| o.name.env == c.name.env && o.name.layer == c.name.layer;
        let in_zone = world.hosts.values().filter(|o| o.zone() == h.zone());
        let in_zone = in_zone.flat_map(|o| world.members(&o.name)).filter(|o| o.name != c.name && same_layer(o));
        let counts = match c.spread {
            Spread::None => (0, 0, 0),
            _ => (
                others().filter(|o| same_layer(o)).count(),
                others().filter(|o| o.name.env == c.name.env).count(),
                in_zone.count(),
            ),
        };
        let memory: u64 = here.iter().map(|c| c.reserved_memory.0).sum();
        let cpu: u64 = here.iter().map(|c| u64::from(c.reserved_cpu.0)).sum();
        let capacity = u64::from(h.cpu.0) * 4;
        let load = [
            memory * 10 / h.memory.0,
            cpu * 10 / capacity,
            u64::from(h.cpu_load_permille) / 100,
            u64::from(h.memory_load_permille) / 100,
        ];
        let kept = (u128::from(h.memory.0) * permille / 1000) as i64;
        let room = h.memory.0.saturating_sub(memory) as i64 - kept;
        let has_image = h.images.contains(&c.image) || here.iter().any(|o| o.image == c.image);
        let load = load.into_iter().max().unwrap().min(10);
        (
            counts,
            load,
            room < c.reserved_memory.0 as i64,
            !c.image.is_empty() && !has_image,
            Reverse(room),
            Reverse(capacity.saturating_sub(cpu)),
            name,
        )
    };
    world.hosts.keys().filter(|name| takes(name)).min_by_key(|name| rank(name))
}

/// A change to a fleet and to the world beside it.
fn change(world: &mut World, fleet: &mut Fleet, what: u8, which: usize, where_to: usize) {
    let host = host_name(where_to % world.hosts.len());
    let names: Vec<_> = world.containers.keys().cloned().collect();
    if what == 0 {
        let h = world.hosts.get_mut(&host).unwrap();
        h.state = [HostState::Active, HostState::Cordoned, HostState::Failed][which % 3];
        h.connected = !which.is_multiple_of(5);
        h.labels.insert("zone".into(), format!("z{}", which % 3));
        h.cpu_load_permille = (which * 37 % 1000) as u16;
        h.images.insert(format!("image-{}", which % 4));
        h.memory = Bytes::mib(256 + (which as u64 * 131) % 2048);
        fleet.set_host(h.clone());
        return;
    }
    if names.is_empty() {
        return;
    }
    let name = names[which % names.len()].clone();
    match what {
        1 => {
            world.on.insert(name.clone(), [host.clone()].into());
            fleet.put(&name, &host).unwrap();
        }
        2 => {
            world.on.remove(&name);
            fleet.take(&name).unwrap();
        }
        3 if fleet.home(&name).is_some() => {
            world.on.entry(name.clone()).or_default().insert(host.clone());
            fleet.claim(&name, &host).unwrap();
        }
        4 => {
            world.on.remove(&name);
            world.containers.remove(&name);
            fleet.remove_container(&name).unwrap();
        }
        5 => {
            let c = world.containers.get_mut(&name).unwrap();
            c.reserved_memory = Bytes::mib(1 + where_to as u64 * 7 % 300);
            c.reserved_cpu = MilliCpu(1 + where_to as u32 * 13 % 900);
            c.apart = if where_to.is_multiple_of(2) { ["g".to_owned()].into() } else { Default::default() };
            fleet.set_container(c.clone());
        }
        6 => {
            if let Some(claim) = fleet.claims(&name).first().map(|h| (*h).clone()) {
                world.on.get_mut(&name).unwrap().remove(&claim);
                fleet.release(&name, &claim).unwrap();
            }
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_answers_as_scoring_every_host_does(
        world in worlds(1..12, 40, true),
        wanted in prop::collection::vec(((0usize..3, 0usize..4, 1u64..500, 0u8..3), any::<[bool; 4]>(), 0u32..5), 1..8),
        changes in prop::collection::vec((0u8..7, 0usize..1000, 0usize..1000), 0..30),
    ) {
        let mut world = world;
        let mut fleet = world.fleet();
        for (what, which, where_to) in changes {
            change(&mut world, &mut fleet, what, which, where_to);
        }
        for (n, ((env, layer, memory, spread), [apart, near, label, named], image)) in wanted.into_iter().enumerate() {
            let number = if named { 1 } else { 900 + n };
            let mut c = support::container(&format!("e{env}/l{layer}-{number}"), memory);
            c.spread = [Spread::Preferred, Spread::Strict, Spread::None][usize::from(spread)];
            if apart { c.apart.insert("g".into()); }
            if near && label { c.near.insert("l0".parse().unwrap()); }
            if label { c.labels.insert("disk".into(), "ssd".into()); }
            c.image = if image == 0 { String::new() } else { format!("image-{image}") };
            let fast = fleet.place(&c);
            prop_assert_eq!(fast.as_ref().ok().map(|p| &p.host), by_force(&world, &c), "{}\n{:?}", fleet.explain(&c), c);
            let explained = fleet.explain(&c);
            prop_assert_eq!(fast.as_ref().ok().map(|p| &p.host), explained.fitting.first().map(|f| &f.host));
            prop_assert_eq!(explained.fitting.len() + explained.out.len(), world.hosts.len());
            if let Err(refusal) = &fast {
                prop_assert!(refusal.hosts.iter().all(|h| !h.reasons.is_empty()));
            }
        }
    }
}
