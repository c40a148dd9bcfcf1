//! Rules of placement, from the manifest to where containers are and may go.

use std::collections::BTreeMap;

use godwit_api::types::{ApplyRequest, MigrateRequest};
use godwit_model::host::HostFacts;
use godwit_model::manifest::{Manifest, parse};

use crate::agent::{Agent, agent_as, until};
use crate::controller::{Controller, refusal, start};

pub fn read(text: &str) -> Manifest {
    parse("compose.yaml", text, None, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
}

pub async fn apply(controller: &Controller, text: &str) -> Vec<String> {
    controller.client().apply(&ApplyRequest { manifest: read(text), dry_run: false }).await.unwrap().changes
}

/// Hosts h1, h2 … in these zones.
pub async fn hosts(controller: &Controller, zones: &[&str]) -> Vec<Agent> {
    let mut agents = Vec::new();
    for (n, zone) in zones.iter().enumerate() {
        let name = format!("h{}", n + 1);
        let label = |facts: &mut HostFacts| drop(facts.labels.insert("zone".to_owned(), (*zone).to_owned()));
        agents.push(agent_as(controller, &name, label).await);
    }
    agents
}

pub async fn host_of(controller: &Controller, name: &str) -> String {
    until(controller, name, "running").await.host.unwrap().to_string()
}

pub fn to(host: &str) -> MigrateRequest {
    MigrateRequest { to: Some(host.parse().unwrap()), ..MigrateRequest::default() }
}

const SHOP: &str = "
name: shop
services:
  db: {image: x, deploy: {replicas: 2}, x-godwit: {spread: strict, require: {zone: east}, apart: [disks]}}
  api: {image: x, deploy: {replicas: 2}, x-godwit: {max-per-host: 1, near: [db]}}
";
const OTHER: &str = "
name: other
services:
  log: {image: x, x-godwit: {apart: [disks]}}
";

#[tokio::test]
async fn rules_are_kept_by_creation_and_by_moves() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _agents = hosts(&controller, &["east", "west", "east", "west"]).await;
    apply(&controller, SHOP).await;
    let mut db = [host_of(&controller, "shop/db-1").await, host_of(&controller, "shop/db-2").await];
    let mut api = [host_of(&controller, "shop/api-1").await, host_of(&controller, "shop/api-2").await];
    db.sort();
    api.sort();
    assert_eq!((db, api), (["h1", "h3"].map(String::from), ["h1", "h3"].map(String::from)));
    // A group holds across environments.
    apply(&controller, OTHER).await;
    let log = host_of(&controller, "other/log-1").await;
    assert!(["h2", "h4"].contains(&log.as_str()), "{log}");

    for (name, host, says) in [
        ("shop/db-1", "h2", "h2: it has no label zone=east"),
        ("shop/db-1", "h2", "shop/api-"),
        ("shop/api-1", "h2", "h2: no container of the layer db is there"),
        ("other/log-1", "h1", "h1: another member of the group disks is there"),
    ] {
        let (status, body) = refusal(client.migrate(&name.parse().unwrap(), &to(host)).await);
        assert_eq!((status, body.causes.iter().any(|cause| cause.contains(says))), (409, true), "{says}: {body:?}");
    }
    // To the only host that keeps every rule.
    let elsewhere = if log == "h2" { "h4" } else { "h2" };
    let begun = client.migrate(&"other/log-1".parse().unwrap(), &MigrateRequest::default()).await.unwrap();
    assert_eq!(begun.to.as_str(), elsewhere);
    controller.stop().await;
}

/// What others must be near comes back to them when it is made anew, though another host has less to do.
#[tokio::test]
async fn a_companion_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let _agents = hosts(&controller, &["east", "east", "east"]).await;
    let text = "{name: shop, services: {db: {image: x}, api: {image: x, scale: 2, x-godwit: {near: [db]}}}}";
    apply(&controller, text).await;
    let before = until(&controller, "shop/db-1", "running").await;
    for name in ["shop/api-1", "shop/api-2"] {
        assert_eq!(until(&controller, name, "running").await.host, before.host);
    }
    apply(&controller, &text.replace("db: {image: x}", "db: {image: y}")).await;
    let after = until(&controller, "shop/db-1", "running").await;
    assert_eq!((after.image.as_str(), after.host), ("y", before.host));
    controller.stop().await;
}

#[tokio::test]
async fn a_changed_rule_is_told_and_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    apply(&controller, OTHER).await;
    assert!(apply(&controller, OTHER).await.is_empty());
    let changes = apply(&controller, &OTHER.replace("apart: [disks]", "importance: 9")).await;
    assert_eq!(changes, ["update the layer other/log: rules of placement"]);
    controller.stop().await;
}

/// Whoever makes a manifest without our reader is told, too.
#[tokio::test]
async fn rules_that_contradict_each_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let mut manifest = read(OTHER);
    let layer = manifest.layers.values_mut().next().unwrap();
    layer.rules.near.insert("nobody".parse().unwrap());
    let (status, body) = refusal(controller.client().apply(&ApplyRequest { manifest, dry_run: false }).await);
    let says = "the layer log has a rule that cannot be kept: near: there is no service \"nobody\"";
    assert_eq!((status, body.error.as_str()), (422, says));
    controller.stop().await;
}

fn layer(name: &str, replicas: u32, rules: &str) -> String {
    let layer = format!("{{image: x, deploy: {{replicas: {replicas}}}, x-godwit: {{{rules}}}}}");
    format!("name: {name}\nservices:\n  web: {layer}\n")
}

#[tokio::test]
async fn what_the_known_hosts_cannot_keep_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    // Where no host is connected, they are about to come.
    apply(&controller, &layer("early", 3, "spread: strict")).await;
    let _agents = hosts(&controller, &["east", "east"]).await;
    apply(&controller, &layer("held", 1, "apart: [disks]")).await;
    for (replicas, rules, says) in [
        (3, "spread: strict", "3 containers, at most 1 on a host, need 3 hosts, and 2 are known"),
        (5, "max-per-host: 2", "5 containers, at most 2 on a host, need 3 hosts, and 2 are known"),
        (1, "require: {zone: west}", "it needs a host with zone=west, and none is known"),
        (3, "max-per-host: 1, require: {zone: east}", "need 3 hosts with zone=east, and 2 are known"),
        (2, "apart: [disks]", "the group disks has 3 members, of which a host holds one, and 2 are known"),
    ] {
        let request = ApplyRequest { manifest: read(&layer("shop", replicas, rules)), dry_run: false };
        let (status, body) = refusal(client.apply(&request).await);
        assert_eq!((status, body.error.contains(says)), (409, true), "{says}: {body:?}");
        assert!(body.hint.is_some());
    }
    assert!(client.environment(&"shop".parse().unwrap()).await.is_err(), "a refused apply left something");
    // As evenly as possible is always possible; what was accepted earlier may be applied again, and is warned of.
    apply(&controller, &layer("shop", 3, "spread: preferred")).await;
    let again = ApplyRequest { manifest: read(&layer("early", 3, "spread: strict")), dry_run: false };
    let answer = client.apply(&again).await.unwrap();
    assert_eq!((answer.changes.len(), answer.warnings.len()), (0, 1), "{answer:?}");
    let more = ApplyRequest { manifest: read(&layer("early", 4, "spread: strict")), dry_run: false };
    assert_eq!(refusal(client.apply(&more).await).0, 409);
    // A closed host may be opened again: accepted, with a warning.
    client.cordon(&"h2".parse().unwrap()).await.unwrap();
    let request = ApplyRequest { manifest: read(&layer("two", 2, "spread: strict")), dry_run: false };
    let answer = client.apply(&request).await.unwrap();
    let says = "web: 2 containers, at most 1 on a host, need 2 hosts, and 1 is taking containers now; some will wait";
    assert_eq!(answer.warnings, [says]);
    controller.stop().await;
}

#[tokio::test]
async fn a_dry_run_says_where_new_containers_would_go() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _agents = hosts(&controller, &["west", "east"]).await;
    let text = "
name: shop
services:
  api: {image: x, x-godwit: {near: [db]}}
  db: {image: x, x-godwit: {require: {zone: east}}}
  huge: {image: x, deploy: {resources: {reservations: {memory: 100g}}}}
";
    let answer = client.apply(&ApplyRequest { manifest: read(text), dry_run: true }).await.unwrap();
    let places: Vec<(String, Option<&str>)> =
        answer.places.iter().map(|p| (p.container.local(), p.host.as_ref().map(|h| h.as_str()))).collect();
    let wanted = [("db-1", Some("h2")), ("huge-1", None), ("api-1", Some("h2"))];
    assert_eq!(places, wanted.map(|(name, host)| (name.to_owned(), host)));
    assert!(answer.places[1].reasons[0].contains("100 GiB of memory"), "{answer:?}");
    assert!(client.environments().await.unwrap().is_empty());
    controller.stop().await;
}
