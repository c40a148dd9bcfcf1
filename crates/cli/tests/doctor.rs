//! `godwit doctor` on this machine, which can be a host, and where something is missing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use serde_json::Value;
use support::{code, godwit, output};

fn state(output: &Output, what: &str) -> String {
    let diagnosis: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = diagnosis["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["what"] == what).expect("every requirement is told of");
    check["state"].as_str().unwrap().to_owned()
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

#[test]
fn all_is_well_here_and_nothing_stays_behind() {
    if !is_root() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let child = godwit(&["doctor", "--state-dir", &base.path().join("state").display().to_string()]);
    let output = output(child);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(code(&output), 0, "{text}");
    assert!(!text.contains("not checked") && !text.contains("missing"), "{text}");
    assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("godwit-doctor"), "{mounts}");
}

#[test]
fn without_root_that_is_what_is_missing() {
    if !is_root() {
        return;
    }
    // Where another user may run it.
    let base = tempfile::tempdir().unwrap();
    std::fs::set_permissions(base.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let binary = base.path().join("godwit");
    std::fs::copy(env!("CARGO_BIN_EXE_godwit"), &binary).unwrap();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(binary);
    command.args(["doctor", "--output", "json"]);
    let output = output(command);
    assert_eq!(code(&output), 1);
    assert_eq!(state(&output, "root"), "missing");
    assert_eq!(state(&output, "veth"), "not-checked");
}

#[test]
fn an_old_criu_is_too_old() {
    let base = tempfile::tempdir().unwrap();
    let criu = base.path().join("criu");
    std::fs::write(&criu, "#!/bin/sh\necho 'Version: 3.17.1'\n").unwrap();
    std::fs::set_permissions(&criu, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = godwit(&["doctor", "--output", "json"]);
    command.env("GODWIT_CRIU", &criu);
    let output = output(command);
    assert_eq!(code(&output), 1);
    assert_eq!(state(&output, "CRIU >= 4.1"), "too-old");
    assert_eq!(state(&output, "criu check"), "not-checked");
}
