//! How fast decisions are. Measures the pure decision with the fleet's state brought up to date by it; no API, no
//! store, no network: `./dev bench placement --report FILE`.

use std::collections::BTreeSet;
use std::error::Error;
use std::time::{Duration, Instant};

use fastrand::Rng;
use godwit_model::manifest::Spread;
use godwit_model::{Bytes, ContainerName, EnvName, HostName, LayerName, MilliCpu};
use godwit_plan::{Container, EvacuateOptions, Fleet, Host, Policy, evacuate, make_room, rebalance};
use serde::Serialize;

type Done<T> = Result<T, Box<dyn Error>>;

const SIZES: [usize; 4] = [1_000, 2_500, 5_000, 10_000];
const QUICK_SIZES: [usize; 1] = [1_000];
const CONTAINERS_PER_HOST: usize = 20;
const PLACED: usize = 20_000;
/// Containers on a host that is evacuated.
const EVACUATED: usize = 100;
const EVACUATIONS: usize = 50;
const ROOMS: usize = 200;
const REBALANCES: usize = 10;

#[derive(Serialize)]
struct Outcome {
    case: &'static str,
    hosts: usize,
    containers: usize,
    per_second: u64,
    p50_us: f64,
    p99_us: f64,
}

#[derive(Serialize)]
struct Report {
    /// What a figure includes.
    includes: &'static str,
    results: Vec<Outcome>,
}

const INCLUDES: &str = "one thread; the pure decision with its reasons and, for place, the change of the fleet's state by \
                        it (container added, put on its host, indexes); no API, no store, no network";

fn main() -> Done<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut report, mut sizes) = (None, &SIZES[..]);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--report" => report = Some(arguments.next().ok_or("--report needs a file")?),
            "--quick" => sizes = &QUICK_SIZES,
            other => return Err(format!("{other:?} is not known; use --report FILE, --quick").into()),
        }
    }
    println!("includes: {INCLUDES}");
    println!(
        "{:<20} {:>7} {:>10} {:>12} {:>12} {:>12}",
        "CASE", "HOSTS", "CONTAINERS", "PER SECOND", "P50 µs", "P99 µs"
    );
    let mut results = Vec::new();
    for hosts in sizes {
        let mut bench = Bench::new(*hosts)?;
        for outcome in [bench.place()?, bench.place_apart()?, bench.evacuate()?, bench.make_room()?, bench.rebalance()?]
        {
            println!(
                "{:<20} {:>7} {:>10} {:>12} {:>12.1} {:>12.1}",
                outcome.case, outcome.hosts, outcome.containers, outcome.per_second, outcome.p50_us, outcome.p99_us
            );
            results.push(outcome);
        }
    }
    if let Some(file) = report {
        std::fs::write(&file, serde_json::to_string_pretty(&Report { includes: INCLUDES, results })?)?;
        println!("written to {file}");
    }
    Ok(())
}

struct Bench {
    fleet: Fleet,
    rng: Rng,
    hosts: usize,
    containers: usize,
    envs: usize,
}

impl Bench {
    /// A fleet filled by its own placement, a little more than half full, in three zones.
    fn new(hosts: usize) -> Done<Self> {
        let mut rng = Rng::with_seed(1);
        let mut fleet = Fleet::new();
        for n in 0..hosts {
            let size = [1u64, 1, 2, 4][rng.usize(0..4)];
            let mut host =
                Host::new(HostName::new(format!("h{n}"))?, Bytes(size << 36), MilliCpu(16_000 * size as u32));
            host.labels.insert("zone".to_owned(), format!("z{}", n % 3));
            host.images = (0..10).map(|_| format!("image-{}", rng.u32(0..100))).collect();
            host.cpu_load_permille = rng.u16(0..700);
            fleet.set_host(host);
        }
        let mut bench = Self { fleet, rng, hosts, containers: 0, envs: 0 };
        // What is placed and measured comes on top.
        while bench.containers + PLACED.min(hosts * 2) < hosts * CONTAINERS_PER_HOST {
            for container in bench.environment()? {
                bench.put(container);
            }
        }
        Ok(bench)
    }

    fn environment(&mut self) -> Done<Vec<Container>> {
        self.envs += 1;
        let env = EnvName::new(format!("e{}", self.envs))?;
        let mut made = Vec::new();
        for layer in ["web", "app", "db"] {
            let memory = Bytes::mib([1024, 2048, 4096, 8192][self.rng.usize(0..4)]);
            let spread = [Spread::Strict, Spread::Preferred, Spread::Preferred, Spread::None][self.rng.usize(0..4)];
            let image = format!("image-{}", self.rng.u32(0..100));
            for number in 1..=self.rng.u32(1..=5) {
                let name = ContainerName { env: env.clone(), layer: LayerName::new(layer)?, number };
                let mut container = Container::new(name, memory, MilliCpu(250), spread);
                container.image.clone_from(&image);
                container.downtime_ms = self.rng.u64(20..120);
                container.importance = self.rng.u32(1..=3);
                made.push(container);
            }
        }
        Ok(made)
    }

    /// Places it and brings the fleet up to date; whether there was a host.
    fn put(&mut self, container: Container) -> bool {
        let name = container.name.clone();
        let Ok(placement) = self.fleet.place(&container) else { return false };
        self.fleet.set_container(container);
        let put = self.fleet.put(&name, &placement.host).is_ok();
        self.containers += usize::from(put);
        put
    }

    fn place(&mut self) -> Done<Outcome> {
        let mut times = Vec::with_capacity(PLACED);
        while times.len() < PLACED.min(self.hosts * 2) {
            for container in self.environment()? {
                let begun = Instant::now();
                let placed = self.put(container);
                times.push(begun.elapsed());
                assert!(placed, "the fleet is full");
            }
        }
        Ok(self.outcome("place", times))
    }

    /// One group of which every host takes one member: a fifth of the hosts have one, two fifths more get one.
    fn place_apart(&mut self) -> Done<Outcome> {
        let mut times = Vec::new();
        let group = BTreeSet::from(["apart".to_owned()]);
        for n in 0..self.hosts * 3 / 5 {
            let name: ContainerName = format!("apart-{n}/one-1").parse()?;
            let mut container = Container::new(name, Bytes::mib(512), MilliCpu(100), Spread::Preferred);
            container.apart.clone_from(&group);
            let begun = Instant::now();
            let placed = self.put(container);
            if n >= self.hosts / 5 {
                times.push(begun.elapsed());
            }
            assert!(placed, "the fleet is full");
        }
        Ok(self.outcome("place-anti-affinity", times))
    }

    fn evacuate(&mut self) -> Done<Outcome> {
        let mut times = Vec::new();
        let options = EvacuateOptions { parallel: 4, ..EvacuateOptions::default() };
        for n in 0..EVACUATIONS {
            // A host more, with exactly so many containers of as many environments.
            let host = HostName::new(format!("full-{n}"))?;
            self.fleet.set_host(Host::new(host.clone(), Bytes(4 << 36), MilliCpu(64_000)));
            let mut names = Vec::new();
            for m in 0..EVACUATED {
                let name: ContainerName = format!("full-{n}-{m}/one-1").parse()?;
                let memory = Bytes::mib([512, 1024, 2048][self.rng.usize(0..3)]);
                let spread = if m % 2 == 0 { Spread::Strict } else { Spread::Preferred };
                self.fleet.set_container(Container::new(name.clone(), memory, MilliCpu(250), spread));
                self.fleet.put(&name, &host)?;
                names.push(name);
            }
            let begun = Instant::now();
            let plan = evacuate(&self.fleet, &host, &options)?;
            times.push(begun.elapsed());
            assert!(plan.empties() && plan.steps.len() == EVACUATED, "{plan}");
            for name in names {
                self.fleet.remove_container(&name)?;
            }
            self.fleet.remove_host(&host)?;
        }
        Ok(self.outcome("evacuate", times))
    }

    /// A container wants what its host does not have.
    fn make_room(&mut self) -> Done<Outcome> {
        let mut times = Vec::new();
        let names: Vec<ContainerName> = self.fleet.containers().map(|c| c.name.clone()).collect();
        while times.len() < ROOMS {
            let name = &names[self.rng.usize(0..names.len())];
            let Some(known) = self.fleet.container(name) else { continue };
            let free = self.fleet.home(name).and_then(|home| self.fleet.free_memory(home)).unwrap_or_default();
            let wanted = Bytes(known.reserved_memory.0 + free.0 + (1 << 30));
            let begun = Instant::now();
            let plan = make_room(&self.fleet, name, wanted, known.reserved_cpu);
            times.push(begun.elapsed());
            assert!(plan.is_ok_and(|plan| !plan.steps.is_empty()), "there is room");
        }
        Ok(self.outcome("make-room", times))
    }

    fn rebalance(&mut self) -> Done<Outcome> {
        let policy = Policy { max_moves: 100, ..Policy::default() };
        let times = (0..REBALANCES).map(|_| {
            let begun = Instant::now();
            let advice = rebalance(&self.fleet, &policy, 0);
            let took = begun.elapsed();
            drop(advice);
            took
        });
        let times = times.collect();
        Ok(self.outcome("rebalance", times))
    }

    fn outcome(&self, case: &'static str, mut times: Vec<Duration>) -> Outcome {
        let total: Duration = times.iter().sum();
        times.sort_unstable();
        let at = |permille: usize| {
            let time = times.get(times.len().saturating_sub(1) * permille / 1000);
            time.map_or(0.0, |time| (time.as_secs_f64() * 1e7).round() / 10.0)
        };
        let per_second = (times.len() as f64 / total.as_secs_f64().max(1e-9)) as u64;
        Outcome { case, hosts: self.hosts, containers: self.containers, per_second, p50_us: at(500), p99_us: at(990) }
    }
}
