//! Whatever names, links and kinds an archive combines, nothing outside its root changes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
use common::*;
use godwit_image::{ImageStore, NoProgress, PullOptions};
use proptest::prelude::*;
use std::fs;
use std::path::Path;

/// Few names, so that entries meet: as files, directories, links and parents of one another.
fn path() -> impl Strategy<Value = String> {
    // What is refused at once is rare, so that most archives get far.
    let part = prop_oneof![
        20 => prop::sample::select(vec!["a", "b", "c", "OUT"]),
        3 => prop::sample::select(vec![".", "", ".wh.a", ".wh..wh..opq"]),
        1 => prop::sample::select(vec!["..", ".wh.."]),
    ];
    (0..30, prop::collection::vec(part, 1..4))
        .prop_map(|(absolute, parts)| format!("{}{}", if absolute == 0 { "/" } else { "" }, parts.join("/")))
}

fn target() -> impl Strategy<Value = String> {
    prop_oneof![
        path(),
        Just("OUT".to_string()),
        Just("OUT/precious".to_string()),
        Just("../../../../../../../../../../../../OUT".to_string()),
        Just("/".to_string()),
        Just("/proc/self/root/OUT".to_string()),
        Just("/proc/self/cwd".to_string()),
        path().prop_map(|path| format!("/{path}")),
    ]
}

fn entries() -> impl Strategy<Value = Vec<(u8, String, String)>> {
    prop::collection::vec((prop::sample::select(b"002225553461".to_vec()), path(), target()), 1..10)
}

/// Everything below `dir`, with what a write could change.
fn snapshot(dir: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut seen = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let data = if meta.is_file() { fs::read(&path).unwrap() } else { vec![] };
        seen.push(format!(
            "{path:?} {} {} {} {} {} {:?} {data:?}",
            meta.ino(),
            meta.mode(),
            meta.uid(),
            meta.nlink(),
            meta.mtime(),
            meta.ctime_nsec()
        ));
        if meta.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    seen.sort();
    seen
}

#[test]
fn nothing_outside_changes() {
    if not_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("precious"), "mine").unwrap();
    let before = snapshot(outside.path());
    let out = outside.path().to_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(&dir.path().join("store")).unwrap();
    let surroundings = names(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    let accepted = std::cell::Cell::new(0);
    proptest!(config, |(entries in entries())| {
        let entries: Vec<Entry> = entries.into_iter().map(|(kind, path, target)| {
            // Absolute links lead to a directory that the test watches.
            let (path, target) = (path.replace("OUT", out.trim_start_matches('/')), target.replace("/OUT", out).replace("OUT", out));
            match kind {
                b'0' => file(path, "data").mode(0o600),
                b'1' => hardlink(path, target.trim_start_matches('/')),
                b'2' => symlink(path, target),
                b'5' => dir_entry(path),
                kind => node(kind - b'0', &path, (1, 3)),
            }
        }).collect();
        let mut layout = Layout::new();
        layout.image("t", &[layer(&entries)]);
        let pulled = runtime.block_on(store.ensure(&layout.source("t"), &PullOptions::default(), &NoProgress));
        prop_assert_eq!(snapshot(outside.path()), before.clone());
        prop_assert_eq!(names(dir.path()), surroundings.clone());
        prop_assert_eq!(names(&dir.path().join("store")), ["blobs", "images", "layers", "lock", "tags.json", "tmp"].into_iter()
            .filter(|name| *name != "tags.json" || dir.path().join("store/tags.json").exists()).collect::<Vec<_>>());
        prop_assert!(names(&dir.path().join("store/tmp")).is_empty());
        if let Ok(image) = pulled {
            accepted.set(accepted.get() + 1);
            store.remove(image.digest, &[]).unwrap();
        }
        prop_assert!(names(&dir.path().join("store/layers")).is_empty());
    });
    let accepted = accepted.get();
    println!("{accepted} archives accepted");
    assert!(accepted > 20, "only {accepted} archives were accepted: the test hardly tests");
}

fn dir_entry(path: String) -> Entry {
    dir(path).mode(0o700)
}
