//! A controller that answers as the API says, from values of this page, and the real binary beside it.
#![allow(dead_code, reason = "each test file uses its part")]

mod balance;
mod plans;
mod session;

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::watch;

/// How long a run of the binary may take, in seconds.
const TIMEOUT_S: u64 = 20;

pub struct Controller {
    pub directory: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Clone)]
struct Shared {
    applied: Arc<AtomicU32>,
    cancelled: watch::Sender<bool>,
}

impl Controller {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let path = directory.path().join("api.sock");
        let shared = Shared { applied: Arc::default(), cancelled: watch::Sender::new(false) };
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(path).unwrap() });
        runtime.spawn(async move { axum::serve(listener, router(shared)).await });
        Self { directory, _runtime: runtime }
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    /// The binary with these arguments and this controller.
    pub fn godwit(&self, args: &[&str]) -> Command {
        let mut command = godwit(args);
        command.args(["--controller", &self.address()]);
        // What follows the verb's `--` is not ours: put the address first there.
        if args.contains(&"--") {
            command = godwit(&[&["--controller", &self.address()], args].concat());
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        output(self.godwit(args))
    }

    /// What [`show`] says of a run.
    pub fn shown(&self, args: &[&str]) -> String {
        show(&self.run(args), &self.directory.path().display().to_string())
    }
}

/// The binary, without what this process's surroundings would tell it.
pub fn godwit(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("GODWIT_") {
            command.env_remove(name);
        }
    }
    command.args(args).env("TZ", "UTC").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// Runs to the end; a run that hangs is killed and fails the test.
pub fn output(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let (done, ended) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || {
        let output = child.wait_with_output();
        let _ = done.send(());
        output
    });
    if ended.recv_timeout(Duration::from_secs(TIMEOUT_S)).is_err() {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        panic!("{command:?} ran for more than {TIMEOUT_S} s");
    }
    waiter.join().unwrap().unwrap()
}

/// Exit code, standard output and standard error, for snapshots; `directory`, if any, by another name.
pub fn show(output: &Output, directory: &str) -> String {
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        if directory.is_empty() { text } else { text.replace(directory, "[DIR]") }
    };
    format!("exit: {}\n--- stdout\n{}--- stderr\n{}", code(output), text(&output.stdout), text(&output.stderr))
}

pub fn code(output: &Output) -> i32 {
    output.status.code().expect("ended by a signal")
}

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/v1/version", get(|| async { Json(json!({"version": "0.1.0", "store_id": "5a5a"})) }))
        .route("/v1/hosts", get(|| async { Json(json!([host("h1", true), host("h2", false)])) }))
        .route("/v1/environments", get(|| async { Json(json!([environment()])) }))
        .route("/v1/environments/{env}", get(one_environment).put(apply).delete(delete))
        .route("/v1/containers", get(|| async { Json(containers()) }))
        .route("/v1/containers/{env}/{name}", get(one_container).delete(one_container))
        .route("/v1/containers/{env}/{name}/stop", post(one_container))
        .route("/v1/containers/{env}/{name}/start", post(one_container))
        .route("/v1/containers/{env}/{name}/migrate", post(migrate))
        .route("/v1/containers/{env}/{name}/plan-move", post(plans::plan_move))
        .route("/v1/containers/{env}/{name}/placement", get(plans::placement))
        .route("/v1/hosts/{host}/evacuate", post(plans::evacuate))
        .route("/v1/plans/fail/{host}", get(|| async { Json(plans::lost()) }))
        .route("/v1/plans/rebalance", get(|| async { Json(json!({"moves": [], "more": false})) }))
        .route("/v1/containers/{env}/{name}/logs", get(logs))
        .route(
            "/v1/containers/{env}/{name}/exec",
            get(|ws: WebSocketUpgrade| async { ws.on_upgrade(session::session) }),
        )
        .route("/v1/moves", get(|| async { Json(json!([moved(DONE), moved(FAILED)])) }))
        .route("/v1/moves/{id}", get(one_move))
        .route("/v1/moves/{id}/cancel", post(cancel))
        .route("/v1/moves/{id}/watch", get(watch_move))
        .route("/v1/events", get(events))
        .route("/v1/balance", get(|| async { Json(balance::view("advise", 850)) }).put(balance::change))
        .route("/v1/balance/now", post(balance::now))
        .with_state(shared)
}

fn refused(status: StatusCode, error: &str, cause: &str, hint: &str) -> Response {
    (status, Json(json!({"error": error, "causes": [cause], "hint": hint}))).into_response()
}

fn host(name: &str, connected: bool) -> Value {
    json!({
        "name": name, "state": "active", "connected": connected, "last_seen_ms": connected.then(now_ms),
        "facts": {
            "name": name, "godwit_version": "0.1.0", "kernel": "6.12.41+deb13-amd64", "architecture": "x86_64",
            "criu": connected.then_some("4.1.1"), "cpu_features": ["avx2", "sse4_2"], "cpu_model": "AMD EPYC 7B13",
            "cpus": 4000, "cpu_mhz": 2450, "memory": 8u64 << 30, "disk_free": 100u64 << 30,
            "tunnel_address": "192.168.77.11", "migration_address": "192.168.77.11:7718", "certificate_sha256": "ab12",
            "written_pages": {"way": "tracked"}, "labels": {"zone": if connected { "east" } else { "west" }, "disk": "ssd"}
        },
        "containers": 3, "reserved_memory": 3u64 << 29, "reserved_cpu": 1500, "cloudlets": 61
    })
}

fn container(name: &str, state: &str, more: Value) -> Value {
    let running = state == "running";
    let mut view = json!({
        "id": "0123456789ab", "name": format!("shop/{name}"), "image": "oci:/srv/images/redis", "address": "10.64.16.2",
        "host": "h1", "generation": 3, "state": state, "message": null, "health": running.then_some("healthy"),
        "wanted_running": true, "moving": null,
        "resources": {"memory": null, "cpu": null, "pids": null, "reserved_memory": 0, "reserved_cpu": 0},
        "status": {
            "id": "0123456789ab", "name": format!("shop/{name}"), "generation": 3,
            "state": if running { "running" } else { "failed" }, "message": null, "health": null,
            "pid": running.then_some(77), "started_at_ms": now_ms() - 3 * 3_600_000 - 1_830_000, "restarts": 0,
            "exit": null, "memory": 1_149_000_000u64, "cpu_usec": 5, "movable": {"because": []}, "image_digest": null
        }
    });
    merge(&mut view, more);
    view
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            from.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, from) => *into = from,
    }
}

fn containers() -> Value {
    let fixed =
        json!({"address": "10.64.16.3", "status": {"movable": {"because": ["it mounts /srv/www of its host"]}}});
    let waiting = json!({"host": null, "address": "10.64.16.4", "message": "no host has 4 GiB free", "status": null});
    json!([
        container("db-1", "running", json!({})),
        container("web-1", "running", fixed),
        container("web-2", "waiting", waiting),
    ])
}

fn environment() -> Value {
    json!({
        "name": "shop", "manifest": {"name": "shop", "layers": {}}, "vni": 4097, "subnet": "10.64.16.0/20",
        "layers": [
            {"name": "db", "image": "oci:/srv/images/redis", "wanted": 1, "running": 1, "ports": []},
            {"name": "web", "image": "oci:/srv/images/nginx", "wanted": 2, "running": 1, "ports": ["8080:80/tcp"]}
        ],
        "containers": containers()
    })
}

async fn one_environment(Path(env): Path<String>) -> Response {
    match env.as_str() {
        "shop" => Json(environment()).into_response(),
        "calm" => {
            let mut env = environment();
            env["layers"] = json!([env["layers"][0]]);
            env["containers"] = json!([container("db-1", "running", json!({}))]);
            Json(env).into_response()
        }
        other => {
            let error = format!("there is no environment {other}");
            refused(StatusCode::NOT_FOUND, &error, "the store has shop", "`godwit env list` shows all")
        }
    }
}

/// The second time nothing changes.
async fn apply(State(shared): State<Shared>, Json(request): Json<Value>) -> Json<Value> {
    let first = shared.applied.fetch_add(u32::from(request["dry_run"] == false), Ordering::SeqCst) == 0;
    let names = request["manifest"]["layers"].as_object().unwrap().keys();
    let changes: Vec<String> = names.map(|layer| format!("layer {layer} is new")).collect();
    let mut answer = json!({"changes": if first { changes } else { Vec::new() }, "revision": 12});
    if request["dry_run"] == true {
        let reasons = json!(["1.50 GiB of memory is free there"]);
        answer["places"] = json!([
            {"container": "shop/db-1", "host": "h1", "reasons": reasons},
            {"container": "shop/web-1", "host": null, "reasons": ["no host can take it: h1: it has no label disk=ssd"]}
        ]);
        answer["warnings"] = json!(["web: it needs a host with disk=ssd, and none is taking containers now"]);
    }
    Json(answer)
}

async fn delete() -> Json<Value> {
    Json(json!({"changes": ["3 containers go away"], "revision": 13}))
}

async fn one_container(Path((_, name)): Path<(String, String)>) -> Json<Value> {
    match name.as_str() {
        "web-2" => Json(containers()[2].clone()),
        name => Json(container(name, "running", json!({}))),
    }
}

/// Ids of moves, by how they end.
pub const DONE: &str = "d0d0d0d0d0d0";
pub const FAILED: &str = "fafafafafafa";
pub const SLOW: &str = "505050505050";

async fn one_move(Path(id): Path<String>) -> Json<Value> {
    let mut value = moved(&id);
    value["requested_at_ms"] = 1_764_000_000_000u64.into();
    Json(value)
}

fn moved(id: &str) -> Value {
    let mut value = json!({
        "id": id, "container": "0123456789ab", "name": "shop/db-1", "from": "h1", "to": "h2", "generation": 3,
        "requested_at_ms": now_ms() - 3 * 3_600_000 - 1_830_000, "finished_at_ms": null, "phase": "check",
        "outcome": {"state": "moving"}, "progress": {"bytes_sent": 0, "bytes_total": 0, "rounds": 0}, "summary": null
    });
    match id {
        DONE => merge(
            &mut value,
            json!({
                "phase": "release", "outcome": {"state": "done"},
                "summary": {
                    "total_ms": 4213.4, "downtime_ms": 87.26,
                    "downtime_parts": {"freeze": 2.1, "dump": 38.0, "transfer": 5.06, "restore": 36.0, "hand-over": 4.0,
                        "activate": 2.1},
                    "bytes_sent": 1_170_000_000u64, "memory_bytes": 1_149_000_000u64, "file_bytes": 21_000_000u64,
                    "rounds": 3, "frames_parked": 12
                }
            }),
        ),
        FAILED => merge(
            &mut value,
            json!({
                "phase": "copy", "progress": {"bytes_sent": 500 << 20, "bytes_total": 1_149_000_000u64, "rounds": 1},
                "outcome": {"state": "failed", "phase": "copy", "reason": "h2 went away"}
            }),
        ),
        _ => {}
    }
    value
}

async fn migrate(Json(request): Json<Value>) -> Response {
    match request["to"].as_str() {
        Some("h9") => refused(
            StatusCode::CONFLICT,
            "shop/db-1 cannot move to h9",
            "h9 runs kernel 5.10, h1 6.12",
            "`godwit host list` shows all hosts",
        ),
        Some("h8") => begun(FAILED),
        Some("h7") => begun(SLOW),
        _ => begun(DONE),
    }
}

fn begun(id: &str) -> Response {
    let mut value = moved(SLOW);
    value["id"] = id.into();
    Json(value).into_response()
}

/// Lines: check, two looks at the copy, the freeze, the end; a slow one waits in its copy until it is cancelled.
async fn watch_move(State(shared): State<Shared>, Path(id): Path<String>) -> Body {
    let total = 1_149_000_000u64;
    let step = |phase: &str, sent: u64, rounds: u32| {
        let mut value = moved(SLOW);
        let progress = json!({"bytes_sent": sent, "bytes_total": total, "rounds": rounds});
        merge(&mut value, json!({"id": id, "phase": phase, "progress": progress}));
        Ok::<_, Infallible>(format!("{value}\n"))
    };
    let steps =
        vec![step("prepare", 0, 0), step("copy", 300 << 20, 1), step("copy", total, 2), step("freeze", total, 3)];
    let end = match id.as_str() {
        SLOW => {
            let mut end = moved(FAILED);
            merge(&mut end, json!({"id": SLOW, "outcome": {"reason": "cancelled by a person"}}));
            end
        }
        other => moved(other),
    };
    if id == SLOW {
        let mut cancelled = shared.cancelled.subscribe();
        let end = async move {
            cancelled.wait_for(|yes| *yes).await.unwrap();
            Ok::<_, Infallible>(format!("{end}\n"))
        };
        let steps = futures_util::stream::iter(steps.into_iter().take(2));
        return Body::from_stream(steps.chain(futures_util::stream::once(end)));
    }
    Body::from_stream(futures_util::stream::iter(steps.into_iter().chain([Ok(format!("{end}\n"))])))
}

async fn cancel(State(shared): State<Shared>, Path(id): Path<String>) -> Json<Value> {
    shared.cancelled.send_replace(true);
    Json(moved(&id))
}

#[derive(serde::Deserialize)]
struct StreamQuery {
    follow: bool,
    tail: Option<usize>,
    since: Option<u64>,
}

/// With `follow` the stream stays open, as a real one does.
fn stream(lines: Vec<String>, follow: bool) -> Body {
    let lines = futures_util::stream::iter(lines.into_iter().map(|line| Ok::<_, Infallible>(line + "\n")));
    if follow { Body::from_stream(lines.chain(futures_util::stream::pending())) } else { Body::from_stream(lines) }
}

async fn logs(Query(query): Query<StreamQuery>) -> Body {
    let line = |n: u64| json!({"at_ms": 1_764_000_000_000u64 + n, "stream": "stdout", "text": format!("line {n}")});
    let lines: Vec<String> = (1..=1000).map(|n| line(n).to_string()).collect();
    let first = lines.len() - query.tail.unwrap_or(lines.len());
    stream(lines[first..].to_vec(), query.follow)
}

async fn events(Query(query): Query<StreamQuery>) -> Body {
    let event = |number: u64, kind: &str, message: &str| {
        json!({
            "number": number, "at_ms": 1_764_000_000_000u64, "kind": kind, "env": "shop",
            "container": (kind != "env-applied").then_some("shop/db-1"), "host": null, "message": message
        })
    };
    let all = [event(1, "env-applied", "2 layers are new"), event(2, "container-started", "on h1")];
    let done = query.follow.then(|| event(3, "balance-done", "2 moves were made for balance"));
    let after = all.iter().chain(&done).filter(|e| e["number"].as_u64() > query.since);
    stream(after.map(ToString::to_string).collect(), query.follow)
}
