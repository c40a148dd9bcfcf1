//! The client against a server that says what it was asked.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use futures_util::{StreamExt, stream};
use godwit_api::client::{Address, Client, ClientError, ExecOutput, MAX_LINE_BYTES};
use godwit_api::session::{ExecControl, ExecRequest, LogStream, TerminalSize};
use godwit_api::types::{ErrorBody, VersionView};
use godwit_model::{ContainerName, EnvName, HostName, MoveId};
use serde_json::{Value, json};

struct Server {
    directory: tempfile::TempDir,
}

impl Server {
    /// Serves `router` until the test ends.
    fn start(router: Router) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(directory.path().join("api.sock")).unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { directory }
    }

    fn client(&self) -> Client {
        Client::new(Address::Unix(self.directory.path().join("api.sock")))
    }
}

fn name() -> ContainerName {
    "shop/db-1".parse().unwrap()
}

fn a_move() -> Value {
    json!({
        "id": "0123456789ab", "container": "ba9876543210", "name": "shop/db-1", "from": "h1", "to": "h2",
        "generation": 1, "requested_at_ms": 5, "finished_at_ms": null, "phase": "copy",
        "outcome": {"state": "moving"}, "progress": {"bytes_sent": 1, "bytes_total": 2, "rounds": 1}, "summary": null
    })
}

fn a_container() -> Value {
    json!({
        "id": "ba9876543210", "name": "shop/db-1", "image": "redis", "address": "10.64.16.2", "host": "h1",
        "generation": 1, "state": "running", "message": null, "health": null, "wanted_running": true,
        "resources": {"memory": null, "cpu": null, "pids": null, "reserved_memory": 0, "reserved_cpu": 0},
        "status": null, "moving": null
    })
}

/// Each typed method sends what [`godwit_api::routes`] says. The server notes `METHOD path?query body`.
#[tokio::test]
async fn every_method_asks_for_its_route() {
    let (seen, mut asked) = tokio::sync::mpsc::channel::<String>(1);
    let echo = move |request: Request| {
        let seen = seen.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
            let body = String::from_utf8_lossy(&body).into_owned();
            let path = parts.uri.path().to_owned();
            seen.send(format!("{} {} {body}", parts.method, parts.uri).trim_end().to_owned()).await.unwrap();
            let changed = json!({"changes": ["x"], "revision": 3});
            let answer = match (parts.method.as_str(), path.as_str()) {
                ("GET", "/v1/version") => json!({"version": "0.1.0", "store_id": "s"}),
                ("GET", "/v1/hosts" | "/v1/environments") => json!([]),
                ("GET", "/v1/containers") => json!([a_container()]),
                ("GET", "/v1/moves") => json!([a_move()]),
                ("PUT" | "DELETE", "/v1/environments/shop") => changed,
                ("GET", "/v1/environments/shop") => json!({
                    "name": "shop", "manifest": {"name": "shop", "layers": {}}, "vni": 1, "subnet": "10.64.16.0/20",
                    "layers": [], "containers": []
                }),
                (_, path) if path.ends_with("migrate") || path.starts_with("/v1/moves/") => a_move(),
                _ => a_container(),
            };
            axum::Json(answer)
        }
    };
    let server = Server::start(Router::new().fallback(any(echo)));
    let client = server.client();
    let env = EnvName::new("shop").unwrap();
    let id: MoveId = "0123456789ab".parse().unwrap();

    macro_rules! asks {
        ($call:expr, $expected:expr) => {{
            $call.await.unwrap();
            assert_eq!(asked.recv().await.unwrap(), $expected);
        }};
    }
    asks!(client.version(), "GET /v1/version");
    asks!(client.hosts(), "GET /v1/hosts");
    asks!(client.environments(), "GET /v1/environments");
    asks!(client.environment(&env), "GET /v1/environments/shop");
    asks!(client.delete_environment(&env), "DELETE /v1/environments/shop");
    asks!(client.containers(None), "GET /v1/containers");
    asks!(client.containers(Some(&env)), "GET /v1/containers?env=shop");
    asks!(client.container(&name()), "GET /v1/containers/shop/db-1");
    asks!(client.remove_container(&name()), "DELETE /v1/containers/shop/db-1");
    asks!(client.stop(&name()), "POST /v1/containers/shop/db-1/stop");
    asks!(client.start(&name()), "POST /v1/containers/shop/db-1/start");
    asks!(client.moves(), "GET /v1/moves");
    asks!(client.r#move(&id), "GET /v1/moves/0123456789ab");
    asks!(client.cancel_move(&id), "POST /v1/moves/0123456789ab/cancel");
    asks!(client.watch_move(&id), "GET /v1/moves/0123456789ab/watch");
    asks!(client.logs(&name(), None, false), "GET /v1/containers/shop/db-1/logs?follow=false");
    asks!(client.logs(&name(), Some(7), true), "GET /v1/containers/shop/db-1/logs?follow=true&tail=7");
    asks!(client.events(None, false), "GET /v1/events?follow=false");
    asks!(client.events(Some(9), true), "GET /v1/events?follow=true&since=9");
    let to = godwit_api::types::MigrateRequest { to: Some(HostName::new("h2").unwrap()), ..Default::default() };
    asks!(
        client.migrate(&name(), &to),
        r#"POST /v1/containers/shop/db-1/migrate {"to":"h2","options":{"mode":"auto","max_downtime_ms":null,"deadline_ms":null,"bandwidth":null,"compression":"auto","connections":null,"never_slow":false}}"#
    );
    let manifest = serde_json::from_value(json!({"name": "shop", "layers": {}})).unwrap();
    let apply = godwit_api::types::ApplyRequest { manifest, dry_run: true };
    asks!(client.apply(&apply), r#"PUT /v1/environments/shop {"manifest":{"name":"shop","layers":{}},"dry_run":true}"#);
}

#[tokio::test]
async fn nobody_there_is_said_with_a_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let client = Client::new(Address::Unix(directory.path().join("no.sock")));
    let error = client.version().await.unwrap_err();
    assert!(matches!(&error, ClientError::Connect { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("godwit lab list"));
    assert!(error.is_transient());

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = Client::new(Address::Https { host: "127.0.0.1".to_owned(), port });
    assert!(matches!(client.version().await.unwrap_err(), ClientError::NoCertificate { .. }));
}

#[tokio::test]
async fn refusals_keep_their_sentence_causes_and_hint() {
    let refuse = || async {
        let mut body = ErrorBody::new("no host takes shop/db-1").with_hint("add a host");
        body.causes.push("h2 is cordoned".to_owned());
        (StatusCode::CONFLICT, axum::Json(body))
    };
    let router = Router::new()
        .route("/v1/version", get(refuse))
        .route("/v1/hosts", get(|| async { "not json" }))
        .route("/v1/moves", get(|| async { (StatusCode::BAD_GATEWAY, "<html>bad gateway</html>") }));
    let server = Server::start(router);
    match server.client().version().await.unwrap_err() {
        ClientError::Api { status, body } => {
            assert_eq!(status, StatusCode::CONFLICT);
            assert_eq!(body.one_line(), "no host takes shop/db-1: h2 is cordoned");
            assert_eq!(body.hint.as_deref(), Some("add a host"));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(server.client().hosts().await.unwrap_err(), ClientError::NotJson { .. }));
    match server.client().moves().await.unwrap_err() {
        ClientError::Api { body, .. } => {
            assert_eq!(body.one_line(), "/v1/moves was answered with 502 Bad Gateway: <html>bad gateway</html>");
        }
        other => panic!("{other:?}"),
    }
}

/// What the server does with a stream of log lines, by the `tail` that is asked for.
const BROKEN: u32 = 1;
const TOO_LONG: u32 = 2;
const ERROR: u32 = 3;
const ENDLESS: u32 = 4;

#[derive(serde::Deserialize)]
struct LogQuery {
    tail: u32,
}

async fn log_stream(Query(query): Query<LogQuery>) -> Response {
    let line = |text: &str| format!("{}\n", json!({"at_ms": 1, "stream": "stdout", "text": text}));
    let first = line("one") + "\n" + &line("two");
    let (head, tail) = first.split_at(20);
    let mut frames: Vec<Result<String, std::io::Error>> = vec![Ok(head.to_owned()), Ok(tail.to_owned())];
    match query.tail {
        BROKEN => frames.push(Err(std::io::Error::other("the agent went away"))),
        TOO_LONG => frames.push(Ok("x".repeat(MAX_LINE_BYTES + 1))),
        ERROR => frames.push(Ok(json!({"error": "the host went away"}).to_string())),
        _ => {}
    }
    // Between frames the server gets to flush what it has.
    let frames = stream::iter(frames).then(|frame| async {
        tokio::task::yield_now().await;
        frame
    });
    let body = match query.tail {
        ENDLESS => Body::from_stream(frames.chain(stream::pending())),
        _ => Body::from_stream(frames),
    };
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

#[tokio::test]
async fn streams_end_well_or_say_how_they_ended() {
    let server = Server::start(Router::new().route("/v1/containers/shop/db-1/logs", get(log_stream)));
    for tail in [0, BROKEN, TOO_LONG, ERROR] {
        let mut lines = server.client().logs(&name(), Some(tail), true).await.unwrap();
        assert_eq!(lines.next().await.unwrap().unwrap().text, "one");
        let two = lines.next().await.unwrap().unwrap();
        assert_eq!((two.text.as_str(), two.stream), ("two", LogStream::Stdout));
        match (tail, lines.next().await) {
            (0, None) => {}
            (BROKEN, Some(Err(ClientError::Broken { .. }))) => {}
            (TOO_LONG, Some(Err(ClientError::Protocol { what }))) => assert!(what.contains("more than"), "{what}"),
            (ERROR, Some(Err(ClientError::Api { body, .. }))) => assert_eq!(body.error, "the host went away"),
            (_, other) => panic!("{tail}: {other:?}"),
        }
        assert!(lines.next().await.is_none(), "nothing comes after the end");
    }
    // A stream that goes on gives its values without waiting for its end, and may be dropped.
    let mut lines = server.client().logs(&name(), Some(ENDLESS), true).await.unwrap();
    lines.next().await.unwrap().unwrap();
    lines.next().await.unwrap().unwrap();
    drop(lines);
}

/// A container whose program writes back its input, its sizes, and ends with 3 at the end of its input.
async fn echo_session(mut socket: WebSocket) {
    let text = |control: &ExecControl| Message::Text(serde_json::to_string(control).unwrap().into());
    while let Some(Ok(message)) = socket.recv().await {
        match message {
            Message::Text(control) => match serde_json::from_str(&control).unwrap() {
                ExecControl::Start { request } if request.argv == ["break"] => return,
                ExecControl::Start { request } if request.argv == ["close"] => {
                    socket.send(Message::Close(None)).await.unwrap();
                }
                ExecControl::Start { request } if request.argv == ["missing"] => {
                    let message = "no such program: missing".to_owned();
                    socket.send(text(&ExecControl::Error { message })).await.unwrap();
                }
                ExecControl::Start { request } => {
                    let line = [b"\x02".as_slice(), request.argv.join(" ").as_bytes()].concat();
                    socket.send(Message::Binary(line.into())).await.unwrap();
                }
                ExecControl::Resize { size } => {
                    let line = format!("\x01{}x{}", size.columns, size.rows);
                    socket.send(Message::Binary(line.into_bytes().into())).await.unwrap();
                }
                other => panic!("{other:?}"),
            },
            Message::Binary(bytes) if bytes.as_ref() == b"\0" => {
                socket.send(text(&ExecControl::Exit { code: 3 })).await.unwrap();
            }
            Message::Binary(bytes) => {
                let mut back = bytes.to_vec();
                back[0] = 1;
                socket.send(Message::Binary(back.into())).await.unwrap();
            }
            _ => {}
        }
    }
}

fn exec_server() -> Server {
    let upgrade = |ws: WebSocketUpgrade| async { ws.on_upgrade(echo_session) };
    let refuse = || async { (StatusCode::CONFLICT, axum::Json(ErrorBody::new("shop/db-2 is stopped"))) };
    Server::start(
        Router::new()
            .route("/v1/containers/shop/db-1/exec", get(upgrade))
            .route("/v1/containers/shop/db-2/exec", get(refuse)),
    )
}

fn run(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|a| (*a).to_owned()).collect(),
        environment: Vec::new(),
        working_dir: None,
        user: None,
        terminal: None,
    }
}

#[tokio::test]
async fn a_session_carries_input_output_size_and_exit_code() {
    let server = exec_server();
    let (mut sender, mut receiver) = server.client().exec(&name(), run(&["cat", "-"])).await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some(ExecOutput::Stderr("cat -".into())));
    sender.stdin(b"").await.unwrap();
    sender.stdin(b"hello").await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some(ExecOutput::Stdout("hello".into())));
    sender.resize(TerminalSize { rows: 24, columns: 80 }).await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some(ExecOutput::Stdout("80x24".into())));
    // More than one message's worth arrives whole and in order.
    let large: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    sender.stdin(&large).await.unwrap();
    let mut back = Vec::new();
    while back.len() < large.len() {
        match receiver.next().await.unwrap() {
            Some(ExecOutput::Stdout(bytes)) => back.extend_from_slice(&bytes),
            other => panic!("{other:?}"),
        }
    }
    assert!(back == large);
    sender.close_stdin().await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some(ExecOutput::Exit(3)));
    assert_eq!(receiver.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_session_that_fails_says_how() {
    let server = exec_server();
    let (_sender, mut receiver) = server.client().exec(&name(), run(&["missing"])).await.unwrap();
    assert_eq!(receiver.next().await.unwrap_err().to_string(), "no such program: missing");

    let (_sender, mut receiver) = server.client().exec(&name(), run(&["break"])).await.unwrap();
    assert!(matches!(receiver.next().await.unwrap_err(), ClientError::Broken { .. }));

    let (_sender, mut receiver) = server.client().exec(&name(), run(&["close"])).await.unwrap();
    assert!(receiver.next().await.unwrap_err().to_string().contains("without an exit code"));

    let refused = server.client().exec(&"shop/db-2".parse().unwrap(), run(&["true"])).await;
    match refused.map(|_| ()).unwrap_err() {
        ClientError::Api { status, body } => {
            assert_eq!((status, body.error.as_str()), (StatusCode::CONFLICT, "shop/db-2 is stopped"));
        }
        other => panic!("{other:?}"),
    }
}

/// A controller that takes the connection and goes away is told from one that was never there.
#[tokio::test]
async fn a_connection_that_closes_at_once_is_broken() {
    let directory = tempfile::tempdir().unwrap();
    let path: &Path = &directory.path().join("api.sock");
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
        }
    });
    let error = Client::new(Address::Unix(path.to_owned())).version().await.map(|_: VersionView| ()).unwrap_err();
    assert!(matches!(error, ClientError::Broken { .. }), "{error:?}");
}
