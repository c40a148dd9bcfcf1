//! The store's own promises: layers once, crashes leave nothing, removal takes what nobody needs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
use common::*;
use godwit_image::{
    Digest, ImageStore, ManifestError, OpenError, Progress, ProgressSink, PullError, PullOptions, RemoveError,
};
use serde_json::json;
use std::process::Command;
use std::sync::Mutex;

#[derive(Default)]
struct Seen(Mutex<Vec<Progress>>);

impl ProgressSink for Seen {
    fn report(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }
}

impl Seen {
    fn done(&self, reused: bool) -> usize {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|p| matches!(p, Progress::LayerDone { reused: r, .. } if *r == reused))
            .count()
    }
}

#[tokio::test]
async fn configuration_arrives() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    let run = json!({"Entrypoint": ["/init"], "Cmd": ["a"], "Env": ["A=1"], "WorkingDir": "/w", "User": "7:8",
        "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}}, "StopSignal": "SIGQUIT", "Labels": {"k": "v"}});
    let blob = layer(&[file("f", "x")]);
    let manifest = layout.manifest(std::slice::from_ref(&blob), arch(), run);
    layout.tag("1", manifest.clone());
    let image = fixture.ensure(&layout.source("1"), &PullOptions::default()).await.unwrap();
    assert_eq!(image.digest.to_string(), manifest["digest"].as_str().unwrap());
    assert_eq!(image.reference, layout.source("1").to_string());
    let config = &image.config;
    assert_eq!(
        (config.entrypoint.join(" "), config.cmd.join(" "), config.env.join(" ")),
        ("/init".into(), "a".into(), "A=1".into())
    );
    assert_eq!((config.working_dir.as_str(), config.user.as_str()), ("/w", "7:8"));
    assert_eq!((config.exposed_ports.join(" "), config.volumes.join(" ")), ("80/tcp".into(), "/data".into()));
    assert_eq!((config.stop_signal.as_deref(), config.labels["k"].as_str()), (Some("SIGQUIT"), "v"));
    assert!(image.size_bytes > blob.size);
    assert_eq!(image.layers, [fixture.root().join("layers").join(blob.diff_id.hex())]);

    // The same after closing and opening; two at once are refused.
    assert!(matches!(ImageStore::open(&fixture.root()), Err(OpenError::InUse { .. })));
    let (root, dir) = (fixture.root(), fixture.dir);
    drop(fixture.store);
    let store = ImageStore::open(&root).unwrap();
    assert_eq!(store.resolve(image.digest), Some(image.clone()));
    assert_eq!(store.list(), [image]);
    assert_eq!(store.resolve(Digest::of(b"")), None);
    drop(dir);
}

#[tokio::test]
async fn layers_are_shared_and_unpacked_once() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    let base = layer(&[file("base", vec![1; 3_000_000])]);
    let tags: Vec<String> = (0..8).map(|i| format!("t{i}")).collect();
    for tag in &tags {
        layout.image(tag, &[base.clone(), layer(&[file(tag, "x")])]);
    }
    let seen = Seen::default();
    let pulls = tags.iter().map(|tag| {
        let (store, source, seen) = (fixture.store.clone(), layout.source(tag), &seen);
        async move { store.ensure(&source, &PullOptions::default(), seen).await.unwrap() }
    });
    let images = futures_util::future::join_all(pulls).await;
    assert!(images.iter().all(|image| image.layers[0] == images[0].layers[0]));
    assert_eq!((seen.done(false), seen.done(true)), (9, 7));
    assert_eq!(fixture.names("layers").len(), 9);
    // Progress only grows.
    let mut last = std::collections::HashMap::new();
    for progress in seen.0.into_inner().unwrap() {
        if let Progress::Layer { diff_id, done_bytes, total_bytes } = progress {
            assert!(done_bytes >= last.insert(diff_id, done_bytes).unwrap_or(0) && done_bytes <= total_bytes);
        }
    }

    // Removal keeps what others need.
    let removed = fixture.store.remove(images[0].digest, &[]).unwrap();
    assert_eq!((removed.layers.len(), removed.references.as_slice()), (1, &[layout.source("t0").to_string()][..]));
    assert!(images[1].layers[0].join("base").exists() && !images[0].layers[1].exists());
    assert!(matches!(fixture.store.remove(images[1].digest, &[images[1].digest]), Err(RemoveError::InUse(_))));
    assert!(matches!(fixture.store.remove(images[0].digest, &[]), Err(RemoveError::NotFound(_))));
    for image in &images[1..] {
        fixture.store.remove(image.digest, &[]).unwrap();
    }
    for dir in ["layers", "images", "blobs/sha256", "tmp"] {
        assert!(fixture.names(dir).is_empty(), "{dir}");
    }
}

#[tokio::test]
async fn leftovers_of_a_crash() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    layout.image("t", &[layer(&[file("f", "x")])]);
    let image = fixture.ensure(&layout.source("t"), &PullOptions::default()).await.unwrap();
    let (root, dir) = (fixture.root(), fixture.dir);
    drop(fixture.store);
    std::fs::create_dir_all(root.join("tmp/layer-1/root/a/b")).unwrap();
    std::fs::write(root.join("tmp/layer-1/root/a/f"), "x").unwrap();
    std::fs::write(root.join("tmp/file-1"), "x").unwrap();
    let orphan = root.join("layers").join(Digest::of(b"orphan").hex());
    std::fs::create_dir_all(orphan.join("a")).unwrap();
    let store = ImageStore::open(&root).unwrap();
    assert!(names(&root.join("tmp")).is_empty());
    assert!(!orphan.exists());
    assert_eq!(store.resolve(image.digest).as_ref(), Some(&image));
    drop(store);

    // A record whose layer someone deleted is no image; pulling again brings it back.
    std::fs::remove_dir_all(&image.layers[0]).unwrap();
    let store = ImageStore::open(&root).unwrap();
    assert_eq!(store.resolve(image.digest), None);
    let again = store.ensure(&layout.source("t"), &PullOptions::default(), &godwit_image::NoProgress).await.unwrap();
    assert_eq!(again, image);
    drop(store);

    std::fs::write(root.join("tags.json"), "{").unwrap();
    let error = ImageStore::open(&root).err().unwrap();
    assert!(matches!(error, OpenError::Malformed { .. }) && error.to_string().contains("tags.json"), "{error}");
    drop(dir);
}

/// Nothing is deleted through a mount, even one of the same file system.
#[test]
fn mounts_are_not_crossed() {
    if not_root() {
        return;
    }
    const INNER: &str = "GODWIT_TEST_INSIDE_MOUNT_NAMESPACE";
    if std::env::var_os(INNER).is_none() {
        // Again, in a mount namespace of its own, so that the mounts end with the test.
        let me = std::env::current_exe().unwrap();
        let out = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(me)
            .args(["--exact", "mounts_are_not_crossed", "--nocapture"])
            .env(INNER, "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&out.stderr));
        return;
    }
    let fixture = fixture();
    let (root, dir) = (fixture.root(), fixture.dir);
    drop(fixture.store);
    let precious = dir.path().join("precious");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("f"), "mine").unwrap();
    let layer = root.join("layers").join(Digest::of(b"x").hex());
    let below = [root.join("tmp/layer-1/root/a/mnt"), root.join("tmp/direct"), layer.join("deep/mnt")];
    for target in &below {
        std::fs::create_dir_all(target).unwrap();
        assert!(Command::new("mount").arg("--bind").args([&precious, target]).status().unwrap().success());
    }
    let store = ImageStore::open(&root).unwrap();
    assert_eq!(std::fs::read(precious.join("f")).unwrap(), b"mine");
    drop(store);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut mine: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|at| at.starts_with(root.to_str().unwrap()))
        .collect();
    assert_eq!(mine.len(), 3);
    mine.reverse();
    for at in mine {
        assert!(Command::new("umount").arg(at).status().unwrap().success());
    }
    let _store = ImageStore::open(&root).unwrap();
    assert!(names(&root.join("tmp")).is_empty() && !layer.exists());
    assert_eq!(names(&precious), ["f"]);
}

#[tokio::test]
async fn platforms_and_tags() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    let mut ours = layout.manifest(&[layer(&[file("ours", "")])], arch(), json!({}));
    let mut theirs = layout.manifest(&[layer(&[file("theirs", "")])], "s390x", json!({}));
    let (digest, kind) = (ours["digest"].clone(), "application/vnd.oci.image.index.v1+json");
    theirs["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let only_theirs = layout.put_json(kind, &json!({"schemaVersion": 2, "manifests": [theirs, theirs]}));
    ours["platform"] = json!({"os": "linux", "architecture": arch()});
    let both = layout.put_json(kind, &json!({"schemaVersion": 2, "manifests": [theirs, ours]}));
    let nested = layout.put_json(kind, &json!({"schemaVersion": 2, "manifests": [both]}));
    layout.tag("nested", nested);
    layout.tag("theirs", only_theirs);
    let image = fixture.ensure(&layout.source("nested"), &PullOptions::default()).await.unwrap();
    assert_eq!(json!(image.digest.to_string()), digest);
    let error = fixture.ensure(&layout.source("theirs"), &PullOptions::default()).await.unwrap_err();
    assert!(chain(&error).contains("it is for: linux/s390x"), "{}", chain(&error));
    let untagged = format!("oci:{}", layout.dir.path().display()).parse().unwrap();
    let error = fixture.ensure(&untagged, &PullOptions::default()).await.unwrap_err();
    assert!(
        matches!(&error, PullError::Manifest { source: ManifestError::Ambiguous { offered }, .. } if offered == "nested, theirs"),
        "{error:?}"
    );

    // A tag that moves takes the name along; the old image stays until it is removed.
    layout.image("moving", &[layer(&[file("1", "")])]);
    let first = fixture.ensure(&layout.source("moving"), &PullOptions::default()).await.unwrap();
    let second = Layout::new();
    let moved = layout.manifest(&[layer(&[file("2", "")])], arch(), json!({}));
    drop(second);
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": moved["mediaType"], "digest": moved["digest"], "size": moved["size"],
        "annotations": {"org.opencontainers.image.ref.name": "moving"}}]});
    std::fs::write(layout.dir.path().join("index.json"), index.to_string()).unwrap();
    let second = fixture.ensure(&layout.source("moving"), &PullOptions::default()).await.unwrap();
    assert_ne!(first.digest, second.digest);
    assert_eq!(fixture.store.resolve(first.digest).unwrap().reference, first.digest.to_string());
}

#[tokio::test]
async fn layouts_in_archives() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    layout.image("t", &[layer(&[file("f", "from an archive")])]);
    let tar = fixture.dir.path().join("layout.tar");
    assert!(
        Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(layout.dir.path()).arg(".").status().unwrap().success()
    );
    for tag in [":t", ""] {
        let source = format!("oci:{}{tag}", tar.display()).parse().unwrap();
        let image = fixture.ensure(&source, &PullOptions::default()).await.unwrap();
        assert_eq!(std::fs::read(image.layers[0].join("f")).unwrap(), b"from an archive");
    }
    for (name, content) in [("junk.tar", &b"junk"[..]), ("empty.tar", b"")] {
        let path = fixture.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let error = fixture
            .ensure(&format!("oci:{}", path.display()).parse().unwrap(), &PullOptions::default())
            .await
            .unwrap_err();
        assert!(chain(&error).contains(name), "{}", chain(&error));
    }
    let error = fixture.ensure(&"oci:/nowhere/at/all:1".parse().unwrap(), &PullOptions::default()).await.unwrap_err();
    assert!(chain(&error).contains("/nowhere/at/all"), "{}", chain(&error));
}

/// One damaged layer among good ones: no record, no unfinished file, and the next try works.
#[tokio::test]
async fn a_failed_pull_leaves_nothing_unfinished() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    let layers: Vec<Layer> = (0..6).map(|i| layer(&[file(format!("f{i}"), vec![i; 2_000_000])])).collect();
    layout.image("t", &layers);
    let mut bad = layers[2].blob.clone();
    bad[1000] ^= 1;
    std::fs::write(layout.blob_path(layers[2].digest), bad).unwrap();
    let error = fixture.ensure(&layout.source("t"), &PullOptions::default()).await.unwrap_err();
    assert!(matches!(error, PullError::Unpack { layer, .. } if layer == layers[2].digest), "{error:?}");
    fixture.assert_clean();
    assert!(fixture.names("images").is_empty() && fixture.store.list().is_empty());
    std::fs::write(layout.blob_path(layers[2].digest), &layers[2].blob).unwrap();
    let image = fixture.ensure(&layout.source("t"), &PullOptions::default()).await.unwrap();
    assert_eq!(image.layers.len(), 6);
}

#[tokio::test]
async fn layers_without_effect_are_left_out() {
    if not_root() {
        return;
    }
    let twice = layer(&[file("a", "1")]);
    let (_f, image) = pull(&[twice.clone(), layer(&[file("b", "2")]), twice.clone()]).await;
    let layers = image.unwrap().layers;
    assert_eq!(layers.len(), 2);
    assert!(layers[1].ends_with(twice.diff_id.hex()));
    let (_f, image) = pull(&[twice, layer(&[file(".wh..wh..opq", ""), file("c", "3")])]).await;
    let layers = image.unwrap().layers;
    assert_eq!(layers.len(), 1);
    assert!(layers[0].join("c").exists());
}
