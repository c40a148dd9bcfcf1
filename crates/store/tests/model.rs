//! Random transactions, leases, watches, trims and restarts against a model in memory.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod suite;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use godwit_store::{
    Change, Commit, Compare, Condition, Conflict, Entry, LeaseId, Op, Revision, SqliteStore, Store, Txn, Watch,
    WatchError, WatchEvent,
};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Commit { compares: Vec<(u8, u8)>, ops: Vec<(u8, u8, u8)> },
    Grant,
    Revoke(u8),
    Watch { prefix: u8, from: u8 },
    Compact(u8),
    Reopen,
}

const KEYS: [&str; 7] = ["a", "a/1", "a/2", "a0", "b", "b/1", "ü"];
const PREFIXES: [&str; 5] = ["", "a", "a/", "b/", "ü"];

fn step() -> impl Strategy<Value = Step> {
    let commit =
        (prop::collection::vec((0..7u8, 0..4u8), 0..3), prop::collection::vec((0..5u8, 0..7u8, any::<u8>()), 0..5));
    prop_oneof![
        12 => commit.prop_map(|(compares, ops)| Step::Commit { compares, ops }),
        2 => Just(Step::Grant),
        1 => any::<u8>().prop_map(Step::Revoke),
        2 => (0..5u8, any::<u8>()).prop_map(|(prefix, from)| Step::Watch { prefix, from }),
        1 => any::<u8>().prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

/// The semantics in the plainest form.
#[derive(Default)]
struct Model {
    revision: u64,
    oldest: u64,
    entries: BTreeMap<String, Entry>,
    history: Vec<WatchEvent>,
    leases: Vec<LeaseId>,
}

impl Model {
    fn mod_revision(&self, key: &str) -> Option<Revision> {
        self.entries.get(key).map(|e| e.mod_revision)
    }

    fn delete(&mut self, revision: Revision, key: &str) -> bool {
        let Some(entry) = self.entries.remove(key) else { return false };
        let change = Change::Delete { key: key.to_owned(), prev_revision: entry.mod_revision };
        self.history.push(WatchEvent { revision, change });
        true
    }

    fn below(&self, prefix: &str) -> Vec<String> {
        self.entries.keys().filter(|k| k.starts_with(prefix)).cloned().collect()
    }

    fn commit(&mut self, txn: &Txn) -> Commit {
        for (index, compare) in txn.compares.iter().enumerate() {
            let actual = self.mod_revision(&compare.key);
            let holds = match compare.condition {
                Condition::ModRevision(r) => actual == Some(r),
                Condition::Absent => actual.is_none(),
                Condition::Exists => actual.is_some(),
            };
            if !holds {
                return Commit::Conflict(Conflict { index, compare: compare.clone(), actual });
            }
        }
        let revision = Revision(self.revision + 1);
        let mut changed = false;
        for op in &txn.then {
            match op {
                Op::Put { key, value, lease } => {
                    let old = self.entries.get(key);
                    let entry = Entry {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: old.map_or(revision, |e| e.create_revision),
                        mod_revision: revision,
                        version: old.map_or(1, |e| e.version + 1),
                        lease: *lease,
                    };
                    self.history.push(WatchEvent { revision, change: Change::Put(entry.clone()) });
                    self.entries.insert(key.clone(), entry);
                    changed = true;
                }
                Op::Delete { key } => changed |= self.delete(revision, key),
                Op::DeletePrefix { prefix } => {
                    for key in self.below(prefix) {
                        changed |= self.delete(revision, &key);
                    }
                }
            }
        }
        self.revision += u64::from(changed);
        Commit::Committed { revision: Revision(self.revision) }
    }

    fn revoke(&mut self, lease: LeaseId) -> Revision {
        self.leases.retain(|l| *l != lease);
        let keys: Vec<_> = self.entries.values().filter(|e| e.lease == Some(lease)).map(|e| e.key.clone()).collect();
        let revision = Revision(self.revision + 1);
        for key in &keys {
            self.delete(revision, key);
        }
        self.revision += u64::from(!keys.is_empty());
        Revision(self.revision)
    }

    fn txn(&self, compares: &[(u8, u8)], ops: &[(u8, u8, u8)]) -> Txn {
        let compares = compares
            .iter()
            .map(|(key, kind)| {
                let key = KEYS[usize::from(*key)];
                match kind {
                    0 => Compare::absent(key),
                    1 => Compare::exists(key),
                    2 => Compare::revision(key, Revision(self.revision)),
                    _ => Compare::revision(key, self.mod_revision(key).unwrap_or_default()),
                }
            })
            .collect();
        let mut then: Vec<Op> = Vec::new();
        for (kind, key, value) in ops {
            let name = KEYS[usize::from(*key)];
            let lease = self.leases.get(usize::from(*value) % self.leases.len().max(1));
            let op = match (kind, lease) {
                (0, _) => Op::delete(name),
                (1, _) if then.is_empty() => Op::delete_prefix(PREFIXES[usize::from(*key) % PREFIXES.len()]),
                (2, Some(lease)) => Op::put_leased(name, vec![*value], *lease),
                _ => Op::put(name, vec![*value; usize::from(*value)]),
            };
            let taken = then.iter().any(|other| match other {
                Op::Put { key, .. } | Op::Delete { key } => key == name,
                Op::DeletePrefix { prefix } => name.starts_with(prefix.as_str()),
            });
            if !taken {
                then.push(op);
            }
        }
        Txn { compares, then }
    }
}

struct Open {
    watch: Watch,
    expected: Vec<usize>,
    prefix: &'static str,
    from: u64,
}

async fn run(path: &Path, steps: Vec<Step>) {
    let mut model = Model { oldest: 1, ..Model::default() };
    let mut store = SqliteStore::open(path).unwrap();
    let mut open: Vec<Open> = Vec::new();
    for step in steps {
        match step {
            Step::Commit { compares, ops } => {
                let txn = model.txn(&compares, &ops);
                assert_eq!(store.commit(txn.clone()).await.unwrap(), model.commit(&txn), "{txn:?}");
            }
            Step::Grant => {
                let lease = store.lease_grant(Duration::from_secs(3600)).await.unwrap();
                assert!(model.leases.iter().all(|l| *l < lease));
                model.leases.push(lease);
            }
            Step::Revoke(which) => {
                if let Some(lease) = model.leases.get(usize::from(which) % model.leases.len().max(1)).copied() {
                    assert_eq!(store.lease_revoke(lease).await.unwrap(), model.revoke(lease));
                }
            }
            Step::Watch { prefix, from } => {
                let prefix = PREFIXES[usize::from(prefix)];
                let from = u64::from(from) % (model.revision + 3);
                let first = from.max(1);
                match store.watch(prefix, Revision(from)).await {
                    Ok(watch) => {
                        assert!(first >= model.oldest || first > model.revision, "history is gone");
                        // A later compaction may end a replay, so what is there already is read at once.
                        let mut new = Open { watch, expected: Vec::new(), prefix, from: first };
                        follow(&mut new, &model).await;
                        open.push(new);
                    }
                    Err(WatchError::Compacted { oldest, .. }) => {
                        assert_eq!(oldest, Revision(model.oldest));
                        assert!(first < model.oldest);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            Step::Compact(at) => {
                let at = u64::from(at) % (model.revision + 1);
                store.compact(Revision(at)).await.unwrap();
                model.oldest = model.oldest.max(at);
            }
            Step::Reopen => {
                open.clear();
                drop(store);
                store = SqliteStore::open(path).unwrap();
            }
        }
        for prefix in PREFIXES {
            let listing = store.list(prefix).await.unwrap();
            let expected: Vec<_> = model.entries.values().filter(|e| e.key.starts_with(prefix)).cloned().collect();
            assert_eq!((listing.entries, listing.revision), (expected, Revision(model.revision)));
        }
        for watch in &mut open {
            follow(watch, &model).await;
        }
    }
}

/// Reads what the model says a watch should see by now.
async fn follow(open: &mut Open, model: &Model) {
    let due = model
        .history
        .iter()
        .enumerate()
        .filter(|(_, event)| event.revision.0 >= open.from && event.key().starts_with(open.prefix));
    for (index, event) in due {
        if open.expected.last().is_none_or(|last| *last < index) {
            assert_eq!(&suite::next(&mut open.watch).await.unwrap(), event);
            open.expected.push(index);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_time: 60_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(run(&dir.path().join("state.db"), steps));
    }
}
