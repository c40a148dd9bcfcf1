//! Placement keeps its hard rules whatever the fleet, always answers the same, and spreads evenly.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, HostName, MilliCpu};
use godwit_plan::{Container, Fleet, Host, Machine, NO_CRIU};
use proptest::prelude::*;
use support::{World, container, host, host_name, name, strict};

fn sized(name: &str, memory_mib: u64, cpu: u32, spread: Spread) -> Container {
    Container::new(support::name(name), Bytes::mib(memory_mib), MilliCpu(cpu), spread)
}

#[test]
fn every_refusal_says_why_for_every_host() {
    let mut world = World::new((1..=4).map(|n| host(n, if n == 3 { 100 } else { 512 })));
    world.hosts.get_mut(&host_name(1)).unwrap().connected = false;
    world.hosts.get_mut(&host_name(2)).unwrap().state = HostState::Cordoned;
    world.add(&host_name(4), strict("shop/db-1", 10));
    let refusal = world.fleet().place(&sized("shop/db-2", 200, 17_000, Spread::Strict)).unwrap_err();
    let text = refusal.to_string();
    for part in
        ["h1: its agent is not connected", "h2: it takes no new", "h3: 200 MiB of memory", "h4: 17 CPUs", "strictly"]
    {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
    let nowhere = Fleet::new().place(&strict("shop/db-1", 10)).unwrap_err();
    assert!(nowhere.to_string().contains("no host has joined"));
}

#[test]
fn a_container_does_not_stand_in_its_own_way() {
    let world = World::new([host(1, 512)]).with(1, strict("shop/db-1", 10));
    let fleet = world.fleet();
    assert!(fleet.place(&world.containers[&name("shop/db-1")]).is_ok());
    let away = fleet.mover(&name("shop/db-1"), &[]).unwrap().place().unwrap_err();
    assert!(away.to_string().contains("already"), "{away}");
}

fn machine(criu: &str, features: &[&str]) -> Machine {
    Machine {
        architecture: "x86_64".into(),
        criu_line: Some(criu.to_owned()),
        features: features.iter().map(|f| (*f).to_owned()).collect(),
    }
}

#[test]
fn a_move_needs_every_feature_and_a_criu_of_the_same_line() {
    let targets = [
        (machine("4", &["aes", "avx", "sse"]), ""),
        (machine("4", &["sse"]), "lacks avx"),
        (machine("5", &["avx", "sse"]), "CRIU 5"),
        (machine(NO_CRIU, &["avx", "sse"]), "no usable CRIU"),
        (Machine { architecture: "aarch64".into(), ..machine("4", &["avx", "sse"]) }, "aarch64"),
    ];
    let mut world = World::new([Host { machine: machine("4", &["avx", "sse"]), ..host(1, 512) }]);
    for (n, (machine, _)) in targets.iter().enumerate() {
        world.hosts.insert(host_name(n + 2), Host { machine: machine.clone(), ..host(n + 2, 512) });
    }
    world.add(&host_name(1), container("shop/db-1", 10));
    let fleet = world.fleet();
    let mover = fleet.mover(&name("shop/db-1"), &[]).unwrap();
    for (n, (_, says)) in targets.iter().enumerate() {
        let against = mover.against(&host_name(n + 2)).unwrap();
        assert_eq!(against.len(), usize::from(!says.is_empty()), "{against:?}");
        assert!(against.iter().all(|reason| reason.contains(says)), "{against:?}");
    }
    assert_eq!(mover.place().unwrap().host, host_name(2));
}

/// What must be near each other goes only when it is said to go together.
#[test]
fn companions_move_together_or_not() {
    let near = |text: &str| Container { near: ["db".parse().unwrap()].into(), ..container(text, 10) };
    let world = World::new([host(1, 512), host(2, 512)]).with(1, container("s/db-1", 10)).with(1, near("s/web-1"));
    let fleet = world.fleet();
    let (db, web, to) = (name("s/db-1"), name("s/web-1"), host_name(2));
    assert!(fleet.check_move(&db, &to).unwrap_err()[0].contains("s/web-1 must be near it"));
    assert!(fleet.check_move(&web, &to).unwrap_err()[0].contains("must be near one"));
    let together = [db.clone(), web.clone()];
    for one in &together {
        let mover = fleet.mover(one, &together).unwrap();
        assert_eq!((mover.stays(), mover.against(&to).unwrap()), (vec![], vec![]), "{one}");
        assert_eq!(mover.explain().fitting.len(), 1);
    }
    // With another companion left behind it may go alone.
    let world = world.with(1, container("s/db-2", 10));
    assert_eq!(world.fleet().check_move(&db, &to), Ok(()));
}

/// Its own host is judged without it: a full host keeps what fills it, and so does one that takes nothing more.
#[test]
fn a_place_is_judged_as_if_it_were_empty() {
    let mut world = World::new([host(1, 100), host(2, 512)]).with(1, strict("s/db-1", 100));
    world.hosts.get_mut(&host_name(1)).unwrap().state = HostState::Cordoned;
    let fleet = world.fleet();
    let here = fleet.mover(&name("s/db-1"), &[]).unwrap().here().unwrap();
    assert_eq!((here.broken, here.score.of_layer, here.score.load_tenths), (vec![], 0, 0));
    // What has come to break a rule is told.
    let c = world.containers.get_mut(&name("s/db-1")).unwrap();
    c.apart.insert("disks".into());
    c.reserved_memory = Bytes::mib(200);
    world.add(&host_name(1), Container { apart: ["disks".to_owned()].into(), ..container("s/log-1", 1) });
    let fleet = world.fleet();
    let broken = fleet.mover(&name("s/db-1"), &[]).unwrap().here().unwrap().broken;
    assert!(broken.len() == 2 && broken[0].contains("99.0 MiB is free") && broken[1].contains("disks"), "{broken:?}");
}

fn spreads() -> impl Strategy<Value = Spread> {
    prop_oneof![Just(Spread::Strict), Just(Spread::Preferred), Just(Spread::None)]
}

proptest! {
    #[test]
    fn hard_rules_are_kept_and_answers_repeat(
        hosts in prop::collection::vec((64u64..4096, 1u32..8, any::<bool>(), any::<bool>()), 0..6),
        wanted in prop::collection::vec((0usize..3, 1u32..9, 0u64..1500, 0u32..6000, spreads()), 0..30),
    ) {
        let mut world = World::default();
        for (n, (memory, cpus, active, connected)) in hosts.into_iter().enumerate() {
            let state = if active { HostState::Active } else { HostState::Cordoned };
            let h = Host { connected, state, cpu: MilliCpu(cpus * 1000), ..host(n, memory) };
            world.hosts.insert(h.name.clone(), h);
        }
        for (layer, number, memory, cpu, spread) in wanted {
            let wanted = sized(&format!("shop/l{layer}-{number}"), memory, cpu, spread);
            if world.containers.contains_key(&wanted.name) {
                continue;
            }
            let answer = world.fleet().place(&wanted);
            let mut reversed = Fleet::new();
            world.hosts.values().rev().for_each(|h| reversed.set_host(h.clone()));
            for (name, on) in &world.on {
                reversed.set_container(world.containers[name].clone());
                on.iter().for_each(|host| reversed.put(name, host).unwrap());
            }
            let again = reversed.place(&wanted);
            prop_assert_eq!(answer.as_ref().map(|p| &p.host), again.as_ref().map(|p| &p.host));
            let fits = |h: &Host| {
                let there = world.members(&h.name);
                h.state == HostState::Active && h.connected
                    && there.iter().map(|c| c.reserved_memory.0).sum::<u64>() + wanted.reserved_memory.0 <= h.memory.0
                    && there.iter().map(|c| c.reserved_cpu.0).sum::<u32>() + cpu <= h.cpu.0 * 4
                    && (spread != Spread::Strict || there.iter().all(|c| c.name.layer != wanted.name.layer))
            };
            match answer {
                // A refusal must be true: no host fits by an independent count.
                Err(_) => prop_assert!(!world.hosts.values().any(fits)),
                Ok(placement) => {
                    prop_assert!(fits(&world.hosts[&placement.host]));
                    world.add(&placement.host, wanted);
                }
            }
        }
    }

    #[test]
    fn layers_and_environments_are_spread_to_a_difference_of_one(
        hosts in 1usize..6, layers in prop::collection::vec(1u32..9, 1..4),
    ) {
        let mut world = World::new((0..hosts).map(|n| host(n, 1 << 20)));
        for (layer, count) in layers.iter().enumerate() {
            for number in 1..=*count {
                let wanted = container(&format!("shop/l{layer}-{number}"), 64);
                let at = world.fleet().place(&wanted).unwrap().host;
                world.add(&at, wanted);
            }
            let of_layer = |h: &HostName| {
                world.members(h).iter().filter(|c| c.name.layer.as_str() == format!("l{layer}")).count()
            };
            let counts: Vec<usize> = world.hosts.keys().map(of_layer).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            let all: Vec<usize> = world.hosts.keys().map(|h| world.members(h).len()).collect();
            prop_assert!(all.iter().max().unwrap() - all.iter().min().unwrap() <= 1);
        }
    }
}
