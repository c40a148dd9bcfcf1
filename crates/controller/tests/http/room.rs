//! Containers that are to have more than their hosts have.

use std::collections::BTreeMap;

use godwit_api::client::Client;
use godwit_api::types::{ApplyRequest, ContainerView};
use godwit_model::event::{Event, EventKind};
use godwit_model::manifest::parse;
use godwit_model::{Bytes, ContainerName};

use crate::agent::{agent, let_moves_succeed, until};
use crate::controller::{Controller, start, within};

const GIB: u64 = 1 << 30;

/// An environment with one container that reserves so much memory, in GiB.
pub async fn apply(client: &Client, name: &str, gib: u64) {
    let service = format!("{{image: 'oci:/srv/x', deploy: {{resources: {{reservations: {{memory: {gib}g}}}}}}}}");
    let text = format!("name: {name}\nservices:\n  x: {service}\n");
    let manifest = parse("compose.yaml", &text, None, &BTreeMap::new()).unwrap();
    client.apply(&ApplyRequest { manifest, dry_run: false }).await.unwrap();
}

fn named(env: &str) -> ContainerName {
    format!("{env}/x-1").parse().unwrap()
}

/// Waits for a container's view with the help of the events: each look follows something that has happened.
async fn wait_for(client: &Client, env: &str, wished: impl Fn(&ContainerView) -> bool) -> ContainerView {
    let mut events = client.events(None, true).await.unwrap();
    let reached = async {
        loop {
            let view = client.container(&named(env)).await.unwrap();
            if wished(&view) {
                return view;
            }
            events.next().await.unwrap().unwrap();
        }
    };
    within(reached).await
}

fn grown(gib: u64) -> impl Fn(&ContainerView) -> bool {
    move |view| view.growth.is_none() && view.resources.reserved_memory == Bytes(gib * GIB)
}

async fn events(client: &Client) -> Vec<Event> {
    let mut all = client.events(None, false).await.unwrap();
    let mut found = Vec::new();
    while let Some(event) = all.next().await {
        found.push(event.unwrap());
    }
    found
}

/// `a` with 3 GiB and `b` with 4 GiB on the only host, which has 8.
async fn begin(controller: &Controller) -> (Client, crate::agent::Agent) {
    let client = controller.client();
    let h1 = agent(controller, "h1").await;
    apply(&client, "a", 3).await;
    apply(&client, "b", 4).await;
    until(controller, "a/x-1", "running").await;
    until(controller, "b/x-1", "running").await;
    (client, h1)
}

#[tokio::test]
async fn what_fits_grows_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, _h1) = begin(&controller).await;
    let before = client.container(&named("a")).await.unwrap();
    apply(&client, "a", 4).await;
    let after = wait_for(&client, "a", grown(4)).await;
    assert_eq!((after.id, after.generation), (before.id, before.generation));
    assert!(client.moves().await.unwrap().is_empty());
    // Less is given back at once, and asking for what is asked for already changes nothing.
    apply(&client, "a", 2).await;
    assert!(grown(2)(&client.container(&named("a")).await.unwrap()));
    controller.stop().await;
}

#[tokio::test]
async fn a_neighbour_makes_way_and_nothing_else_gets_the_room() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, mut h1) = begin(&controller).await;
    let before = client.container(&named("a")).await.unwrap();
    let mut h2 = agent(&controller, "h2").await;
    apply(&client, "a", 5).await;
    let begun = wait_for(&client, "b", |view| view.moving.is_some()).await;
    let growing = client.container(&named("a")).await.unwrap();
    assert_eq!(growing.resources.reserved_memory, Bytes(3 * GIB), "not before there is room");
    assert_eq!(growing.growth.unwrap().host.unwrap().as_str(), "h1");
    // It would fit on h1 as soon as `b` is gone, and nowhere else.
    apply(&client, "c", 5).await;
    let_moves_succeed(&mut [&mut h1, &mut h2]);
    let after = wait_for(&client, "a", grown(5)).await;
    assert_eq!((&after.id, after.generation, &after.host), (&before.id, before.generation, &before.host));
    assert_eq!(client.container(&named("b")).await.unwrap().host.unwrap().as_str(), "h2");
    let moved = client.r#move(&begun.moving.unwrap()).await.unwrap();
    assert_eq!(moved.cause.unwrap().told(&named("b")), "it makes room for a/x-1");
    let waits = client.container(&named("c")).await.unwrap();
    assert!(waits.host.is_none() && waits.message.unwrap().contains("5.00 GiB of memory is reserved for it"));

    let all = events(&client).await;
    let at = |kind: EventKind, text: &str| {
        let found = all.iter().position(|e| e.kind == kind && e.message.contains(text));
        found.unwrap_or_else(|| panic!("no {} with {text:?} in {all:#?}", kind.as_str()))
    };
    let order = [
        at(EventKind::ContainerGrowing, "b/x-1 → h2"),
        at(EventKind::MoveStarted, "b/x-1 is being moved from h1 to h2: it makes room for a/x-1"),
        at(EventKind::MoveDone, "it makes room for a/x-1"),
        at(EventKind::ContainerGrown, "a/x-1 has 5.00 GiB"),
    ];
    assert!(order.is_sorted(), "{order:?}");
    controller.stop().await;
}

#[tokio::test]
async fn what_cannot_grow_says_why_and_does_when_a_host_comes() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, mut h1) = begin(&controller).await;
    apply(&client, "a", 6).await;
    let refused = |view: &ContainerView| view.growth.as_ref().is_some_and(|g| g.refused.is_some());
    let view = wait_for(&client, "a", refused).await;
    let growth = view.growth.unwrap();
    assert!(growth.refused.as_ref().unwrap().contains("nobody on h1 can make way"), "{growth:?}");
    assert_eq!((growth.host, view.state.as_str()), (None, "running"));
    let told = |all: Vec<Event>| all.iter().filter(|e| e.kind == EventKind::ContainerNotGrown).count();
    assert_eq!(told(events(&client).await), 1);
    let mut h2 = agent(&controller, "h2").await;
    let_moves_succeed(&mut [&mut h1, &mut h2]);
    wait_for(&client, "a", grown(6)).await;
    controller.stop().await;
}

/// What was asked for survives a restart, and room that was being made is made.
#[tokio::test]
async fn room_is_made_although_the_controller_was_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, h1) = begin(&controller).await;
    let h2 = agent(&controller, "h2").await;
    apply(&client, "a", 5).await;
    wait_for(&client, "b", |view| view.moving.is_some()).await;
    controller.stop().await;
    let controller = start(dir.path()).await;
    let mut h1 = crate::agent::again(&controller, h1).await;
    let mut h2 = crate::agent::again(&controller, h2).await;
    let_moves_succeed(&mut [&mut h1, &mut h2]);
    let client = controller.client();
    wait_for(&client, "a", grown(5)).await;
    assert_eq!(client.container(&named("b")).await.unwrap().host.unwrap().as_str(), "h2");
    controller.stop().await;
}
