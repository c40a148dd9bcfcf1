//! The fleet at the beginning: hosts of several sizes in three zones, environments of a few layers.

use fastrand::Rng;
use godwit_model::manifest::Spread;
use godwit_model::units::BitRate;
use godwit_model::{Bytes, ContainerName, EnvName, HostName, LayerName, MilliCpu, NameError};
use godwit_plan::{Container, Host};

const ZONES: usize = 3;
const IMAGES: u32 = 50;
/// How much of all memory is reserved at the beginning, in thousandths.
const RESERVED_PERMILLE: u64 = 550;
const GIB: u64 = 1 << 30;

pub fn hosts(rng: &mut Rng, count: u32) -> Result<Vec<Host>, NameError> {
    let mut hosts = Vec::with_capacity(count as usize);
    for n in 0..count as usize {
        let size = [1u64, 1, 2, 4][rng.usize(0..4)];
        let name = HostName::new(format!("h{}", n + 1))?;
        let mut host = Host::new(name, Bytes(64 * GIB * size), MilliCpu(16_000 * size as u32));
        host.labels.insert("zone".to_owned(), format!("z{}", n % ZONES + 1));
        if n % 4 == 0 {
            host.labels.insert("disk".to_owned(), "ssd".to_owned());
        }
        host.link_free = Some(BitRate(10_000_000_000));
        hosts.push(host);
    }
    Ok(hosts)
}

/// A container before it has a host.
#[derive(Debug)]
pub struct New {
    pub container: Container,
    /// It will have local volumes where it starts first.
    pub has_volumes: bool,
}

/// Makes environments, one after the other.
#[derive(Debug)]
pub struct Environments {
    next: u32,
    /// What a container reserves on average, in bytes.
    mean_memory: u64,
    hosts: usize,
}

impl Environments {
    pub fn new(hosts: &[Host], containers: u32) -> Self {
        let memory: u64 = hosts.iter().map(|h| h.memory.0).sum();
        let mean_memory = memory / 1000 * RESERVED_PERMILLE / u64::from(containers.max(1));
        Self { next: 0, mean_memory: mean_memory.clamp(1 << 20, 16 * GIB), hosts: hosts.len() }
    }

    /// The containers of a new environment, a few to a few dozen.
    pub fn make(&mut self, rng: &mut Rng) -> Result<Vec<New>, NameError> {
        self.next += 1;
        let env = EnvName::new(format!("e{}", self.next))?;
        let apart = (rng.u32(0..4) == 0).then(|| format!("group-{}", self.next));
        let mut containers = Vec::new();
        for layer in ["web", "app", "db", "cache"].into_iter().take(rng.usize(1..=4)) {
            let layer = LayerName::new(layer)?;
            // Half, the mean, or twice that: on average a little more than the mean.
            let memory = self.mean_memory * [50, 80, 100, 160][rng.usize(0..4)] / 100;
            let cpu = MilliCpu([50, 100, 250, 500][rng.usize(0..4)]);
            let spread = [Spread::Strict, Spread::Preferred, Spread::Preferred, Spread::None][rng.usize(0..4)];
            let image = format!("image-{}", rng.u32(0..IMAGES));
            let is_first = layer.as_str() == "web";
            let wants_ssd = rng.u32(0..20) == 0;
            let has_volumes = layer.as_str() == "db" && rng.bool();
            let may_recreate_volumes = has_volumes && rng.bool();
            let importance = rng.u32(1..=3);
            let replicas = rng.usize(1..=5).min(self.hosts);
            for number in 1..=replicas as u32 {
                let name = ContainerName { env: env.clone(), layer: layer.clone(), number };
                let mut c = Container::new(name, Bytes(memory), cpu, spread);
                c.image.clone_from(&image);
                c.importance = importance;
                c.bytes = Bytes(memory / 10 * rng.u64(3..10));
                c.downtime_ms = rng.u64(20..150);
                c.used_cpu = MilliCpu(cpu.0 * rng.u32(0..60) / 100);
                c.used_memory = Bytes(memory / 100 * rng.u64(30..90));
                c.may_recreate_volumes = may_recreate_volumes;
                if wants_ssd {
                    c.labels.insert("disk".to_owned(), "ssd".to_owned());
                }
                if is_first && let Some(group) = &apart {
                    c.apart.insert(group.clone());
                }
                if rng.u32(0..100) == 0 {
                    c.unmovable.push("it is traced".to_owned());
                }
                containers.push(New { container: c, has_volumes });
            }
        }
        Ok(containers)
    }
}
