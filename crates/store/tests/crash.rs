//! What was acknowledged survives `kill -9`, and real file systems that are full or read-only.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod suite;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use godwit_store::{Op, Revision, SqliteStore, Store, Txn};

/// In the child's environment: the state file to write to.
const CHILD_FILE: &str = "GODWIT_STORE_TEST_FILE";

/// This test binary again, running only the test `name`.
fn again(name: &str) -> Vec<String> {
    let binary = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    [binary.as_str(), "--exact", name, "--nocapture", "--test-threads=1"].map(str::to_owned).to_vec()
}

/// Not a test of its own: what the killed child runs.
#[tokio::test(flavor = "multi_thread")]
async fn child_commits_until_killed() {
    let Some(path) = std::env::var_os(CHILD_FILE) else { return };
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(Path::new(&path)).unwrap());
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..1_000_000_u64 {
                    let ops =
                        vec![Op::put(format!("k/{task}"), n.to_string()), Op::put(format!("l/{task}"), n.to_string())];
                    let revision = suite::commit(&*store, ops).await;
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "\nack {task} {n} {revision}").unwrap();
                    out.flush().unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn acknowledged_commits_survive_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let mut acknowledged: u64 = 0;
    for round in 1..=3 {
        let command = again("child_commits_until_killed");
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .env(CHILD_FILE, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut last: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        let mut seen = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let Some(ack) = line.strip_prefix("ack ") else { continue };
            let mut words = ack.split(' ');
            let mut word = || words.next().map(str::to_owned);
            // The last line may be cut off by the kill.
            let (Some(task), Some(n), Some(revision)) = (word(), word(), word()) else { continue };
            let (Ok(n), Ok(revision)) = (n.parse::<u64>(), revision.parse::<u64>()) else { continue };
            last.insert(task, (n, revision));
            seen += 1;
            if seen == 400 * round {
                child.kill().unwrap();
            }
        }
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        assert!(seen >= 400 * round, "the child ended early");
        // The lock died with its holder.
        let store = SqliteStore::open(&path).unwrap();
        let listing = store.list("").await.unwrap();
        let value = |key: String| -> u64 {
            let entry = listing.entries.iter().find(|e| e.key == key).expect("key");
            String::from_utf8(entry.value.clone()).unwrap().parse().unwrap()
        };
        for (task, (n, revision)) in &last {
            acknowledged = acknowledged.max(*revision);
            let now = value(format!("k/{task}"));
            assert!(now >= *n, "task {task}: {n} was acknowledged, {now} is there");
            assert_eq!(now, value(format!("l/{task}")), "a transaction is there in part");
        }
        assert!(listing.revision >= Revision(acknowledged));
        // History tells the same story up to the last revision.
        let mut watch = store.watch("", Revision(acknowledged)).await.unwrap();
        assert_eq!(suite::next(&mut watch).await.unwrap().revision, Revision(acknowledged));
        store.commit(Txn::new(vec![Op::delete_prefix("")])).await.unwrap().committed().unwrap();
    }
}

/// Runs the test `name` of this binary in its own mount namespace, with a tmpfs of `size` on a fresh
/// directory and then `then` done to it. `None`: not root.
fn on_tmpfs(name: &str, size: &str, then: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    if !status.lines().any(|l| l.starts_with("Uid:") && l.split_whitespace().nth(2) == Some("0")) {
        println!("skipped: needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = format!("mount -t tmpfs -o size={size} none \"$DIR\" && cd \"$DIR\" && {then} exec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"])
        .args(again(name))
        .env("DIR", dir.path())
        .env(CHILD_FILE, dir.path().join("state.db"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
    Some(text)
}

fn child_file() -> Option<PathBuf> {
    std::env::var_os(CHILD_FILE).map(PathBuf::from)
}

/// Not a test of its own: runs on a file system of 1 MiB.
#[tokio::test]
async fn child_fills_the_disk() {
    let Some(path) = child_file() else { return };
    let store = SqliteStore::open(&path).unwrap();
    let mut committed = 0;
    let error = loop {
        assert!(committed < 100, "the disk never filled");
        match store.commit(Txn::new(vec![Op::put(format!("k/{committed}"), vec![7; 100_000])])).await {
            Ok(_) => committed += 1,
            Err(error) => break error,
        }
    };
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.starts_with("no space left for the state file ") && cause.contains("state.db"), "{cause}");
    assert_eq!(store.list("k/").await.unwrap().entries.len(), committed);
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.list("k/").await.unwrap().entries.len(), committed);
    println!("filled after {committed}");
}

#[test]
fn a_full_disk_is_reported_and_loses_nothing() {
    if let Some(text) = on_tmpfs("child_fills_the_disk", "2m", "") {
        assert!(text.contains("filled after "), "{text}");
    }
}

/// Not a test of its own: runs on a read-only file system that holds a state file.
#[tokio::test]
async fn child_opens_read_only() {
    let Some(path) = child_file() else { return };
    match SqliteStore::open(&path) {
        Ok(_) => println!("opened"),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            println!("refused: {error}: {cause}");
        }
    }
}

#[test]
fn a_read_only_disk_is_reported() {
    let make = "touch state.db state.db.lock; mount -o remount,ro none \"$DIR\";";
    if let Some(text) = on_tmpfs("child_opens_read_only", "2m", make) {
        assert!(text.contains("refused: ") && text.contains("Read-only file system"), "{text}");
        assert!(text.contains("state.db"), "{text}");
    }
}
