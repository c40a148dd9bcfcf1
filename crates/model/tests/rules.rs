//! Rules of placement in a file: what they become, and what is said of those that cannot be kept.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};

use godwit_model::LayerName;
use godwit_model::manifest::{Manifest, Rules, contradictions, parse};

fn read(text: &str) -> Result<Manifest, String> {
    parse("env.yaml", text, Some("app"), &BTreeMap::new()).map_err(|errors| errors.to_string())
}

fn errors(text: &str) -> String {
    read(text).expect_err("it is wrong")
}

fn layer(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

const GOOD: &str = "
services:
  db:
    image: x
    deploy: {replicas: 3}
    volumes: ['data:/d']
    x-godwit: {spread: strict, apart: [databases, noisy], require: {zone: east, disk: ssd}, importance: 1000}
  cache:
    image: x
    volumes: ['scratch:/d']
    x-godwit: {near: [db], max-per-host: 2, volumes-may-be-lost: true}
  web: {image: x}
volumes: {data: , scratch: }
";

#[test]
fn rules_mean_what_they_say() {
    let manifest = read(GOOD).unwrap();
    let db = &manifest.layers[&layer("db")];
    let texts = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect::<BTreeSet<String>>();
    let require = [("disk", "ssd"), ("zone", "east")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let rules =
        Rules { apart: texts(&["databases", "noisy"]), require: require.into(), importance: 1000, ..Rules::default() };
    assert_eq!((&db.rules, db.most_per_host()), (&rules, Some(1)));
    let cache = &manifest.layers[&layer("cache")];
    let near = BTreeSet::from([layer("db")]);
    let rules = Rules { near, max_per_host: Some(2), volumes_may_be_lost: true, ..Rules::default() };
    assert_eq!((&cache.rules, cache.most_per_host()), (&rules, Some(2)));
    let web = &manifest.layers[&layer("web")];
    assert_eq!((&web.rules, web.rules.importance, web.most_per_host()), (&Rules::default(), 1, None));
    let json = serde_json::to_string(&manifest).unwrap();
    assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
}

/// What a store has from before there were rules.
#[test]
fn a_layer_without_rules_is_read() {
    let manifest = read("services: {web: {image: x}}").unwrap();
    let mut json = serde_json::to_value(&manifest).unwrap();
    json["layers"]["web"].as_object_mut().unwrap().remove("rules").unwrap();
    assert_eq!(serde_json::from_value::<Manifest>(json.clone()).unwrap(), manifest);
    json["layers"]["web"]["rules"] = serde_json::json!({"importance": 7});
    let read: Manifest = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(read.layers[&layer("web")].rules, Rules { importance: 7, ..Rules::default() });
    json["layers"]["web"]["rules"] = serde_json::json!({"aprat": []});
    assert!(serde_json::from_value::<Manifest>(json).is_err());
}

#[test]
fn wrong_values_are_said_with_their_places() {
    insta::assert_snapshot!(errors(
        "services:
  a:
    image: x
    x-godwit:
      max-per-host: 0
      apart: [Group, noisy, noisy, '']
      near: db
      require: {zone: east side, '': x, disk: [ssd]}
      importance: 1001
      volumes-may-be-lost: perhaps
  b:
    image: x
    x-godwit: {max_per_host: 2, near: [a, a, A], require: [zone=east]}
    deploy: {placement: {max_replicas_per_node: 1}}
"
    ));
}

#[test]
fn rules_that_cannot_be_kept_are_said() {
    insta::assert_snapshot!(errors(
        "x-godwit: {spread: strict}
services:
  strict: {image: x, x-godwit: {max-per-host: 2}}
  group: {image: x, x-godwit: {spread: none, apart: [g], max-per-host: 2}}
  files: {image: x, x-godwit: {volumes-may-be-lost: true}}
  itself: {image: x, x-godwit: {near: [itself]}}
  typo: {image: x, x-godwit: {near: [itslef]}}
  stranger: {image: x, x-godwit: {near: [nobody-at-all]}}
  one: {image: x, x-godwit: {near: [two]}}
  two: {image: x, x-godwit: {near: [three]}}
  three: {image: x, depends_on: [one]}
  east: {image: x, x-godwit: {require: {zone: east}}}
  west: {image: x, x-godwit: {require: {zone: west}, near: [middle]}}
  middle: {image: x, x-godwit: {near: [east]}}
  apart: {image: x, x-godwit: {apart: [g], near: [group]}}
  none: {image: x, scale: 0}
  waits: {image: x, x-godwit: {near: [none]}}
  many: {image: x, scale: 5, x-godwit: {spread: none, max-per-host: 2, near: [few]}}
  few: {image: x, scale: 2}
"
    ));
}

/// Over the API a manifest comes without a file: the same rules hold.
#[test]
fn a_manifest_that_no_file_says_is_judged_too() {
    let mut manifest = read(GOOD).unwrap();
    assert_eq!(contradictions(&manifest.layers), []);
    let rules = &mut manifest.layers.get_mut(&layer("web")).unwrap().rules;
    rules.max_per_host = Some(0);
    rules.importance = 0;
    rules.require.insert("zone".to_owned(), String::new());
    rules.apart.insert("A b".to_owned());
    rules.near.insert(layer("nobody"));
    let found = contradictions(&manifest.layers);
    let keys: Vec<&str> = found.iter().map(|one| one.key).collect();
    assert_eq!(keys, ["max-per-host", "importance", "require", "apart", "near"], "{found:?}");
    assert!(found.iter().all(|one| one.layer == layer("web")));
}
