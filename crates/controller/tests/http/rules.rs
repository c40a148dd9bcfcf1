//! Rules of placement, from the manifest to where containers are and may go.

use std::collections::BTreeMap;

use godwit_api::types::{ApplyRequest, MigrateRequest};
use godwit_model::host::HostFacts;
use godwit_model::manifest::{Manifest, parse};

use crate::agent::{Agent, agent_as, until};
use crate::controller::{Controller, refusal, start};

fn read(text: &str) -> Manifest {
    parse("compose.yaml", text, None, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
}

async fn apply(controller: &Controller, text: &str) -> Vec<String> {
    controller.client().apply(&ApplyRequest { manifest: read(text), dry_run: false }).await.unwrap().changes
}

/// Hosts h1, h2 … in these zones.
async fn hosts(controller: &Controller, zones: &[&str]) -> Vec<Agent> {
    let mut agents = Vec::new();
    for (n, zone) in zones.iter().enumerate() {
        let name = format!("h{}", n + 1);
        let label = |facts: &mut HostFacts| drop(facts.labels.insert("zone".to_owned(), (*zone).to_owned()));
        agents.push(agent_as(controller, &name, label).await);
    }
    agents
}

async fn host_of(controller: &Controller, name: &str) -> String {
    until(controller, name, "running").await.host.unwrap().to_string()
}

fn to(host: &str) -> MigrateRequest {
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
