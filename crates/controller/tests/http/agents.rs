//! Who is who: hosts, the admin, strangers.

use godwit_api::tls::Identity;
use http::{Method, StatusCode};
use tokio_tungstenite::tungstenite::Error;

use crate::agent::{agent, dial, until};
use crate::controller::{Controller, join_request, refusal, request, start};

const JOIN: &str = "/v1/agent/join";

#[tokio::test]
async fn only_who_knows_the_token_becomes_a_member() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let token = controller.token().token;
    let wrong = format!("{}{}", if token.starts_with('0') { '1' } else { '0' }, &token[1..]);
    for wrong in [wrong.as_str(), "", &token[1..], &format!("{token}0")] {
        let answer = controller.raw(None, Method::POST, JOIN, &join_request("h1", wrong).1).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN);
        let error = answer.error();
        assert!(error.error.contains("token") && error.hint.unwrap().contains("join-token"));
    }
    let (_, right) = join_request("h1", &token);
    assert_eq!(controller.raw_local(Method::POST, JOIN, &right).await.status, StatusCode::FORBIDDEN);
    let no_csr = right.replace("BEGIN CERTIFICATE REQUEST", "BEGIN NOTHING");
    assert_eq!(controller.raw(None, Method::POST, JOIN, &no_csr).await.status, StatusCode::BAD_REQUEST);
    let identity = controller.join("h1").await;
    assert_eq!(identity.ca_pem, controller.token().controller_ca_pem);
    controller.stop().await;
}

#[tokio::test]
async fn the_name_of_a_host_that_is_connected_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let linked = agent(&controller, "h1").await;
    let (_, again) = join_request("h1", &controller.token().token);
    let answer = controller.raw(None, Method::POST, JOIN, &again).await;
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.body);
    linked.die().await;
    controller.stop().await;
}

async fn refused_socket(controller: &Controller, identity: Option<&Identity>, path: &str) -> u16 {
    match dial(controller, identity, path).await.expect_err("this should have been refused") {
        Error::Http(answer) => answer.status().as_u16(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn everybody_has_routes_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (host, admin) = (controller.join("h1").await, controller.admin());
    let as_host = controller.remote(Some(&host));
    let (status, body) = refusal(as_host.hosts().await);
    assert_eq!((status, body.error.contains("h1")), (403, true));
    assert_eq!(refusal(as_host.apply(&request("shop", 1)).await).0, 403);
    assert_eq!(refusal(as_host.delete_environment(&"shop".parse().unwrap()).await).0, 403);
    for path in ["/v1/agent/link", "/v1/agent/sessions/0"] {
        assert_eq!(refused_socket(&controller, Some(&admin), path).await, 403);
        assert_eq!(refused_socket(&controller, None, path).await, 401);
    }
    assert!(controller.client().environments().await.unwrap().is_empty());
    controller.stop().await;
}

#[tokio::test]
async fn hosts_of_another_installation_are_strangers() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (ours, theirs) = (start(ours.path()).await, start(theirs.path()).await);
    let stranger = theirs.join("h1").await;
    let forged = Identity { ca_pem: ours.token().controller_ca_pem, ..stranger };
    let failed = ours.remote(Some(&forged)).version().await.unwrap_err();
    assert!(!matches!(failed, godwit_api::client::ClientError::Api { .. }), "{failed:?}");
    ours.stop().await;
    theirs.stop().await;
}

#[tokio::test]
async fn a_link_makes_a_host_that_gets_containers_and_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let linked = agent(&controller, "h1").await;
    controller.client().apply(&request("shop", 1)).await.unwrap();
    let view = until(&controller, "shop/db-1", "running").await;
    assert_eq!(view.host.unwrap().as_str(), "h1");
    let host = controller.client().hosts().await.unwrap().remove(0);
    assert!(host.connected && host.last_seen_ms.is_some());
    assert_eq!((host.containers, host.facts.cpu_model.as_str()), (1, "played"));
    linked.die().await;
    let view = until(&controller, "shop/db-1", "unknown").await;
    assert!(view.message.unwrap().starts_with("h1 is not connected"));
    // One that a silent host may hold is seen until that host has let go.
    let removing = controller.client().remove_container(&"shop/db-1".parse().unwrap()).await.unwrap();
    assert_eq!((removing.state.as_str(), removing.message.unwrap().contains("h1")), ("removing", true));
    controller.stop().await;
}
