//! Names as numbers, and what is counted for each of them.

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::FixedState;

use godwit_model::manifest::Spread;
use godwit_model::{EnvName, LayerName};

use super::index::slot;
use super::{Container, EnvId, GroupId, HostId, ImageId, LayerId, Machine, MachineId, ZoneId};

/// Names in the order in which they came.
#[derive(Debug, Clone)]
pub(crate) struct Names<K> {
    numbers: BTreeMap<K, usize>,
}

impl<K> Default for Names<K> {
    fn default() -> Self {
        Self { numbers: BTreeMap::new() }
    }
}

impl<K: Ord + Clone> Names<K> {
    pub fn number(&mut self, name: &K) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.numbers.len();
        self.numbers.insert(name.clone(), number);
        number
    }

    pub fn find<Q: Ord + ?Sized>(&self, name: &Q) -> Option<usize>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.numbers.get(name).copied()
    }
}

/// How many are where; hosts without any are absent.
pub(crate) type Count<K> = BTreeMap<K, u32>;

pub(crate) fn raise<K: Ord>(count: &mut Count<K>, key: K) {
    *count.entry(key).or_default() += 1;
}

pub(crate) fn lower<K: Ord>(count: &mut Count<K>, key: &K) {
    if let Some(left) = count.get_mut(key) {
        *left -= 1;
        if *left == 0 {
            count.remove(key);
        }
    }
}

/// A group can have a member on most hosts, and is asked about each of them: that must be quick. Never iterated, so its
/// order is nobody's business.
pub(crate) type GroupCount = HashMap<HostId, u32, FixedState>;

#[derive(Debug, Clone, Default)]
pub(crate) struct LayerTable {
    pub on: Count<HostId>,
    pub zones: Count<ZoneId>,
    /// How many containers must be near one of this layer.
    pub wanted_near: u32,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct EnvTable {
    pub on: Count<HostId>,
    layers: BTreeMap<LayerName, LayerId>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Tables {
    env_names: Names<EnvName>,
    group_names: Names<String>,
    image_names: Names<String>,
    zone_names: Names<Option<String>>,
    machines: Names<Machine>,
    /// What speaks against a move from one kind of machine to another; pairs without a reason are absent.
    refusals: BTreeMap<(MachineId, MachineId), Vec<String>>,
    pub envs: Vec<EnvTable>,
    pub layers: Vec<LayerTable>,
    pub groups: Vec<GroupCount>,
}

/// The numbers of a container's names.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ties {
    pub env: EnvId,
    pub layer: LayerId,
    pub groups: Vec<GroupId>,
    pub near: Vec<LayerId>,
    pub image: Option<ImageId>,
}

/// The same of a container that may be unknown: what nobody has named yet has no number and no count.
#[derive(Debug, Clone, Default)]
pub(crate) struct LooseTies {
    pub env: Option<EnvId>,
    pub layer: Option<LayerId>,
    /// In the order of the container's own list, as is `near`.
    pub groups: Vec<Option<GroupId>>,
    pub near: Vec<Option<LayerId>>,
    pub image: Option<ImageId>,
}

impl From<&Ties> for LooseTies {
    fn from(ties: &Ties) -> Self {
        Self {
            env: Some(ties.env),
            layer: Some(ties.layer),
            groups: ties.groups.iter().copied().map(Some).collect(),
            near: ties.near.iter().copied().map(Some).collect(),
            image: ties.image,
        }
    }
}

impl Tables {
    pub fn zone(&mut self, name: Option<&str>) -> ZoneId {
        ZoneId::of(self.zone_names.number(&name.map(str::to_owned)))
    }

    pub fn image(&mut self, name: &str) -> ImageId {
        ImageId::of(self.image_names.number(&name.to_owned()))
    }

    pub fn machine(&mut self, machine: &Machine) -> MachineId {
        if let Some(known) = self.machines.find(machine) {
            return MachineId(known);
        }
        let new = MachineId(self.machines.number(machine));
        for (other, number) in &self.machines.numbers {
            let other_id = MachineId(*number);
            for (pair, because) in
                [((new, other_id), machine.refuses(other)), ((other_id, new), other.refuses(machine))]
            {
                if !because.is_empty() {
                    self.refusals.insert(pair, because);
                }
            }
        }
        new
    }

    /// What speaks against moving a running container between these kinds of machines.
    pub fn refusals(&self, from: MachineId, to: MachineId) -> &[String] {
        self.refusals.get(&(from, to)).map(Vec::as_slice).unwrap_or_default()
    }

    fn layer(&mut self, env: EnvId, name: &LayerName) -> LayerId {
        let next = LayerId::of(self.layers.len());
        let layer = *self.envs[env.at()].layers.entry(name.clone()).or_insert(next);
        slot(&mut self.layers, layer.at());
        layer
    }

    pub fn ties(&mut self, container: &Container) -> Ties {
        let env = EnvId::of(self.env_names.number(&container.name.env));
        slot(&mut self.envs, env.at());
        let layer = self.layer(env, &container.name.layer);
        let near = container.near.iter().map(|name| self.layer(env, name)).collect();
        let mut groups = Vec::with_capacity(container.apart.len());
        for name in &container.apart {
            let group = GroupId::of(self.group_names.number(name));
            slot(&mut self.groups, group.at());
            groups.push(group);
        }
        let image = (!container.image.is_empty()).then(|| self.image(&container.image));
        Ties { env, layer, groups, near, image }
    }

    pub fn loose_ties(&self, container: &Container) -> LooseTies {
        let env = self.env_names.find(&container.name.env).map(EnvId::of);
        let layer = |name: &LayerName| env.and_then(|env| self.envs[env.at()].layers.get(name).copied());
        LooseTies {
            env,
            layer: layer(&container.name.layer),
            groups: container.apart.iter().map(|g| self.group_names.find(g.as_str()).map(GroupId::of)).collect(),
            near: container.near.iter().map(layer).collect(),
            image: self.image_names.find(container.image.as_str()).map(ImageId::of),
        }
    }

    /// One container is on one host more.
    pub fn arrive(&mut self, ties: &Ties, host: HostId, zone: ZoneId) {
        raise(&mut self.envs[ties.env.at()].on, host);
        let layer = &mut self.layers[ties.layer.at()];
        raise(&mut layer.on, host);
        raise(&mut layer.zones, zone);
        for group in &ties.groups {
            *self.groups[group.at()].entry(host).or_default() += 1;
        }
    }

    pub fn leave(&mut self, ties: &Ties, host: HostId, zone: ZoneId) {
        lower(&mut self.envs[ties.env.at()].on, &host);
        let layer = &mut self.layers[ties.layer.at()];
        lower(&mut layer.on, &host);
        lower(&mut layer.zones, &zone);
        for group in &ties.groups {
            let count = &mut self.groups[group.at()];
            if let Some(left) = count.get_mut(&host).filter(|left| **left > 1) {
                *left -= 1;
            } else {
                count.remove(&host);
            }
        }
    }
}

/// Whether counts of layer, environment and zone speak for or against a host.
pub(crate) fn is_spread(spread: Spread) -> bool {
    match spread {
        Spread::Strict | Spread::Preferred => true,
        Spread::None => false,
    }
}
