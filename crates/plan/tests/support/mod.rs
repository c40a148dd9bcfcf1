//! A fleet told once more, as plainly as can be, to judge plans by: no index, no draft, every rule counted anew.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};

use godwit_model::host::HostState;
use godwit_model::manifest::Spread;
use godwit_model::units::BitRate;
use godwit_model::{Bytes, ContainerName, HostName, MilliCpu};
use godwit_plan::{Container, Fleet, Host, Step};
use proptest::prelude::*;

pub fn host_name(n: usize) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

pub fn host(n: usize, memory_mib: u64) -> Host {
    Host::new(host_name(n), Bytes::mib(memory_mib), MilliCpu(4000))
}

pub fn name(text: &str) -> ContainerName {
    text.parse().unwrap()
}

pub fn container(text: &str, memory_mib: u64) -> Container {
    Container::new(name(text), Bytes::mib(memory_mib), MilliCpu(100), Spread::Preferred)
}

pub fn strict(text: &str, memory_mib: u64) -> Container {
    Container { spread: Spread::Strict, ..container(text, memory_mib) }
}

#[derive(Debug, Clone, Default)]
pub struct World {
    pub hosts: BTreeMap<HostName, Host>,
    pub containers: BTreeMap<ContainerName, Container>,
    /// Every host that holds room for a container; two while it moves.
    pub on: BTreeMap<ContainerName, BTreeSet<HostName>>,
}

impl World {
    pub fn new(hosts: impl IntoIterator<Item = Host>) -> Self {
        Self { hosts: hosts.into_iter().map(|h| (h.name.clone(), h)).collect(), ..Self::default() }
    }

    pub fn with(mut self, at: usize, container: Container) -> Self {
        self.add(&host_name(at), container);
        self
    }

    pub fn add(&mut self, at: &HostName, container: Container) {
        self.on.insert(container.name.clone(), BTreeSet::from([at.clone()]));
        self.containers.insert(container.name.clone(), container);
    }

    pub fn fleet(&self) -> Fleet {
        let mut fleet = Fleet::new();
        self.hosts.values().for_each(|h| fleet.set_host(h.clone()));
        self.containers.values().for_each(|c| fleet.set_container(c.clone()));
        for (name, hosts) in &self.on {
            let mut hosts = hosts.iter();
            fleet.put(name, hosts.next().unwrap()).unwrap();
            hosts.for_each(|h| fleet.claim(name, h).unwrap());
        }
        fleet
    }

    pub fn members(&self, host: &HostName) -> Vec<&Container> {
        self.on.iter().filter(|(_, on)| on.contains(host)).map(|(name, _)| &self.containers[name]).collect()
    }

    /// What is wrong with the container's being on the host, as it is; states of hosts aside.
    pub fn wrongs_of(&self, c: &Container, host: &HostName) -> Vec<String> {
        let here = self.members(host);
        let h = &self.hosts[host];
        let mut wrongs = Vec::new();
        let memory: u64 = here.iter().map(|c| c.reserved_memory.0).sum();
        let cpu: u64 = here.iter().map(|c| u64::from(c.reserved_cpu.0)).sum();
        if memory > h.memory.0 || cpu > u64::from(h.cpu.0) * 4 {
            wrongs.push(format!("{host} is overfull"));
        }
        let of_layer = here.iter().filter(|o| o.name.env == c.name.env && o.name.layer == c.name.layer).count() as u32;
        let most = if c.spread == Spread::Strict { 1 } else { c.max_per_host.unwrap_or(u32::MAX) };
        if of_layer > most {
            wrongs.push(format!("{of_layer} of the layer of {} on {host}", c.name));
        }
        for other in here.iter().filter(|o| o.name != c.name) {
            if other.apart.intersection(&c.apart).next().is_some() {
                wrongs.push(format!("{} and {} on {host}", c.name, other.name));
            }
        }
        for near in &c.near {
            if !here.iter().any(|o| o.name != c.name && o.name.env == c.name.env && o.name.layer == *near) {
                wrongs.push(format!("{} is not near {near} on {host}", c.name));
            }
        }
        for (label, value) in &c.labels {
            if h.labels.get(label) != Some(value) {
                wrongs.push(format!("{host} lacks {label}={value} for {}", c.name));
            }
        }
        wrongs
    }

    pub fn wrongs(&self) -> Vec<String> {
        let all = self.on.iter().flat_map(|(name, on)| on.iter().map(move |host| (name, host)));
        all.flat_map(|(name, host)| self.wrongs_of(&self.containers[name], host)).collect()
    }

    /// Whether the container may be there too, beside where it is.
    pub fn takes(&self, c: &Container, host: &HostName) -> bool {
        let h = &self.hosts[host];
        let mut after = self.clone();
        after.containers.insert(c.name.clone(), c.clone());
        let on = after.on.entry(c.name.clone()).or_default();
        h.state == HostState::Active && h.connected && on.insert(host.clone()) && after.wrongs_of(c, host).is_empty()
    }

    /// Carries out the steps in an order drawn from `draws`, with up to `parallel` in flight, failing some; a sentence
    /// as soon as something is wrong. Steps of a unit are judged at its end only for nearness.
    pub fn carry_out(&mut self, steps: &[Step], parallel: usize, draws: &[u8]) -> Result<(), String> {
        let mut draws = draws.iter().copied().chain(std::iter::repeat(7));
        let mut draw = move |n: usize| usize::from(draws.next().unwrap()) % n.max(1);
        let (mut done, mut dead, mut flying) = (BTreeSet::new(), BTreeSet::new(), Vec::<usize>::new());
        loop {
            for (at, step) in steps.iter().enumerate() {
                if step.after.iter().any(|s| dead.contains(s)) {
                    dead.insert(at);
                }
            }
            let ready: Vec<usize> = (0..steps.len())
                .filter(|at| !done.contains(at) && !dead.contains(at) && !flying.contains(at))
                .filter(|at| steps[*at].after.iter().all(|s| done.contains(s)))
                .collect();
            if ready.is_empty() && flying.is_empty() {
                return Ok(());
            }
            let begin = !ready.is_empty() && flying.len() < parallel && (flying.is_empty() || draw(2) == 0);
            if begin {
                let at = ready[draw(ready.len())];
                let step = &steps[at];
                if !self.hosts[&step.to].state.takes_containers() {
                    return Err(format!("{step}: {} takes nothing", step.to));
                }
                let on = self.on.get_mut(&step.container).unwrap();
                if *on != BTreeSet::from([step.from.clone()]) {
                    return Err(format!("{step}: it is on {on:?}"));
                }
                on.insert(step.to.clone());
                flying.push(at);
            } else {
                let at = flying.swap_remove(draw(flying.len()));
                let step = &steps[at];
                let fails = step.unit.is_none() && draw(8) == 0;
                let keep = if fails { &step.from } else { &step.to };
                self.on.insert(step.container.clone(), BTreeSet::from([keep.clone()]));
                if fails {
                    dead.insert(at)
                } else {
                    done.insert(at)
                };
            }
            let in_unit = flying.iter().any(|at| steps[*at].unit.is_some());
            let unit_open = steps
                .iter()
                .enumerate()
                .any(|(at, s)| s.unit.is_some_and(|unit| done.contains(&unit)) && !done.contains(&at));
            let mut wrongs = self.wrongs();
            if in_unit || unit_open {
                wrongs.retain(|wrong| !wrong.contains("is not near"));
            }
            if !wrongs.is_empty() {
                return Err(wrongs.join("; "));
            }
        }
    }
}

/// One container as drawn: environment, layer, memory in MiB, spread, group, near, label, how heavy a move is, home.
type Draw = ((usize, usize, u64, u8), (u8, u8, u8, u32), usize);

fn drawn(number: usize, draw: &Draw, rich: bool) -> Container {
    let ((env, layer, memory, spread), (group, near, label, weight), _) = *draw;
    let mut c = container(&format!("e{env}/l{layer}-{}", number + 1), memory);
    // Of one layer all have the same rules.
    c.spread = [Spread::Preferred, Spread::Strict, Spread::None][usize::from(spread + layer as u8) % 3];
    if rich && layer == 2 {
        c.spread = Spread::Preferred;
        c.max_per_host = Some(2);
    }
    if rich && group == 0 {
        c.apart.insert("g".into());
    }
    if rich && near == 0 && layer == 1 {
        c.near.insert(godwit_model::LayerName::new("l0").unwrap());
    }
    if rich && label == 0 {
        c.labels.insert("disk".into(), "ssd".into());
    }
    c.image = format!("image-{}", weight % 4);
    c.importance = 1 + weight % 3;
    c.downtime_ms = u64::from(weight);
    c.bytes = Bytes::mib(memory / 2 + u64::from(weight));
    c
}

/// A world in which every rule is kept. `rich`: also with groups, companions, labels, zones.
pub fn worlds(hosts: std::ops::Range<usize>, containers: usize, rich: bool) -> impl Strategy<Value = World> {
    let one_host = (256u64..2048, any::<[bool; 2]>(), 0u16..1000, 0usize..3);
    let spread = 0u8..3;
    let one = ((0usize..3, 0usize..4, 32u64..400, spread), (0u8..6, 0u8..2, 0u8..5, 1u32..300), 0usize..64);
    (prop::collection::vec(one_host, hosts), prop::collection::vec(one, 0..=containers)).prop_map(
        move |(hosts, containers)| {
            let mut world = World::default();
            for (n, (memory, [ssd, fast], load, zone)) in hosts.iter().enumerate() {
                let mut h = host(n, *memory);
                if rich {
                    if *ssd {
                        h.labels.insert("disk".into(), "ssd".into());
                    }
                    h.labels.insert("zone".into(), format!("z{zone}"));
                    h.cpu_load_permille = *load;
                    h.images.insert(format!("image-{}", load % 4));
                }
                h.link_free = fast.then_some(BitRate(10_000_000_000));
                world.hosts.insert(h.name.clone(), h);
            }
            // A layer's spread is one for all of it: the first one drawn says which.
            let mut spreads: BTreeMap<(usize, usize), u8> = BTreeMap::new();
            for (number, draw) in containers.iter().enumerate() {
                let mut draw = *draw;
                draw.0.3 = *spreads.entry((draw.0.0, draw.0.1)).or_insert(draw.0.3);
                let c = drawn(number, &draw, rich);
                let first = draw.2 % world.hosts.len();
                let names: Vec<HostName> = world.hosts.keys().cloned().collect();
                let at = (0..names.len()).map(|n| &names[(first + n) % names.len()]).find(|h| world.takes(&c, h));
                if let Some(at) = at {
                    world.add(at, c);
                }
            }
            world
        },
    )
}
