//! What every backend must do, and small helpers for the tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use godwit_store::{
    Change, Commit, CommitError, Compare, Conflict, Entry, LeaseError, MAX_KEY_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES, Op,
    Revision, Store, Txn, Watch, WatchError, WatchEvent,
};

/// No event of these tests takes as long as this.
pub const EVENT_TIMEOUT_MS: u64 = 10_000;

pub async fn commit(store: &dyn Store, ops: Vec<Op>) -> Revision {
    store.commit(Txn::new(ops)).await.expect("commit").committed().expect("no compare")
}

pub async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    commit(store, vec![Op::put(key, value)]).await
}

pub async fn next(watch: &mut Watch) -> Result<WatchEvent, WatchError> {
    tokio::time::timeout(Duration::from_millis(EVENT_TIMEOUT_MS), watch.next()).await.expect("an event in time")
}

/// An event in a line: `3 put a=1`, `4 delete a (3)`.
pub fn line(event: &WatchEvent) -> String {
    match &event.change {
        Change::Put(entry) => {
            assert_eq!(entry.mod_revision, event.revision);
            format!("{} put {}={}", event.revision, entry.key, String::from_utf8_lossy(&entry.value))
        }
        Change::Delete { key, prev_revision } => format!("{} delete {key} ({prev_revision})", event.revision),
    }
}

async fn lines(watch: &mut Watch, count: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for _ in 0..count {
        lines.push(line(&next(watch).await.expect("an event")));
    }
    lines
}

/// Runs everything against an empty store.
pub async fn conformance(store: Arc<dyn Store>) {
    let store = store.as_ref();
    revisions_and_versions(store).await;
    transactions(store).await;
    bounds(store).await;
    watches(store).await;
    leases(store).await;
    compaction(store).await;
}

async fn revisions_and_versions(store: &dyn Store) {
    assert_eq!(store.list("").await.unwrap().revision, Revision(0));
    assert_eq!(store.get("v/a").await.unwrap(), None);
    let r1 = put(store, "v/a", "1").await;
    let r2 = put(store, "v/a", "2").await;
    assert_eq!((r1, r2), (Revision(1), Revision(2)));
    let entry = Entry {
        key: "v/a".into(),
        value: b"2".to_vec(),
        create_revision: r1,
        mod_revision: r2,
        version: 2,
        lease: None,
    };
    assert_eq!(store.get("v/a").await.unwrap(), Some(entry.clone()));
    // Deleting nothing changes nothing; deleting and putting begins anew.
    assert_eq!(commit(store, vec![Op::delete("v/none"), Op::delete_prefix("none/")]).await, r2);
    assert_eq!(commit(store, vec![Op::delete("v/a")]).await, Revision(3));
    let r4 = put(store, "v/a", "3").await;
    let again = store.get("v/a").await.unwrap().unwrap();
    assert_eq!((again.create_revision, again.version), (r4, 1));
    // Prefixes are of bytes, listings are ordered by them.
    commit(store, vec![Op::put("v/ü", "x"), Op::put("v0", "x"), Op::put("v/b", ""), Op::put("v.", "x")]).await;
    let listing = store.list("v/").await.unwrap();
    let keys: Vec<_> = listing.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["v/a", "v/b", "v/ü"]);
    assert_eq!(listing.revision, Revision(5));
    assert_eq!(store.list("").await.unwrap().entries.len(), 5);
    commit(store, vec![Op::delete_prefix("")]).await;
    assert_eq!(store.list("").await.unwrap().entries, []);
}

async fn transactions(store: &dyn Store) {
    let a = put(store, "t/a", "1").await;
    let conflict = |index, compare: Compare, actual| Commit::Conflict(Conflict { index, compare, actual });
    let absent = Compare::absent("t/a");
    let txn = Txn::new(vec![Op::put("t/a", "2"), Op::put("t/b", "2")]);
    let refused = store.commit(txn.clone().only_if(Compare::exists("t/a")).only_if(absent.clone())).await.unwrap();
    assert_eq!(refused, conflict(1, absent, Some(a)));
    let exists = Compare::exists("t/b");
    assert_eq!(store.commit(txn.clone().only_if(exists.clone())).await.unwrap(), conflict(0, exists, None));
    let stale = Compare::revision("t/a", Revision(a.0 + 7));
    assert_eq!(store.commit(txn.clone().only_if(stale.clone())).await.unwrap(), conflict(0, stale, Some(a)));
    assert_eq!(store.list("t/").await.unwrap().revision, a, "a conflict changes nothing");
    assert_eq!(store.get("t/b").await.unwrap(), None);
    let done = store.commit(txn.only_if(Compare::revision("t/a", a)).only_if(Compare::absent("t/b"))).await.unwrap();
    assert_eq!(done, Commit::Committed { revision: a.next() });
    for key in ["t/a", "t/b"] {
        assert_eq!(store.get(key).await.unwrap().unwrap().mod_revision, a.next(), "one revision for all");
    }
    // Of many who try to change the same revision, one succeeds.
    let at = store.get("t/a").await.unwrap().unwrap().mod_revision;
    let tries = (0..20).map(|n| {
        store.commit(Txn::new(vec![Op::put("t/a", format!("try {n}"))]).only_if(Compare::revision("t/a", at)))
    });
    let mut won = 0;
    for attempt in futures(tries).await {
        won += usize::from(matches!(attempt.unwrap(), Commit::Committed { .. }));
    }
    assert_eq!(won, 1);
}

/// Polls all futures together.
async fn futures<T>(futures: impl Iterator<Item = godwit_store::BoxFuture<'_, T>>) -> Vec<T> {
    let mut waiting: Vec<_> = futures.collect();
    let mut done = Vec::new();
    std::future::poll_fn(|context| {
        waiting.retain_mut(|future| match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => {
                done.push(value);
                false
            }
            std::task::Poll::Pending => true,
        });
        if waiting.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done
}

async fn bounds(store: &dyn Store) {
    let before = store.list("").await.unwrap();
    let long = "k".repeat(MAX_KEY_BYTES + 1);
    let refused = [
        Txn::new(vec![Op::put("", "")]),
        Txn::new(vec![Op::put(&*long, "")]),
        Txn::new(vec![Op::delete(&*long)]),
        Txn::new(vec![Op::delete_prefix(&*long)]),
        Txn::new(vec![]).only_if(Compare::absent(&*long)),
        Txn::new(vec![Op::put("b/v", vec![0; MAX_VALUE_BYTES + 1])]),
        Txn::new(vec![Op::put("b/v", vec![0; MAX_VALUE_BYTES]), Op::put("b/w", vec![0; MAX_VALUE_BYTES])]),
        Txn::new((0..=MAX_TXN_OPS).map(|n| Op::put(format!("b/{n}"), "")).collect()),
        Txn::new(vec![Op::put("b/a", ""), Op::delete("b/a")]),
        Txn::new(vec![Op::put("b/a", ""), Op::delete_prefix("b/")]),
        Txn::new(vec![Op::delete_prefix("b/a/"), Op::delete_prefix("b/")]),
        Txn::new(vec![Op::put_leased("b/a", "", godwit_store::LeaseId(999_999))]),
    ];
    for txn in refused {
        assert!(store.commit(txn.clone()).await.is_err(), "{:.200}", format!("{txn:?}"));
    }
    assert_eq!(store.list("").await.unwrap(), before, "what is refused changes nothing");
    assert!(store.get(&long).await.is_err());
    assert!(store.list(&long).await.is_err());
    assert!(store.watch(&long, Revision(1)).await.is_err());
    let largest = "k".repeat(MAX_KEY_BYTES);
    commit(store, vec![Op::put(&*largest, vec![7; MAX_VALUE_BYTES])]).await;
    assert_eq!(store.get(&largest).await.unwrap().unwrap().value.len(), MAX_VALUE_BYTES);
    commit(store, vec![Op::delete(&*largest)]).await;
}

async fn watches(store: &dyn Store) {
    let from = store.list("").await.unwrap().revision.next();
    let mut early = store.watch("w/", from).await.unwrap();
    let r = from.0;
    commit(store, vec![Op::put("w/a", "1"), Op::put("x/a", "other"), Op::put("w/b", "1")]).await;
    put(store, "x/b", "other").await;
    commit(store, vec![Op::delete("w/a"), Op::put("w/b", "2")]).await;
    let first = [
        format!("{r} put w/a=1"),
        format!("{r} put w/b=1"),
        format!("{} delete w/a ({r})", r + 2),
        format!("{} put w/b=2", r + 2),
    ];
    assert_eq!(lines(&mut early, 4).await, first);
    // From the past: history, then what is new.
    let mut late = store.watch("w/", from).await.unwrap();
    let mut middle = store.watch("w/", Revision(r + 1)).await.unwrap();
    put(store, "w/c", "new").await;
    let last = format!("{} put w/c=new", r + 3);
    assert_eq!(lines(&mut late, 5).await, [&first[..], std::slice::from_ref(&last)].concat());
    assert_eq!(lines(&mut middle, 3).await, [&first[2..], std::slice::from_ref(&last)].concat());
    assert_eq!(lines(&mut early, 1).await, [last]);
    // From the future: nothing before that revision.
    let mut future = store.watch("w/", Revision(r + 6)).await.unwrap();
    put(store, "w/c", "5").await;
    put(store, "w/c", "6").await;
    put(store, "w/c", "7").await;
    assert_eq!(lines(&mut future, 1).await, [format!("{} put w/c=7", r + 6)]);
    // A wait that is given up loses nothing.
    let idle = tokio::time::timeout(Duration::from_millis(20), future.next()).await;
    assert!(idle.is_err(), "no event is due: {idle:?}");
    put(store, "w/c", "8").await;
    assert_eq!(lines(&mut future, 1).await, [format!("{} put w/c=8", r + 7)]);
}

async fn leases(store: &dyn Store) {
    for ttl in [Duration::ZERO, Duration::from_secs(1_000_000)] {
        assert!(matches!(store.lease_grant(ttl).await, Err(LeaseError::Ttl { .. })));
    }
    let kept = store.lease_grant(Duration::from_secs(3600)).await.unwrap();
    let short = store.lease_grant(Duration::from_secs(2)).await.unwrap();
    assert_ne!(kept, short);
    let put = commit(
        store,
        vec![
            Op::put_leased("l/a", "1", short),
            Op::put_leased("l/b", "1", short),
            Op::put_leased("l/detached", "1", short),
            Op::put_leased("l/kept", "1", kept),
        ],
    )
    .await;
    assert_eq!(store.get("l/a").await.unwrap().unwrap().lease, Some(short));
    let detached = commit(store, vec![Op::put("l/detached", "2")]).await;
    let mut watch = store.watch("l/", detached.next()).await.unwrap();
    // Kept alive past its time to live, then not any more.
    let began = std::time::Instant::now();
    let mut last_kept = began;
    while began.elapsed() < Duration::from_millis(2600) {
        last_kept = std::time::Instant::now();
        assert_eq!(store.lease_keep_alive(short).await.unwrap(), Duration::from_secs(2));
        let early = tokio::time::timeout(Duration::from_millis(300), watch.next()).await;
        assert!(early.is_err(), "a lease kept alive ended: {early:?}");
    }
    let gone = lines(&mut watch, 2).await;
    assert!(last_kept.elapsed() >= Duration::from_secs(2), "it lasted its time to live");
    let at = detached.0 + 1;
    assert_eq!(gone, [format!("{at} delete l/a ({put})"), format!("{at} delete l/b ({put})")]);
    let left: Vec<_> = store.list("l/").await.unwrap().entries.into_iter().map(|e| e.key).collect();
    assert_eq!(left, ["l/detached", "l/kept"]);
    assert!(matches!(store.lease_keep_alive(short).await, Err(LeaseError::NoSuchLease { .. })));
    assert!(matches!(store.lease_revoke(short).await, Err(LeaseError::NoSuchLease { .. })));
    let late = store.commit(Txn::new(vec![Op::put_leased("l/late", "1", short)])).await;
    assert!(matches!(late, Err(CommitError::NoSuchLease { .. })), "{late:?}");
    assert_eq!(store.lease_revoke(kept).await.unwrap(), Revision(at + 1));
    assert_eq!(lines(&mut watch, 1).await, [format!("{} delete l/kept ({put})", at + 1)]);
}

async fn compaction(store: &dyn Store) {
    put(store, "c/a", "1").await;
    let keep = put(store, "c/a", "2").await;
    let end = put(store, "c/a", "3").await;
    assert!(store.compact(end.next()).await.is_err(), "the future cannot be compacted");
    let mut watch = store.watch("c/", keep).await.unwrap();
    store.compact(keep).await.unwrap();
    store.compact(keep).await.unwrap();
    assert_eq!(lines(&mut watch, 2).await, [format!("{keep} put c/a=2"), format!("{end} put c/a=3")]);
    let gone = store.watch("c/", Revision(keep.0 - 1)).await;
    assert!(matches!(gone, Err(WatchError::Compacted { oldest, .. }) if oldest == keep), "{gone:?}");
    let listing = store.list("c/").await.unwrap();
    assert_eq!((listing.entries.len(), listing.revision), (1, end), "entries stay");
    let mut next_watch = store.watch("c/", listing.revision.next()).await.unwrap();
    let new = put(store, "c/a", "4").await;
    assert_eq!(lines(&mut next_watch, 1).await, [format!("{new} put c/a=4")]);
}
