//! Placement keeps its hard rules whatever the view, always answers the same, and spreads evenly.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use godwit_model::container::Resources;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, ContainerName, HostName, MilliCpu};
use godwit_plan::{HostView, Placed, Request, View, place};
use proptest::prelude::*;

fn host(n: usize, memory_mib: u64, cpus: u32) -> HostView {
    HostView {
        name: HostName::new(format!("h{n}")).unwrap(),
        active: true,
        connected: true,
        memory: Bytes::mib(memory_mib),
        cpu: MilliCpu(cpus * 1000),
        placed: Vec::new(),
    }
}

fn request(name: &str, memory_mib: u64, cpu: u32, spread: Spread) -> Request {
    let resources =
        Resources { reserved_memory: Bytes::mib(memory_mib), reserved_cpu: MilliCpu(cpu), ..Resources::default() };
    Request { name: name.parse().unwrap(), resources, spread, only: None, not: None }
}

fn put(view: &mut View, at: &HostName, request: &Request) {
    let host = view.hosts.iter_mut().find(|h| h.name == *at).unwrap();
    host.placed.push(Placed {
        name: request.name.clone(),
        reserved_memory: request.resources.reserved_memory,
        reserved_cpu: request.resources.reserved_cpu,
    });
}

#[test]
fn every_refusal_says_why_for_every_host() {
    let mut view = View { hosts: vec![host(1, 512, 1), host(2, 512, 1), host(3, 100, 1), host(4, 512, 1)] };
    view.hosts[0].connected = false;
    view.hosts[1].active = false;
    let first = request("shop/db-1", 10, 0, Spread::Strict);
    put(&mut view, &HostName::new("h4").unwrap(), &first);
    let refusal = place(&view, &request("shop/db-2", 200, 5000, Spread::Strict)).unwrap_err();
    let text = refusal.to_string();
    for part in
        ["h1: its agent is not connected", "h2: it takes no new", "h3: 200 MiB of memory", "h4: 5 CPUs", "strictly"]
    {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
    assert!(place(&View::default(), &first).unwrap_err().to_string().contains("no host has joined"));
}

#[test]
fn a_container_does_not_stand_in_its_own_way() {
    let mut view = View { hosts: vec![host(1, 512, 1)] };
    let one = request("shop/db-1", 10, 0, Spread::Strict);
    put(&mut view, &HostName::new("h1").unwrap(), &one);
    assert!(place(&view, &one).is_ok());
    let away = Request { not: Some(HostName::new("h1").unwrap()), ..one };
    assert!(place(&view, &away).unwrap_err().to_string().contains("already"));
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
        let mut view = View::default();
        for (n, (memory, cpus, active, connected)) in hosts.into_iter().enumerate() {
            let mut host = host(n, memory, cpus);
            (host.active, host.connected) = (active, connected);
            view.hosts.push(host);
        }
        let mut seen = std::collections::HashSet::<ContainerName>::new();
        for (layer, number, memory, cpu, spread) in wanted {
            let request = request(&format!("shop/l{layer}-{number}"), memory, cpu, spread);
            if !seen.insert(request.name.clone()) {
                continue;
            }
            let answer = place(&view, &request);
            let mut reversed = view.clone();
            reversed.hosts.reverse();
            let again = place(&reversed, &request);
            prop_assert_eq!(answer.as_ref().map(|p| &p.host), again.as_ref().map(|p| &p.host));
            let Ok(placement) = answer else {
                // A refusal must be true: no host fits by an independent count.
                let fits = |h: &&HostView| h.active && h.connected
                    && h.placed.iter().map(|p| p.reserved_memory.0).sum::<u64>() + request.resources.reserved_memory.0 <= h.memory.0
                    && h.placed.iter().map(|p| p.reserved_cpu.0).sum::<u32>() + cpu <= h.cpu.0 * 4
                    && (spread != Spread::Strict || h.placed.iter().all(|p| p.name.layer != request.name.layer));
                prop_assert!(!view.hosts.iter().any(|h| fits(&h)));
                continue;
            };
            put(&mut view, &placement.host, &request);
            let host = view.hosts.iter().find(|h| h.name == placement.host).unwrap();
            prop_assert!(host.active && host.connected);
            prop_assert!(host.placed.iter().map(|p| p.reserved_memory.0).sum::<u64>() <= host.memory.0);
            prop_assert!(host.placed.iter().map(|p| p.reserved_cpu.0).sum::<u32>() <= host.cpu.0 * 4);
            let same = host.placed.iter().filter(|p| p.name.layer == request.name.layer).count();
            prop_assert!(spread != Spread::Strict || same == 1);
        }
    }

    #[test]
    fn layers_and_environments_are_spread_to_a_difference_of_one(
        hosts in 1usize..6, layers in prop::collection::vec(1u32..9, 1..4),
    ) {
        let mut view = View { hosts: (0..hosts).map(|n| host(n, 1 << 20, 64)).collect() };
        for (layer, count) in layers.iter().enumerate() {
            for number in 1..=*count {
                let request = request(&format!("shop/l{layer}-{number}"), 64, 100, Spread::Preferred);
                let at = place(&view, &request).unwrap().host;
                put(&mut view, &at, &request);
            }
            let of_layer = |h: &HostView| h.placed.iter().filter(|p| p.name.layer.as_str() == format!("l{layer}")).count();
            let counts: Vec<usize> = view.hosts.iter().map(of_layer).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            let all: Vec<usize> = view.hosts.iter().map(|h| h.placed.len()).collect();
            prop_assert!(all.iter().max().unwrap() - all.iter().min().unwrap() <= 1);
        }
    }
}
