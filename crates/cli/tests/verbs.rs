//! What each verb says, by the real binary, beside a controller that answers with fixed values.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::{Controller, DONE, code, output, show};

macro_rules! shows {
    ($controller:expr, $name:literal, $args:expr) => {
        insta::assert_snapshot!($name, $controller.shown(&$args));
    };
}

#[test]
fn tables() {
    let c = Controller::start();
    shows!(c, "ps", ["ps"]);
    shows!(c, "explain", ["explain", "shop/db"]);
    shows!(c, "explain-waiting", ["explain", "shop/web-2"]);
    shows!(c, "host-list", ["host", "list"]);
    shows!(c, "host-show", ["host", "show", "h1"]);
    shows!(c, "host-show-unknown", ["host", "show", "h7"]);
    shows!(c, "env-list", ["env", "list"]);
    shows!(c, "env-show", ["env", "show", "shop"]);
    shows!(c, "env-show-unknown", ["env", "show", "shed"]);
    shows!(c, "move-list", ["move", "list"]);
    shows!(c, "move-show-done", ["move", "show", DONE]);
    shows!(c, "move-show-failed", ["move", "show", support::FAILED]);
    shows!(c, "balance-show", ["balance", "show"]);
    shows!(c, "version", ["version"]);
    shows!(c, "events", ["events"]);
    shows!(c, "events-since", ["events", "--since", "1", "--output", "json"]);
    shows!(c, "logs", ["logs", "shop/db", "--tail", "2"]);
    shows!(c, "logs-timestamps", ["logs", "shop/db-1", "--tail", "1", "--timestamps"]);
    shows!(c, "logs-json", ["logs", "shop/db-1", "--tail", "1", "--output", "json"]);
}

#[test]
fn what_would_happen() {
    let c = Controller::start();
    shows!(c, "plan-evacuate", ["plan", "evacuate", "h1", "--parallel", "4"]);
    shows!(c, "plan-fail", ["plan", "fail", "h1"]);
    shows!(c, "plan-fail-json", ["plan", "fail", "h1", "--output", "json"]);
    shows!(c, "plan-rebalance", ["plan", "rebalance"]);
    shows!(c, "migrate-dry-run", ["migrate", "shop/db-1", "--dry-run"]);
    shows!(c, "migrate-dry-run-refused", ["migrate", "shop/db-1", "--to", "h9", "--dry-run"]);
}

#[test]
fn tables_fit_eighty_columns() {
    let c = Controller::start();
    for args in [vec!["ps"], vec!["host", "list"], vec!["env", "list"], vec!["move", "list"]] {
        let text = String::from_utf8(c.run(&args).stdout).unwrap();
        // Lines below the table are sentences.
        for line in text.lines().take_while(|line| !line.is_empty()) {
            assert!(line.chars().count() <= 80, "{args:?} has {} columns: {line}", line.chars().count());
        }
    }
}

#[test]
fn json_is_the_api_s_own() {
    let c = Controller::start();
    let json = |args: &[&str]| -> Value {
        let output = c.run(&[args, &["--output", "json"]].concat());
        assert_eq!((code(&output), output.stderr.as_slice()), (0, b"".as_slice()), "{args:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(json(&["ps"])[0]["status"]["memory"], 1_149_000_000u64);
    assert_eq!(json(&["host", "list"])[1]["name"], "h2");
    assert_eq!(json(&["env", "show", "shop"])["vni"], 4097);
    assert_eq!(json(&["move", "show", DONE])["summary"]["downtime_ms"], 87.26);
    let explained = json(&["explain", "shop/db-1"]);
    assert_eq!(explained["container"]["status"]["movable"]["because"], serde_json::json!([]));
    assert_eq!(explained["host"]["facts"]["written_pages"]["way"], "tracked");
    assert_eq!(explained["moves"][0]["summary"]["downtime_ms"], 87.26);
    assert_eq!(explained["events"][0]["message"], "on h1");
    assert_eq!(json(&["balance", "show"])["advice"]["moves"][1]["step"]["after"], serde_json::json!([0]));
    assert_eq!(json(&["balance", "off", "--threshold", "80%", "--quiet"])["policy"]["cpu_threshold_permille"], 800);
    assert_eq!(json(&["balance", "now", "--detach"])["moves"][0]["gain"], 1);
    assert_eq!(explained["placement"]["hosts"]["fitting"][0]["score"]["of_layer"], 1);
    assert_eq!(json(&["migrate", "shop/db-1", "--dry-run"])["to"], "h2");
    assert_eq!(json(&["plan", "evacuate", "h1"])["steps"][0]["how"], "live");
    assert_eq!(json(&["version"])["controller"]["store_id"], "5a5a");
    assert_eq!(json(&["stop", "shop/db-1"])["name"], "shop/db-1");
}

#[test]
fn names_of_containers() {
    let c = Controller::start();
    shows!(c, "name-of-a-layer-with-two", ["stop", "shop/web"]);
    shows!(c, "name-of-no-layer", ["stop", "shop/cache"]);
    shows!(c, "name-without-environment", ["stop", "db-1"]);
    shows!(c, "stop", ["stop", "shop/db"]);
    shows!(c, "start", ["start", "shop/db-1"]);
    shows!(c, "rm", ["rm", "shop/db-1", "--yes"]);
    shows!(c, "rm-unasked", ["rm", "shop/db-1"]);
}

#[test]
fn environments_are_applied_and_deleted() {
    let c = Controller::start();
    let file = c.directory.path().join("compose.yaml");
    std::fs::write(&file, "name: shop\nservices:\n  db:\n    image: oci:/srv/images/${IMAGE}\n").unwrap();
    let file = file.to_str().unwrap();
    shows!(c, "apply-without-variable", ["env", "apply", "-f", file]);
    let with = ["env", "apply", "-f", file, "--var", "IMAGE=redis"];
    shows!(c, "apply-dry-run", [&with[..], &["--dry-run"]].concat());
    shows!(c, "apply", with);
    shows!(c, "apply-again", with);
    shows!(c, "apply-wait", [&with[..], &["--name", "calm", "--wait"]].concat());
    shows!(c, "apply-wait-too-long", [&with[..], &["--wait", "--timeout", "0s"]].concat());
    shows!(c, "env-delete", ["env", "delete", "shop", "-y"]);
    shows!(c, "env-delete-unasked", ["env", "delete", "shop"]);
    shows!(c, "apply-missing-file", ["env", "apply", "-f", "/no/such/file.yaml"]);

    let bad = c.directory.path().join("bad.yaml");
    std::fs::write(&bad, "name: shop\nservices:\n  db:\n    image: x\n    imag: y\n    replicas: two\n").unwrap();
    shows!(c, "apply-bad-file", ["env", "apply", "-f", bad.to_str().unwrap()]);

    let mut command = c.godwit(&["env", "apply", "-f", "-", "--dry-run", "--name", "shop"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"services: {db: {imag: x}}").unwrap();
    insta::assert_snapshot!("apply-bad-stdin", show(&child.wait_with_output().unwrap(), ""));
}

#[test]
fn balance_is_changed_and_carried_out() {
    let c = Controller::start();
    shows!(c, "balance-automatic", ["balance", "automatic", "--threshold", "80", "--rest", "1h", "--at-once", "3"]);
    shows!(c, "balance-now", ["balance", "now"]);
    shows!(c, "balance-bad-percent", ["balance", "advise", "--least-gain", "200%"]);
}

#[test]
fn a_move_is_watched_to_its_end() {
    let c = Controller::start();
    shows!(c, "migrate", ["migrate", "shop/db"]);
    shows!(c, "migrate-quiet", ["migrate", "shop/db", "--quiet"]);
    shows!(c, "migrate-detach", ["migrate", "shop/db-1", "--to", "h2", "--detach"]);
    shows!(c, "migrate-refused", ["migrate", "shop/db-1", "--to", "h9"]);
    shows!(c, "migrate-failed", ["migrate", "shop/db-1", "--to", "h8"]);
    let output = c.run(&["migrate", "shop/db-1", "--to", "h8", "--output", "json"]);
    assert_eq!(code(&output), 1);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["outcome"]["reason"], "h2 went away");
}

#[test]
fn ctrl_c_cancels_a_move() {
    let c = Controller::start();
    let mut command = c.godwit(&["migrate", "shop/db-1", "--to", "h7"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut talk = BufReader::new(child.stderr.take().unwrap());
    let mut all = String::new();
    while !all.contains("copy") {
        assert_ne!(talk.read_line(&mut all).unwrap(), 0, "{all}");
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    talk.read_to_string(&mut all).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{all}");
    assert!(all.contains("cancelling"), "{all}");
    assert!(all.contains("error: shop/db-1 was not moved to h2: copy: cancelled by a person"), "{all}");
    assert!(all.contains("hint: it runs on, on h1"), "{all}");
}

#[test]
fn programs_run_in_containers() {
    let c = Controller::start();
    for exit in [0, 7, 137] {
        let output = c.run(&["exec", "shop/db-1", "--", "exit", &exit.to_string()]);
        assert_eq!((code(&output), output.stderr.as_slice()), (exit, b"".as_slice()));
    }
    // Options after the program are the program's.
    assert_eq!(code(&c.run(&["exec", "shop/db", "--", "exit", "3"])), 3);
    assert_eq!(
        show(&c.run(&["exec", "shop/db-1", "--", "cat", "-v"]), ""),
        "exit: 0\n--- stdout\n--- stderr\nready\r\n"
    );

    let mut command = c.godwit(&["exec", "-i", "shop/db-1", "--", "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let large = "0123456789abcdef".repeat(20_000);
    let (mut stdin, text) = (child.stdin.take().unwrap(), large.clone());
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert_eq!(code(&output), 0);
    assert!(output.stdout == large.as_bytes(), "{} bytes came back", output.stdout.len());

    shows!(c, "exec-no-terminal", ["exec", "-it", "shop/db-1", "--", "sh"]);
    let lines = String::from_utf8(c.run(&["exec", "-t", "shop/db-1", "--", "size"]).stdout);
    assert_eq!(lines.unwrap(), "{\"columns\":80,\"rows\":24}\r\n");
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let c = Controller::start();
    let mut command = c.godwit(&["logs", "--follow", "shop/db-1"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    {
        let mut lines = BufReader::with_capacity(64, child.stdout.take().unwrap());
        lines.read_line(&mut first).unwrap();
    }
    assert_eq!(first, "line 1\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), output.stderr.as_slice()), (0, b"".as_slice()));
}

#[test]
fn the_controller_is_found_by_flag_and_variable() {
    let c = Controller::start();
    let mut by_variable = support::godwit(&["host", "list", "--output", "json"]);
    by_variable.env("GODWIT_CONTROLLER", c.address());
    assert_eq!(code(&output(by_variable)), 0);
    let mut flag_wins = c.godwit(&["host", "list", "--output", "json"]);
    flag_wins.env("GODWIT_CONTROLLER", "unix:/no/such/socket").env("GODWIT_LAB", "no-such-lab");
    assert_eq!(code(&output(flag_wins)), 0);
}
