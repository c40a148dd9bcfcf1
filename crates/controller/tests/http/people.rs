//! What people ask for.

use godwit_api::client::ClientError;
use godwit_api::types::ApplyRequest;
use godwit_controller::{RunError, run};
use godwit_model::event::EventKind;
use http::{Method, StatusCode};

use crate::controller::{config, manifest, refusal, request, start, within};

#[tokio::test]
async fn the_api_answers_at_both_doors() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let here = controller.client().version().await.unwrap();
    let elsewhere = controller.remote(Some(&controller.admin())).version().await.unwrap();
    assert_eq!(here, elsewhere);
    assert_eq!(here.version, env!("CARGO_PKG_VERSION"));
    assert!(!here.store_id.is_empty());
    controller.stop().await;
    assert!(!dir.path().join("api.sock").exists());
}

#[tokio::test]
async fn applying_again_changes_nothing_and_a_dry_run_never_does() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let first = client.apply(&request("shop", 2)).await.unwrap();
    assert_eq!(first.changes, ["create the environment shop", "create shop/db-1", "create shop/db-2"]);
    let again = client.apply(&request("shop", 2)).await.unwrap();
    assert!(again.changes.is_empty());
    let dry = client.apply(&ApplyRequest { manifest: manifest("shop", 1), dry_run: true }).await.unwrap();
    assert_eq!(dry.changes, ["remove shop/db-2"]);

    let env = client.environment(&"shop".parse().unwrap()).await.unwrap();
    assert_eq!((env.layers[0].wanted, env.layers[0].running, env.containers.len()), (2, 0, 2));
    assert_eq!(client.environments().await.unwrap(), vec![env]);
    let container = client.container(&"shop/db-1".parse().unwrap()).await.unwrap();
    assert_eq!((container.state.as_str(), container.host), ("waiting", None));
    assert_eq!(client.containers(Some(&"shop".parse().unwrap())).await.unwrap().len(), 2);
    controller.stop().await;
}

#[tokio::test]
async fn what_is_deleted_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    client.apply(&request("shop", 2)).await.unwrap();
    let name = "shop/db-2".parse().unwrap();
    assert_eq!(client.remove_container(&name).await.unwrap().state, "removing");
    assert_eq!(refusal(client.remove_container(&name).await).0, 404);
    let env = "shop".parse().unwrap();
    let deleted = client.delete_environment(&env).await.unwrap();
    assert_eq!(deleted.changes, ["remove shop/db-1", "remove the environment shop"]);
    assert_eq!(refusal(client.delete_environment(&env).await).0, 404);
    assert!(client.containers(None).await.unwrap().is_empty());
    controller.stop().await;
}

#[tokio::test]
async fn stopping_is_wanted_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    client.apply(&request("shop", 1)).await.unwrap();
    let name = "shop/db-1".parse().unwrap();
    let stopped = client.stop(&name).await.unwrap();
    assert_eq!((stopped.state.as_str(), stopped.wanted_running), ("stopped", false));
    assert!(client.start(&name).await.unwrap().wanted_running);
    controller.stop().await;
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let name = "shop/db-1".parse().unwrap();
    let (status, body) = refusal(client.container(&name).await);
    assert_eq!((status, body.error.as_str()), (404, "there is no container shop/db-1"));
    assert_eq!(refusal(client.stop(&name).await).0, 404);
    assert_eq!(refusal(client.migrate(&name, &Default::default()).await).0, 404);
    assert_eq!(refusal(client.logs(&name, None, false).await.map(drop)).0, 404);
    assert_eq!(refusal(client.environment(&"shop".parse().unwrap()).await).0, 404);
    assert_eq!(refusal(client.containers(Some(&"shop".parse().unwrap())).await).0, 404);
    let id = "0123456789ab".parse().unwrap();
    assert_eq!(refusal(client.r#move(&id).await).0, 404);
    assert_eq!(refusal(client.cancel_move(&id).await).0, 404);
    assert_eq!(refusal(client.watch_move(&id).await.map(drop)).0, 404);
    controller.stop().await;
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let apply = |manifest: serde_json::Value| serde_json::json!({ "manifest": manifest }).to_string();
    let shop = serde_json::to_value(manifest("shop", 1)).unwrap();
    let empty = apply(serde_json::json!({"name": "shop", "layers": {}}));
    let unknown = apply(serde_json::json!({"name": "shop", "layers": {}, "colour": "red"}));
    let huge = format!("{{\"manifest\": \"{}\"}}", "x".repeat(3 << 20));
    let other = apply(shop);
    for (method, path, body, status, says) in [
        (Method::GET, "/v1/environments/Shop", "", 400, "'S'"),
        (Method::GET, "/v1/containers/shop/db", "", 400, "ENVIRONMENT/LAYER-NUMBER"),
        (Method::GET, "/v1/moves/xyz", "", 400, "xyz"),
        (Method::GET, "/v1/containers?env=Shop", "", 400, "env"),
        (Method::GET, "/v1/events?since=yesterday", "", 400, "since"),
        (Method::PUT, "/v1/environments/shop", "{", 400, "JSON"),
        (Method::PUT, "/v1/environments/shop", &unknown, 422, "colour"),
        (Method::PUT, "/v1/environments/shop", &empty, 422, "no layers"),
        (Method::PUT, "/v1/environments/store", &other, 422, "store"),
        (Method::PUT, "/v1/environments/shop", &huge, 413, "limit"),
        (Method::GET, "/v1/nonsense", "", 404, "/v1/nonsense"),
        (Method::GET, "/", "", 404, "no route /"),
        (Method::DELETE, "/v1/version", "", 405, "DELETE"),
        (Method::GET, "/v1/containers/shop/db-1/exec", "", 400, "onnection"),
    ] {
        let answer = controller.raw_local(method.clone(), path, body).await;
        let error = answer.error().one_line();
        assert_eq!((answer.status.as_u16(), error.contains(says)), (status, true), "{method} {path}: {error}");
    }
    assert!(controller.client().environments().await.unwrap().is_empty());
    controller.stop().await;
}

#[tokio::test]
async fn events_are_told_in_order_and_end_with_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    client.apply(&request("shop", 1)).await.unwrap();
    let mut past = client.events(None, false).await.unwrap();
    let first = within(past.next()).await.unwrap().unwrap();
    assert_eq!((first.kind, first.env.as_ref().map(|e| e.as_str())), (EventKind::EnvApplied, Some("shop")));

    let mut stream = client.events(Some(first.number), true).await.unwrap();
    client.apply(&request("store", 1)).await.unwrap();
    let mut last = first.number;
    loop {
        let event = within(stream.next()).await.unwrap().unwrap();
        assert!(event.number >= last, "{event:?}");
        last = event.number;
        if event.env.as_ref().is_some_and(|env| env.as_str() == "store") && event.kind == EventKind::EnvApplied {
            break;
        }
        assert_ne!(event.kind, EventKind::EnvApplied, "an event came twice");
    }
    controller.begin_stop();
    let end = loop {
        match within(stream.next()).await {
            Some(Ok(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(&end, Some(Err(ClientError::Api { body, .. })) if body.error.contains("ends")), "{end:?}");
    controller.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_everything_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let applied = controller.client().apply(&request("shop", 3)).await.unwrap();
    let before = (controller.client().version().await.unwrap(), controller.token(), controller.admin());
    let containers = controller.client().containers(None).await.unwrap();
    let host = controller.join("h1").await;
    controller.stop().await;

    let controller = start(dir.path()).await;
    let client = controller.client();
    assert!((client.version().await.unwrap(), controller.token(), controller.admin()) == before);
    let ids = |views: &[godwit_api::types::ContainerView]| -> Vec<_> { views.iter().map(|v| v.id.clone()).collect() };
    assert_eq!(ids(&client.containers(None).await.unwrap()), ids(&containers));
    let again = client.apply(&request("shop", 3)).await.unwrap();
    assert!(again.changes.is_empty() && again.revision >= applied.revision, "{again:?}");
    // Certificates of before are as good as ever.
    controller.remote(Some(&controller.admin())).version().await.unwrap();
    assert_eq!(refusal(controller.remote(Some(&host)).version().await).0, 403);
    controller.stop().await;
}

#[tokio::test]
async fn a_second_controller_takes_nothing_from_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let error = within(run(config(dir.path()))).await.unwrap_err();
    assert!(matches!(error, RunError::Store(_)) && error.to_string().contains("in use by process"), "{error}");
    let mut other = config(dir.path());
    other.state_dir = dir.path().join("other");
    let error = within(run(other)).await.unwrap_err();
    assert!(matches!(error, RunError::Socket(_)) && error.to_string().contains("api.sock"), "{error}");
    let mut other = config(dir.path());
    other.state_dir = dir.path().join("third");
    other.api_socket = dir.path().join("third.sock");
    other.listen = controller.address.to_string();
    let error = within(run(other)).await.unwrap_err();
    assert!(matches!(error, RunError::Listen { .. }) && !dir.path().join("third.sock").exists(), "{error}");
    controller.client().version().await.unwrap();
    controller.stop().await;
}

#[tokio::test]
async fn without_the_admins_certificate_nothing_is_told_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let answer = controller.raw(None, Method::GET, "/v1/version", "").await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert!(answer.error().hint.unwrap().contains("admin"));
    controller.stop().await;
}
