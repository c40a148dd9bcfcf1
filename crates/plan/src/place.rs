//! One container, one host: the best that the rules allow, found without looking at all of them.
//!
//! Hosts fall into two kinds. Those with containers of the environment, and those that a draft has changed, are few
//! and are scored one by one. All others have none of the layer and none of the environment, so that zone by zone
//! their order is the index's order, once for hosts that have the image and once for any: the first that fits is the
//! best of its kind. The answer is the one that scoring every host gives; a property test says so.

use std::fmt;

use godwit_model::{Bytes, HostName};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::draft::Draft;
use crate::fleet::{Container, Count, Fleet, HostId, ZoneId, is_spread};
use crate::rank::Score;
use crate::rules::Ask;

/// Up to so many hosts are scored one by one where a rule leaves no others.
const FEW_HOSTS: usize = 64;

/// Where a container goes, and what spoke for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub host: HostName,
    pub score: Score,
    /// Sentences for a person, the weightiest first.
    pub reasons: Vec<String>,
}

/// Why one host cannot take a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReasons {
    pub host: HostName,
    pub reasons: Vec<String>,
}

/// No host can take the container.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub struct Refusal {
    /// In order of the hosts' names.
    pub hosts: Vec<HostReasons>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.hosts.is_empty() {
            return f.write_str("no host has joined yet; start an agent");
        }
        f.write_str("no host can take it: ")?;
        for (at, host) in self.hosts.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", host.host, host.reasons.join(", "))?;
        }
        Ok(())
    }
}

impl Fleet {
    /// Picks the host for a new start of one container, which the fleet may know already or not. Changes nothing.
    pub fn place(&self, container: &Container) -> Result<Placement, Refusal> {
        let draft = Draft::new(self);
        let ask = Ask::start(self, container);
        draft.place(&ask)
    }

    /// The host that [`Fleet::place`] picks, for who does not ask why.
    pub fn best_host(&self, container: &Container) -> Option<&HostName> {
        let (host, _) = Draft::new(self).best(&Ask::start(self, container))?;
        Some(&self.slot(host).host.name)
    }

    /// Whether the hard rules let this host take a new start of the container; all the reasons if not.
    pub fn check(&self, container: &Container, host: &HostName) -> Result<(), Vec<String>> {
        let draft = Draft::new(self);
        let Some(id) = self.host_ids.get(host) else { return Err(vec!["there is no such host".to_owned()]) };
        let reasons = draft.reasons_against(*id, &Ask::start(self, container));
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }
}

impl Draft<'_> {
    pub fn place(&self, ask: &Ask<'_>) -> Result<Placement, Refusal> {
        match self.best(ask) {
            Some((host, score)) => {
                let reasons = self.reasons_for(host, ask, &score);
                Ok(Placement { host: self.slot(host).host.name.clone(), score, reasons })
            }
            None => Err(self.refusal(ask)),
        }
    }

    pub fn refusal(&self, ask: &Ask<'_>) -> Refusal {
        let hosts = self.fleet.host_ids.iter();
        let hosts = hosts.map(|(name, id)| HostReasons { host: name.clone(), reasons: self.reasons_against(*id, ask) });
        Refusal { hosts: hosts.collect() }
    }

    /// The best host that fits; a tie goes to the first name.
    pub fn best(&self, ask: &Ask<'_>) -> Option<(HostId, Score)> {
        let mut best = Best { draft: self, ask, found: None };
        if let Some(hosts) = self.few(ask) {
            hosts.into_iter().for_each(|host| best.look_at(host));
            return best.found;
        }
        let nobody = Count::new();
        let env = ask.ties.env.filter(|_| is_spread(ask.container.spread));
        let touched = env.map_or(&nobody, |env| &self.fleet.tables.envs[env.at()].on);
        self.changed().for_each(|host| best.look_at(host));
        touched.keys().filter(|host| !self.is_changed(**host)).for_each(|host| best.look_at(*host));
        for (of_zone, zone) in self.zones_by_count(ask) {
            if best.is_beyond((0, 0, of_zone, 0)) {
                break;
            }
            let with_image = ask.ties.image.map(|image| self.fleet.index.of_zone_with(zone, image));
            let skip = |host: HostId| self.is_changed(host) || touched.contains_key(&host);
            for key in with_image.into_iter().flatten() {
                if best.is_beyond((0, 0, of_zone, key.load)) || (!skip(key.id) && best.look_at_first(key.id)) {
                    break;
                }
            }
            for key in self.fleet.index.of_zone(zone) {
                if best.is_beyond((0, 0, of_zone, key.load)) || (!skip(key.id) && best.look_at_first(key.id)) {
                    break;
                }
            }
        }
        best.found
    }

    /// The only hosts that can fit, where a rule names few of them.
    fn few(&self, ask: &Ask<'_>) -> Option<Vec<HostId>> {
        if ask.volumes_lost {
            return Some(Vec::new());
        }
        if let Some(only) = ask.only {
            return Some(vec![only]);
        }
        if !ask.among.is_empty() {
            return Some(ask.among.to_vec());
        }
        if let Some(near) = ask.ties.near.iter().find(|near| !near.is_some_and(|near| ask.along.contains(&near))) {
            let Some(near) = near else { return Some(Vec::new()) };
            let there = &self.fleet.tables.layers[near.at()].on;
            let unchanged = there.keys().copied().filter(|host| !self.is_changed(*host));
            return Some(self.changed().chain(unchanged).collect());
        }
        let labelled = |(label, value): (&String, &String)| self.fleet.labelled.get(label).and_then(|v| v.get(value));
        for label in &ask.container.labels {
            match labelled(label) {
                None => return Some(Vec::new()),
                Some(hosts) if hosts.len() <= FEW_HOSTS => return Some(hosts.iter().copied().collect()),
                Some(_) => {}
            }
        }
        None
    }

    /// Zones with how many of the layer are there, the fewest first.
    fn zones_by_count(&self, ask: &Ask<'_>) -> Vec<(u32, ZoneId)> {
        let layer = ask.ties.layer.filter(|_| is_spread(ask.container.spread));
        let count = |zone| layer.map_or(0, |layer| self.of_zone(zone, layer, ask.own));
        let mut zones: Vec<(u32, ZoneId)> = self.fleet.index.zones().map(|zone| (count(zone), zone)).collect();
        zones.sort_unstable();
        zones
    }

    /// What speaks for the best host.
    pub fn reasons_for(&self, host: HostId, ask: &Ask<'_>, score: &Score) -> Vec<String> {
        self.reasons(host, ask, score, "; no host that fits is better spread")
    }

    /// What there is to say for a host that somebody named.
    pub fn reasons_for_named(&self, host: HostId, ask: &Ask<'_>, score: &Score) -> Vec<String> {
        self.reasons(host, ask, score, "")
    }

    fn reasons(&self, host: HostId, ask: &Ask<'_>, score: &Score, and: &str) -> Vec<String> {
        let slot = self.slot(host);
        let mut reasons = Vec::new();
        if ask.only.is_some() {
            reasons.push(format!("its volumes are on {}", slot.host.name));
        }
        for near in &ask.container.near {
            reasons.push(format!("it is near the layer {near} there"));
        }
        if is_spread(ask.container.spread) {
            reasons.push(format!(
                "{} of its layer and {} of its environment are there{and}",
                score.of_layer, score.of_environment
            ));
            if let Some(zone) = slot.host.zone() {
                reasons.push(format!("the zone {zone} has {} of its layer", score.of_layer_in_zone));
            }
        }
        reasons.push(format!("{} of memory is free there", Bytes(slot.memory_free(self.occupied(host)))));
        if score.uses_reserve {
            reasons.push("it uses room that is kept for the loss of a host".to_owned());
        }
        if !ask.container.image.is_empty() && !score.image_missing {
            reasons.push("its image is there".to_owned());
        }
        reasons
    }
}

struct Best<'d, 'a> {
    draft: &'d Draft<'d>,
    ask: &'d Ask<'a>,
    found: Option<(HostId, Score)>,
}

impl Best<'_, '_> {
    fn look_at(&mut self, host: HostId) {
        self.look_at_first(host);
    }

    /// Whether it fits.
    fn look_at_first(&mut self, host: HostId) -> bool {
        if !self.draft.fits(host, self.ask) {
            return false;
        }
        let score = self.draft.score(host, self.ask);
        let name = |host| &self.draft.slot(host).host.name;
        let better = match &self.found {
            None => true,
            Some((best, best_score)) => (score, name(host)) < (*best_score, name(*best)),
        };
        if better {
            self.found = Some((host, score));
        }
        true
    }

    /// Whether nothing with such parts can be better than what was found.
    fn is_beyond(&self, parts: (u32, u32, u32, u8)) -> bool {
        self.found.is_some_and(|(_, best)| {
            parts > (best.of_layer, best.of_environment, best.of_layer_in_zone, best.load_tenths)
        })
    }
}
