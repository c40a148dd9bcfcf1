//! Where the containers of a layer may be: the rules of `x-godwit`, and whether a set of layers can keep its own.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::field::{Field, Known};
use super::{Layer, Manifest, Spread};
use crate::ids::LayerName;
use crate::label::{Label, MAX_LABELS};

/// The most containers that `max-per-host` can name; more is no rule.
const MAX_PER_HOST: u32 = 1000;
/// The highest importance.
const MAX_IMPORTANCE: u32 = 1000;
/// The most groups of one layer, and the most layers that it is near.
const MAX_NAMED: usize = 16;

/// Rules that a message may be about as a whole.
const WHOLE: [&str; 3] = ["max-per-host", "importance", "volumes-may-be-lost"];

/// What holds for each container of a layer, beside how the layer is spread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// The most of the layer on one host.
    pub max_per_host: Option<u32>,
    /// Groups of which a host holds one member at most, whichever layer or environment the members are of.
    pub apart: BTreeSet<String>,
    /// Layers of the environment of which a container must be on the same host.
    pub near: BTreeSet<LayerName>,
    /// Labels its host must have.
    pub require: BTreeMap<String, String>,
    /// Weight of a moment of its downtime, and what is restarted first after a failure: 1 to 1000.
    pub importance: u32,
    /// Whether it may be started elsewhere with empty volumes when the host that has them is lost.
    pub volumes_may_be_lost: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            max_per_host: None,
            apart: BTreeSet::new(),
            near: BTreeSet::new(),
            require: BTreeMap::new(),
            importance: 1,
            volumes_may_be_lost: false,
        }
    }
}

impl Layer {
    /// The most of its containers that may be on one host; `None`: any number.
    pub fn most_per_host(&self) -> Option<u32> {
        let one = self.spread == Spread::Strict || !self.rules.apart.is_empty();
        if one { Some(1) } else { self.rules.max_per_host }
    }
}

impl Manifest {
    /// The layers of which each container of `layer` has one on its host: `layer` itself, those it is near, those they
    /// are near, and so on.
    pub fn companions<'m>(&'m self, layer: &'m LayerName) -> impl Iterator<Item = &'m LayerName> {
        together(&self.layers, layer).map(|(name, _)| name)
    }
}

/// Where in the file each rule stands: key, what of it (a name of a list, or nothing), field.
pub(super) type Places<'a> = Vec<(&'static str, String, Field<'a>)>;

/// Reads the rules. What could not be read has a default value then, and an error was reported.
pub(super) fn rules<'a>(extension: &Known<'a>) -> (Rules, Places<'a>) {
    let mut places = Places::new();
    for key in WHOLE {
        places.extend(extension.get(key).map(|field| (key, String::new(), field.clone())));
    }
    let mut named = |key: &'static str| {
        let mut names = BTreeSet::new();
        let items = extension.get(key).and_then(Field::items).unwrap_or_default();
        if items.len() > MAX_NAMED {
            items[MAX_NAMED].error::<()>(format!("more than {MAX_NAMED} are named"));
        }
        for item in items.into_iter().take(MAX_NAMED) {
            let Some(name) = item.parsed::<LayerName>() else { continue };
            if !names.insert(name.clone()) {
                item.error::<()>(format!("{name} is here twice"));
            }
            places.push((key, name.to_string(), item));
        }
        names
    };
    let number = |key, most| extension.get(key).and_then(|field: &Field<'_>| field.number_u32(1, most));
    let rules = Rules {
        max_per_host: number("max-per-host", MAX_PER_HOST),
        // Groups are called as layers are.
        apart: named("apart").into_iter().map(String::from).collect(),
        near: named("near"),
        require: extension.get("require").map(require).unwrap_or_default(),
        importance: number("importance", MAX_IMPORTANCE).unwrap_or(1),
        volumes_may_be_lost: extension.get("volumes-may-be-lost").and_then(Field::boolean).unwrap_or(false),
    };
    (rules, places)
}

fn require(field: &Field<'_>) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for (key, field) in field.entries().unwrap_or_default() {
        let Some(value) = field.text() else { continue };
        match Label::new(key, value) {
            Ok(label) => drop(labels.insert(label.key, label.value)),
            Err(error) => {
                field.error_hint::<()>(
                    error.to_string(),
                    "write what `godwit host show` shows of the hosts that are meant",
                );
            }
        }
    }
    if labels.len() > MAX_LABELS {
        field.error::<()>(format!("{} labels are required, at most {MAX_LABELS} can be", labels.len()));
    }
    labels
}

/// A rule of a layer that cannot be kept, whatever hosts there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contradiction {
    pub layer: LayerName,
    /// The key of `x-godwit` that says the rule.
    pub key: &'static str,
    /// What of it: a name of a list, or nothing.
    pub item: String,
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Every rule of these layers that cannot be kept, or that says nothing beside another.
pub fn contradictions(layers: &BTreeMap<LayerName, Layer>) -> Vec<Contradiction> {
    let mut found = Vec::new();
    for (name, layer) in layers {
        let mut judge = Judge { layers, name, layer, found: &mut found };
        judge.values();
        judge.one_host();
        layer.rules.near.iter().for_each(|near| judge.near(near));
    }
    found
}

struct Judge<'m, 'f> {
    layers: &'m BTreeMap<LayerName, Layer>,
    name: &'m LayerName,
    layer: &'m Layer,
    found: &'f mut Vec<Contradiction>,
}

impl Judge<'_, '_> {
    fn say(&mut self, key: &'static str, item: &str, message: String, hint: &str) {
        let hint = (!hint.is_empty()).then(|| hint.to_owned());
        self.found.push(Contradiction { layer: self.name.clone(), key, item: item.to_owned(), message, hint });
    }

    /// What a file cannot say wrongly without being told so, but a request can.
    fn values(&mut self) {
        let rules = &self.layer.rules;
        if rules.max_per_host == Some(0) {
            self.say("max-per-host", "", "0 on a host would be none at all".to_owned(), "");
        }
        if !(1..=MAX_IMPORTANCE).contains(&rules.importance) {
            self.say("importance", "", format!("{} is not from 1 to {MAX_IMPORTANCE}", rules.importance), "");
        }
        for (key, value) in &rules.require {
            if let Err(error) = Label::new(key, value) {
                self.say("require", key, error.to_string(), "");
            }
        }
        for group in &rules.apart {
            if let Err(error) = LayerName::new(group) {
                self.say("apart", group, error.to_string(), "");
            }
        }
        for (key, count, most) in [
            ("require", rules.require.len(), MAX_LABELS),
            ("apart", rules.apart.len(), MAX_NAMED),
            ("near", rules.near.len(), MAX_NAMED),
        ] {
            if count > most {
                self.say(key, "", format!("{count} are named, at most {most} can be"), "");
            }
        }
    }

    /// Rules about one host that say nothing beside each other.
    fn one_host(&mut self) {
        let rules = &self.layer.rules;
        if let Some(most) = rules.max_per_host.filter(|most| *most > 1) {
            if self.layer.spread == Spread::Strict {
                let message = format!("{most} on a host are allowed here, and spread: strict allows one");
                self.say("max-per-host", "", message, "remove it, or write spread: preferred beside it");
            } else if let Some(group) = rules.apart.first() {
                let message = format!("{most} on a host are allowed here, and of the group {group} a host holds one");
                self.say("max-per-host", "", message, "remove it, or the group");
            }
        }
        if rules.volumes_may_be_lost && self.layer.volumes.is_empty() {
            self.say("volumes-may-be-lost", "", "there is no volume that could be lost".to_owned(), "remove it");
        }
    }

    fn near(&mut self, near: &LayerName) {
        let item = near.as_str();
        if near == self.name {
            let message = format!("{near} cannot be near itself");
            return self.say("near", item, message, "remove it; max-per-host says how many of it may be together");
        }
        if !self.layers.contains_key(near) {
            let known = self.layers.keys().map(LayerName::as_str);
            let hint = super::text::nearest(item, known).map(|near| format!("did you mean {near:?}?"));
            return self.say("near", item, format!("there is no service {item:?}"), &hint.unwrap_or_default());
        }
        if let Some(way) = way(self.layers, near, self.name) {
            let circle: Vec<&str> = way.into_iter().map(LayerName::as_str).collect();
            let message = format!("{0} would wait for itself: {0} → {1}", self.name, circle.join(" → "));
            return self.say("near", item, message, "remove this, or a dependency on the way");
        }
        // Who is near something is on one host with all that it is near.
        for (other, layer) in together(self.layers, near) {
            self.beside(near, other, layer);
        }
    }

    /// Whether the layer can be on one host with `other`, which it reaches by being near `near`.
    fn beside(&mut self, near: &LayerName, other: &LayerName, there: &Layer) {
        let (rules, item) = (&self.layer.rules, near.as_str());
        if let Some(group) = rules.apart.intersection(&there.rules.apart).next() {
            let message = format!("{other} is in the group {group} too: they would be together and apart");
            return self.say("near", item, message, "remove this, or one of them from the group");
        }
        let differs = |(key, value): &(&String, &String)| there.rules.require.get(*key).is_some_and(|v| v != *value);
        if let Some((key, value)) = rules.require.iter().find(differs) {
            let message = format!(
                "{other} requires {key}={}, and {} requires {key}={value}: no host has both",
                there.rules.require[key], self.name
            );
            return self.say("near", item, message, "require the same of both");
        }
        if there.replicas == 0 && self.layer.replicas > 0 {
            let hint = format!("give {other} a replica, or remove this");
            return self.say("near", item, format!("{other} never starts, it has 0 replicas"), &hint);
        }
        let Some(most) = self.layer.most_per_host() else { return };
        let hosts = self.layer.replicas.div_ceil(most.max(1));
        if hosts > there.replicas {
            let message = format!(
                "{} containers of {} with at most {most} on a host need {hosts} hosts with {other}, and {other} has only {}",
                self.layer.replicas, self.name, there.replicas
            );
            self.say("near", item, message, &format!("give {other} {hosts} replicas, or allow more on a host"));
        }
    }
}

/// The layers that everything near `first` is on one host with, `first` included.
fn together<'m>(
    layers: &'m BTreeMap<LayerName, Layer>,
    first: &'m LayerName,
) -> impl Iterator<Item = (&'m LayerName, &'m Layer)> {
    let mut all = BTreeSet::from([first]);
    let mut waiting = vec![first];
    while let Some(name) = waiting.pop() {
        let near = layers.get(name).into_iter().flat_map(|layer| &layer.rules.near);
        waiting.extend(near.filter(|name| all.insert(name)));
    }
    layers.iter().filter(move |(name, _)| all.contains(name))
}

/// The layers on a way from `from` to `to`, both included, by dependencies and nearness: what each of them waits for
/// before it starts. `None`: there is none.
fn way<'m>(layers: &'m BTreeMap<LayerName, Layer>, from: &'m LayerName, to: &LayerName) -> Option<Vec<&'m LayerName>> {
    let mut came_from: BTreeMap<&LayerName, &LayerName> = BTreeMap::new();
    let mut waiting = vec![from];
    let mut seen = BTreeSet::from([from]);
    while let Some(at) = waiting.pop() {
        if at == to {
            let mut way = vec![at];
            while let Some(previous) = way.last().and_then(|last| came_from.get(last)) {
                way.push(previous);
            }
            way.reverse();
            return Some(way);
        }
        let Some(layer) = layers.get(at) else { continue };
        for next in layer.depends_on.keys().chain(&layer.rules.near).filter(|next| seen.insert(next)) {
            came_from.insert(next, at);
            waiting.push(next);
        }
    }
    None
}
