//! Why something is where it is, and what would happen: answers that change nothing.

use godwit_api::types::{MigrateRequest, PlacementView};
use godwit_plan::Purpose;

use crate::agent::{agent, until};
use crate::controller::{Controller, refusal, request, start};
use crate::rules::{apply, host_of, hosts, to};

async fn placement(controller: &Controller, name: &str) -> PlacementView {
    controller.client().placement(&name.parse().unwrap()).await.unwrap()
}

fn against(view: &PlacementView, host: &str) -> String {
    view.hosts.out.iter().find(|out| out.host.as_str() == host).unwrap().reasons.join("; ")
}

const SHOP: &str = "
name: shop
services:
  db: {image: x, deploy: {replicas: 2}, x-godwit: {spread: strict}}
";

#[tokio::test]
async fn a_place_is_explained_host_by_host() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let _agents = hosts(&controller, &["east", "east", "west"]).await;
    apply(&controller, SHOP).await;
    let (own, other) = (host_of(&controller, "shop/db-1").await, host_of(&controller, "shop/db-2").await);
    let view = placement(&controller, "shop/db-1").await;
    assert_eq!(view.hosts.home.as_ref().map(|h| h.as_str()), Some(own.as_str()));
    assert_eq!((view.hosts.fitting.len(), view.hosts.out.len()), (1, 2), "{view:?}");
    assert!(against(&view, &own).contains("it is there already"));
    assert!(against(&view, &other).contains("the layer is spread strictly"));
    let here = view.here.unwrap();
    assert_eq!((here.score.of_layer, here.score.of_environment, here.broken), (0, 0, vec![]));

    // A rule that comes later moves nothing, and is told as broken where it is.
    let require = SHOP.replace("replicas: 2", "replicas: 1").replace("strict", "strict, require: {zone: nowhere}");
    let refused = refusal(controller.client().apply(&request_of(&require)).await);
    assert_eq!(refused.0, 409);
    let home_zone = if own == "h3" { "east" } else { "west" };
    apply(&controller, &require.replace("nowhere", home_zone)).await;
    let view = placement(&controller, "shop/db-1").await;
    assert_eq!(view.here.unwrap().broken, [format!("it has no label zone={home_zone}")]);
    controller.stop().await;
}

fn request_of(text: &str) -> godwit_api::types::ApplyRequest {
    godwit_api::types::ApplyRequest { manifest: crate::rules::read(text), dry_run: false }
}

#[tokio::test]
async fn what_waits_is_explained_as_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    apply(&controller, SHOP).await;
    let _agents = hosts(&controller, &["east"]).await;
    let running = host_of(&controller, "shop/db-1").await;
    let view = placement(&controller, "shop/db-2").await;
    assert_eq!((view.hosts.home.as_ref(), &view.here, view.hosts.fitting.len()), (None, &None, 0), "{view:?}");
    assert!(against(&view, &running).contains("spread strictly"));
    assert_eq!(refusal(controller.client().placement(&"shop/db-9".parse().unwrap()).await).0, 404);
    controller.stop().await;
}

#[tokio::test]
async fn a_move_is_planned_and_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _agents = hosts(&controller, &["east", "east", "west"]).await;
    apply(&controller, SHOP).await;
    let (own, other) = (host_of(&controller, "shop/db-1").await, host_of(&controller, "shop/db-2").await);
    let name = "shop/db-1".parse().unwrap();
    let plan = client.plan_move(&name, &MigrateRequest::default()).await.unwrap();
    assert_eq!(plan.from.as_str(), own);
    assert!(![&own, &other].contains(&&plan.to.to_string()), "{plan:?}");
    assert!(plan.reasons[0].contains("no host that fits is better spread"), "{plan:?}");
    let named = client.plan_move(&name, &to(plan.to.as_str())).await.unwrap();
    assert_eq!((&named.to, named.score), (&plan.to, plan.score));
    assert!(!named.reasons.join(" ").contains("better"), "nobody compared: {named:?}");
    let (status, body) = refusal(client.plan_move(&name, &to(&other)).await);
    assert_eq!((status, body.causes.len()), (409, 1), "{body:?}");
    assert!(client.moves().await.unwrap().is_empty());
    assert_eq!(client.migrate(&name, &MigrateRequest::default()).await.unwrap().to, plan.to);
    assert_eq!(refusal(client.plan_move(&name, &MigrateRequest::default()).await).0, 409);
    controller.stop().await;
}

#[tokio::test]
async fn what_a_failure_would_do_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _agents = hosts(&controller, &["east", "east"]).await;
    apply(&controller, SHOP).await;
    apply(&controller, "{name: blog, services: {web: {image: x, x-godwit: {importance: 9}}}}").await;
    let host = host_of(&controller, "blog/web-1").await.parse().unwrap();
    host_of(&controller, "shop/db-2").await;
    let plan = client.plan_fail(&host).await.unwrap();
    let starts: Vec<String> = plan.starts.iter().map(|start| start.container.to_string()).collect();
    assert_eq!((starts, plan.stays.len()), (vec!["blog/web-1".to_owned()], 1), "{plan}");
    let (status, body) = refusal(client.plan_fail(&"h9".parse().unwrap()).await);
    assert_eq!((status, body.error.contains("h1, h2")), (404, true), "{body:?}");
    assert!(client.hosts().await.unwrap().iter().all(|host| host.state.as_str() == "active"));
    controller.stop().await;
}

#[tokio::test]
async fn what_rebalancing_would_do_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _first = agent(&controller, "h1").await;
    client.apply(&request("shop", 2)).await.unwrap();
    until(&controller, "shop/db-1", "running").await;
    until(&controller, "shop/db-2", "running").await;
    assert!(client.plan_rebalance().await.unwrap().moves.is_empty());
    let _second = agent(&controller, "h2").await;
    let advice = client.plan_rebalance().await.unwrap();
    assert_eq!((advice.moves.len(), advice.moves[0].purpose), (1, Purpose::Spread), "{advice}");
    assert!(client.moves().await.unwrap().is_empty());
    controller.stop().await;
}
