//! The embedded backend: what every backend must do, and what is its own.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod suite;

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_store::{
    CommitError, Compare, Op, OpenError, Options, Revision, SqliteStore, Store, StoreFault, Txn, Typed, TypedChange,
    TypedError, WatchError,
};
use serde::{Deserialize, Serialize};
use suite::{commit, line, next, put};

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path).expect("open")
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let dir = tempfile::tempdir().unwrap();
    suite::conformance(Arc::new(open(&dir.path().join("deep/state.db")))).await;
}

#[tokio::test]
async fn watch_goes_on_across_a_restart_and_counters_do_not_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = open(&path);
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    put(&store, "a", "1").await;
    commit(&store, vec![Op::delete("a")]).await;
    let mut watch = store.watch("", Revision(1)).await.unwrap();
    assert_eq!(line(&next(&mut watch).await.unwrap()), "1 put a=1");
    drop(store);
    // What was read ahead may still come, then the end.
    assert_eq!(line(&next(&mut watch).await.unwrap()), "2 delete a (1)");
    assert!(matches!(next(&mut watch).await, Err(WatchError::Fault(StoreFault::Closed))));

    let store = open(&path);
    put(&store, "b", "2").await;
    let mut watch = store.watch("", Revision(2)).await.unwrap();
    assert_eq!(line(&next(&mut watch).await.unwrap()), "2 delete a (1)");
    assert_eq!(line(&next(&mut watch).await.unwrap()), "3 put b=2");
    assert!(store.lease_grant(Duration::from_secs(60)).await.unwrap() > lease);
}

#[tokio::test]
async fn a_lease_has_its_full_time_after_a_restart_and_then_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = open(&path);
    let lease = store.lease_grant(Duration::from_millis(1500)).await.unwrap();
    commit(&store, vec![Op::put_leased("host", "up", lease)]).await;
    drop(store);
    let opened = std::time::Instant::now();
    let store = open(&path);
    let mut watch = store.watch("", Revision(2)).await.unwrap();
    assert_eq!(line(&next(&mut watch).await.unwrap()), "2 delete host (1)");
    assert!(opened.elapsed() >= Duration::from_millis(1400), "{:?}", opened.elapsed());
}

#[tokio::test]
async fn a_slow_watch_ends_as_lagged_after_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { watch_buffer_revisions: 4, ..Options::default() };
    let store = SqliteStore::open_with(&dir.path().join("state.db"), options).unwrap();
    let mut slow = store.watch("k", Revision(1)).await.unwrap();
    let mut elsewhere = store.watch("other", Revision(1)).await.unwrap();
    for n in 0..10 {
        put(&store, "k", &n.to_string()).await;
    }
    for n in 0..4 {
        assert_eq!(line(&next(&mut slow).await.unwrap()), format!("{} put k={n}", n + 1));
    }
    for _ in 0..2 {
        let end = next(&mut slow).await;
        assert!(matches!(end, Err(WatchError::Lagged { .. })), "{end:?}");
    }
    put(&store, "other", "x").await;
    assert_eq!(line(&next(&mut elsewhere).await.unwrap()), "11 put other=x");
}

#[tokio::test]
async fn history_is_bounded_and_a_long_replay_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { history_revisions: 400, ..Options::default() };
    let store = SqliteStore::open_with(&dir.path().join("state.db"), options).unwrap();
    for n in 1..=1000_u64 {
        commit(&store, vec![Op::put("k", n.to_string()), Op::put("l", n.to_string())]).await;
    }
    let oldest = match store.watch("", Revision(1)).await {
        Err(WatchError::Compacted { oldest, .. }) => oldest,
        other => panic!("history was not trimmed: {other:?}"),
    };
    assert!((550..=601).contains(&oldest.0), "{oldest}");
    let mut watch = store.watch("", oldest).await.unwrap();
    for n in oldest.0..=1000 {
        assert_eq!(line(&next(&mut watch).await.unwrap()), format!("{n} put k={n}"));
        assert_eq!(line(&next(&mut watch).await.unwrap()), format!("{n} put l={n}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_opened_amid_commits_has_no_gap_and_no_duplicate() {
    const COMMITS: u64 = 600;
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(open(&dir.path().join("state.db")));
    let writers: Vec<_> = (0..6)
        .map(|w| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..COMMITS / 6 {
                    put(&*store, &format!("k/{w}"), &n.to_string()).await;
                }
            })
        })
        .collect();
    let watchers: Vec<_> = (0..20)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let listing = store.list("k/").await.unwrap();
                let mut watch = store.watch("k/", Revision(listing.revision.0 / 2 + 1)).await.unwrap();
                for revision in listing.revision.0 / 2 + 1..=COMMITS {
                    assert_eq!(next(&mut watch).await.unwrap().revision, Revision(revision));
                }
            })
        })
        .collect();
    for task in writers.into_iter().chain(watchers) {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn a_file_belongs_to_one_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = open(&path);
    let second = SqliteStore::open(&path).expect_err("in use");
    assert!(matches!(&second, OpenError::InUse { pid, .. } if *pid == std::process::id().to_string()), "{second:?}");
    assert!(second.to_string().contains(&format!("in use by process {}", std::process::id())), "{second}");
    drop(store);
    drop(open(&path));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn other_files_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("notes");
    std::fs::write(&text, "some notes, long enough to be no empty database ".repeat(50)).unwrap();
    let before = std::fs::read(&text).unwrap();
    assert!(matches!(SqliteStore::open(&text), Err(OpenError::Foreign { .. })));
    assert_eq!(std::fs::read(&text).unwrap(), before);

    let foreign = dir.path().join("foreign.db");
    let other = rusqlite::Connection::open(&foreign).unwrap();
    other.execute_batch("CREATE TABLE t (a)").unwrap();
    drop(other);
    assert!(matches!(SqliteStore::open(&foreign), Err(OpenError::Foreign { .. })));

    let newer = dir.path().join("newer.db");
    drop(open(&newer));
    let other = rusqlite::Connection::open(&newer).unwrap();
    other.pragma_update(None, "user_version", 99).unwrap();
    drop(other);
    assert!(matches!(SqliteStore::open(&newer), Err(OpenError::TooNew { found: 99, .. })));

    assert!(matches!(SqliteStore::open(dir.path()), Err(OpenError::Create { .. })));
    assert!(matches!(SqliteStore::open(&text.join("x")), Err(OpenError::Directory { .. })));
}

#[tokio::test]
async fn a_full_file_refuses_what_does_not_fit_and_keeps_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let options = Options { max_bytes: 256 * 1024, ..Options::default() };
    let store = SqliteStore::open_with(&path, options).unwrap();
    put(&store, "a", "1").await;
    // In one group with a change that does not fit, a small one still succeeds.
    let (large, small) = tokio::join!(
        store.commit(Txn::new(vec![Op::put("b", vec![0; 512 * 1024])])),
        store.commit(Txn::new(vec![Op::put("a", "2")])),
    );
    let error = large.expect_err("too large");
    assert!(matches!(error, CommitError::Fault(StoreFault::Full { .. })), "{error:?}");
    assert!(error.source().unwrap().to_string().starts_with("no space left for the state file "));
    assert_eq!(small.unwrap().committed().unwrap(), Revision(2));
    let listing = store.list("").await.unwrap();
    assert_eq!((listing.revision, listing.entries.len()), (Revision(2), 1));
    drop(store);
    assert_eq!(open(&path).get("a").await.unwrap().unwrap().value, b"2");
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Host {
    memory: u64,
}

#[tokio::test]
async fn typed_values_are_changed_by_revision() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(open(&dir.path().join("state.db")));
    let hosts = Typed::<Host>::new(Arc::clone(&store), "/host/");
    put(&*store, "/hosts", "{}").await;
    let mut watch = hosts.watch(Revision(1)).await.unwrap();
    let made = hosts.create("h1", &Host { memory: 1 }).await.unwrap();
    let twice = hosts.create("h1", &Host { memory: 2 }).await;
    assert!(matches!(twice, Err(TypedError::Conflict(_))), "{twice:?}");
    let changed = hosts.update("h1", &Host { memory: 3 }, made).await.unwrap();
    assert!(matches!(hosts.update("h1", &Host { memory: 4 }, made).await, Err(TypedError::Conflict(_))));
    let read = hosts.get("h1").await.unwrap().unwrap();
    assert_eq!((read.id.as_str(), read.value, read.revision), ("h1", Host { memory: 3 }, changed));
    let moved = Txn::new(vec![hosts.put_op("h2", &Host { memory: 3 }).unwrap(), hosts.delete_op("h1")]);
    store.commit(moved.only_if(Compare::revision(hosts.key("h1"), changed))).await.unwrap().committed().unwrap();
    let listing = hosts.list().await.unwrap();
    assert_eq!(listing.values.len(), 1);
    assert!(matches!(hosts.delete("h2", made).await, Err(TypedError::Conflict(_))));
    hosts.delete("h2", listing.values[0].revision).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(match watch.next().await.unwrap().change {
            TypedChange::Put(v) => format!("{}={}", v.id, v.value.memory),
            TypedChange::Delete { id, .. } => format!("-{id}"),
        });
    }
    assert_eq!(seen, ["h1=1", "h1=3", "h2=3", "-h1", "-h2"]);
    put(&*store, "/host/odd", "[]").await;
    assert!(matches!(hosts.list().await, Err(TypedError::Decode { .. })));
    assert!(matches!(hosts.put("", &Host { memory: 0 }).await, Err(TypedError::Commit(_))));
}
