//! Archives and layouts that lie: each is refused, nothing is left, nothing outside is touched.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
use common::*;
use godwit_image::{FetchError, Limits, ManifestError, PullError, PullOptions, UnpackError as E};

#[tokio::test]
async fn escaping_names() {
    if not_root() {
        return;
    }
    for path in ["../evil", "a/../../evil", "/etc/evil", "a/..", ".."] {
        let error = refusal(&[file(path, "x")]).await;
        assert!(matches!(error, E::Escape { .. }), "{path}: {error:?}");
        let error = refusal(&[dir(path)]).await;
        assert!(matches!(error, E::Escape { .. }), "{path}: {error:?}");
    }
    for path in [".wh..", ".wh...", ".wh."] {
        let error = refusal(&[file(path, "")]).await;
        assert!(matches!(error, E::Escape { .. }), "{path}: {error:?}");
    }
    let error = refusal(&[file("a", "x").pax("path", "b\0c")]).await;
    assert!(matches!(error, E::Escape { .. }), "{error:?}");
}

/// Through a link everything stays inside the root, as it would for a process in the container.
#[tokio::test]
async fn writing_through_links() {
    if not_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("f"), "mine").unwrap();
    let target = outside.path().to_str().unwrap();
    let up = format!("{}{target}", "../".repeat(20));
    let (_f, root) = unpacked(&[
        symlink("abs", target),
        file("abs/f", "evil"),
        symlink("rel", &up),
        file("rel/g", "evil"),
        file("rel/.wh.f", ""),
        symlink("direct", format!("{target}/f")),
        file("direct", "evil"),
        symlink("chain", "abs"),
        file("chain/.wh..wh..opq", ""),
    ])
    .await;
    assert_eq!(names(outside.path()), ["f"]);
    assert_eq!(std::fs::read(outside.path().join("f")).unwrap(), b"mine");
    let inside = root.join(target.trim_start_matches('/'));
    assert_eq!(std::fs::read(inside.join("g")).unwrap(), b"evil");
    assert_eq!(std::fs::read(inside.join("f")).unwrap(), b"evil");
}

#[tokio::test]
async fn hard_links() {
    if not_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "mine").unwrap();
    let target = outside.path().to_str().unwrap();
    for link in [format!("{}{target}/secret", "../".repeat(20)), format!("{target}/secret")] {
        assert!(matches!(refusal(&[hardlink("a", &link)]).await, E::Escape { .. }));
    }
    let through = refusal(&[symlink("out", target), hardlink("a", "out/secret")]).await;
    assert!(matches!(through, E::LinkTarget { .. }), "{through:?}");
    // A link to a link must not become one to where it leads.
    let (_f, root) = unpacked(&[symlink("l", format!("{target}/secret")), hardlink("a", "l")]).await;
    assert!(std::fs::symlink_metadata(root.join("a")).unwrap().is_symlink());
    let lower = refusal(&[hardlink("a", "usr/bin/from-a-lower-layer")]).await;
    assert!(matches!(lower, E::LinkTarget { .. }), "{lower:?}");
    assert!(matches!(refusal(&[file(".wh.x", ""), hardlink("a", "x")]).await, E::LinkTarget { .. }));
    assert!(matches!(refusal(&[dir("d"), hardlink("a", "d")]).await, E::Unusable { .. }));
    let (_f, root) = unpacked(&[dir("d"), file("d/f", "x"), hardlink("d", "d/f")]).await;
    assert_eq!(std::fs::read(root.join("d")).unwrap(), b"x");
}

#[tokio::test]
async fn what_overlayfs_would_misread() {
    if not_root() {
        return;
    }
    assert!(matches!(refusal(&[node(3, "x", (0, 0))]).await, E::Unusable { .. }));
    for key in ["trusted.overlay.redirect", "trusted.overlay.opaque", "user.overlay.whiteout"] {
        assert!(matches!(refusal(&[dir("d").xattr(key, "y")]).await, E::Unusable { .. }), "{key}");
    }
}

#[tokio::test]
async fn malformed_archives() {
    if not_root() {
        return;
    }
    assert!(matches!(refusal(&[file("f", "x"), file("f/below", "x")]).await, E::NotDirectory { .. }));
    assert!(matches!(refusal(&[symlink("a", "b"), symlink("b", "a"), file("a/x", "x")]).await, E::Io { .. }));
    assert!(matches!(refusal(&[symlink("a", "")]).await, E::Unusable { .. }));
    assert!(matches!(refusal(&[file(".", "")]).await, E::Unusable { .. }));
    assert!(matches!(refusal(&[file("f", "x").pax("size", "99999999999999999999")]).await, E::Tar(_)));
    assert!(matches!(refusal(&[file("f", "x").pax("uid", "4294967295")]).await, E::Tar(_)));
    assert!(matches!(refusal(&[file("f", "x").xattr("user.big", vec![0; 65537])]).await, E::Tar(_)));
    assert!(matches!(refusal(&[file("f", "x").xattr("user.huge", vec![0; 2 << 20])]).await, E::Tar(_)));
    let path = "p/".repeat(3000);
    assert!(matches!(refusal(&[file(path + "f", "x")]).await, E::Tar(_)));
    let kind = common::Entry { kind: b'V', ..file("label", "") };
    assert!(matches!(refusal(&[kind]).await, E::Tar(_)));
    for map in ["0,1,0,1", "5", "0,99", "18446744073709551615,2", "3,1"] {
        let entry = file("s", "ab").pax("GNU.sparse.realsize", "4").pax("GNU.sparse.map", map);
        assert!(matches!(refusal(&[entry]).await, E::Tar(_)), "{map}");
    }
    let junk = b"this is no archive at all, though long enough to fill a header block".repeat(20);
    assert!(matches!(
        refused(from_blob(junk.clone(), &junk, "application/vnd.oci.image.layer.v1.tar")).await,
        E::Tar(_)
    ));
    let cut = archive(&[file("f", vec![1; 5000])])[..3000].to_vec();
    assert!(matches!(refused(from_blob(cut.clone(), &cut, "application/vnd.oci.image.layer.v1.tar")).await, E::Tar(_)));
    let broken = gzip(&cut)[..200.min(gzip(&cut).len() - 9)].to_vec();
    assert!(matches!(
        refused(from_blob(broken, &cut, "application/vnd.oci.image.layer.v1.tar+gzip")).await,
        E::Decompress(_)
    ));
}

#[tokio::test]
async fn wrong_digests_and_sizes() {
    if not_root() {
        return;
    }
    let honest = layer(&[file("f", vec![5; 100_000])]);
    for compressed in [false, true] {
        let mut base = honest.clone();
        if compressed {
            let mixed: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2654435761) >> 13) as u8).collect();
            let tar = archive(&[file("f", mixed)]);
            base = from_blob(gzip(&tar), &tar, "application/vnd.oci.image.layer.v1.tar+gzip");
        }
        let mut flipped = base.clone();
        let middle = flipped.blob.len() / 2;
        flipped.blob[middle] ^= 1;
        let error = refused(flipped).await;
        assert!(matches!(error, E::BlobDigest { .. }), "{compressed} {error:?}");

        let mut cut = base.clone();
        cut.blob.truncate(middle);
        let error = refused(cut).await;
        assert!(matches!(error, E::BlobTruncated { .. }), "{compressed} {error:?}");

        let mut longer = base.clone();
        longer.blob.extend_from_slice(&[0; 4096]);
        let error = refused(longer).await;
        assert!(matches!(error, E::BlobOversize { .. }), "{compressed} {error:?}");

        let mut other = base.clone();
        other.diff_id = godwit_image::Digest::of(b"something else");
        let error = refused(other).await;
        assert!(matches!(error, E::DiffId { .. }), "{compressed} {error:?}");
    }
}

#[tokio::test]
async fn limits() {
    if not_root() {
        return;
    }
    let (fixture, mut layout) = (fixture(), Layout::new());
    let zeros = archive(&[file("f", vec![0; 4 << 20])]);
    layout.image("bomb", &[from_blob(gzip(&zeros), &zeros, "application/vnd.oci.image.layer.v1.tar+gzip")]);
    let hole = file("s", "").pax("GNU.sparse.realsize", "9000000000000000000").pax("GNU.sparse.map", "");
    layout.image("hole", &[layer(&[hole])]);
    let padded = [archive(&[file("f", "x")]), vec![0; 4 << 20]].concat();
    layout.image("padding", &[from_blob(gzip(&padded), &padded, "application/vnd.oci.image.layer.v1.tar+gzip")]);
    layout.image("entries", &[layer(&(0..11).map(|i| dir(format!("d{i}"))).collect::<Vec<_>>())]);
    let options =
        PullOptions { limits: Limits { max_layer_bytes: 1 << 20, max_layer_entries: 10 }, ..Default::default() };
    for tag in ["bomb", "hole", "padding"] {
        let error = fixture.ensure(&layout.source(tag), &options).await.unwrap_err();
        assert!(matches!(error, PullError::Unpack { source: E::TooLarge { .. }, .. }), "{tag}: {error:?}");
    }
    let error = fixture.ensure(&layout.source("entries"), &options).await.unwrap_err();
    assert!(matches!(error, PullError::Unpack { source: E::TooManyEntries { .. }, .. }), "{error:?}");
    fixture.assert_clean();
    assert!(fixture.names("layers").is_empty());
}

/// A deep tree must be removable again without a deep stack or many open files.
#[tokio::test]
async fn deep_trees_are_removed() {
    if not_root() {
        return;
    }
    let mut entries = Vec::new();
    for chunk in 0..20 {
        let deep = "d/".repeat(200);
        entries.push(file(format!("{deep}f"), "x"));
        // The next chunk goes on below this one, past what a path can hold.
        entries.push(symlink(format!("{deep}next"), "/"));
        entries.push(symlink(format!("l{chunk}"), deep.trim_end_matches('/')));
        entries.push(file(format!("l{chunk}/{deep}{chunk}"), "x"));
    }
    let (fixture, _root) = unpacked(&entries).await;
    let image = &fixture.store.list()[0];
    fixture.store.remove(image.digest, &[]).unwrap();
    fixture.assert_clean();
    assert!(fixture.names("layers").is_empty());
}

#[tokio::test]
async fn documents() {
    if not_root() {
        return;
    }
    use serde_json::json;
    let fixture = fixture();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let mut layout = Layout::new();
    let good = layout.manifest(&[layer(&[])], arch(), json!({}));
    layout.tag("good", good.clone());
    let mut size = good.clone();
    size["size"] = json!(3);
    layout.tag("size", size);
    let mut huge = good.clone();
    huge["size"] = json!(5 << 20);
    layout.tag("huge", huge);
    let descriptor = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": godwit_image::Digest::of(b"").to_string(), "size": 0});
    let many = layout
        .put_json(kind, &json!({"schemaVersion": 2, "config": descriptor, "layers": vec![descriptor.clone(); 129]}));
    layout.tag("many", many);
    let old = layout.put_json(kind, &json!({"schemaVersion": 1}));
    layout.tag("old", old);
    let wasm = layout.put_json(kind, &json!({"schemaVersion": 2, "config": descriptor, "layers": [{"mediaType": "application/wasm", "digest": descriptor["digest"], "size": 0}]}));
    layout.tag("wasm", wasm);
    let count = layout.put_json("application/vnd.oci.image.config.v1+json", &json!({"rootfs": {"diff_ids": []}}));
    let count = layout.put_json(kind, &json!({"schemaVersion": 2, "config": count, "layers": [descriptor]}));
    layout.tag("count", count);
    let other = layout.manifest(&[], "m68k", json!({}));
    layout.tag("arch", other);
    let damaged = layout.manifest(&[], arch(), json!({"Cmd": ["x"]}));
    std::fs::write(
        layout.blob_path(damaged["digest"].as_str().unwrap().parse().unwrap()),
        vec![b' '; damaged["size"].as_u64().unwrap() as usize],
    )
    .unwrap();
    layout.tag("damaged", damaged);
    let gone = layout.put_json(kind, &json!({"schemaVersion": 2, "config": descriptor, "layers": [], "x": 1}));
    std::fs::remove_file(layout.blob_path(gone["digest"].as_str().unwrap().parse().unwrap())).unwrap();
    layout.tag("gone", gone);

    let get = async |tag: &str| fixture.ensure(&layout.source(tag), &PullOptions::default()).await;
    get("good").await.unwrap();
    type P = PullError;
    type M = ManifestError;
    type F = FetchError;
    type Case = (&'static str, fn(&PullError) -> bool);
    let cases: [Case; 10] = [
        ("size", |e| matches!(e, P::Fetch { source: F::Size { .. }, .. })),
        ("huge", |e| matches!(e, P::Fetch { source: F::TooLong { .. }, .. })),
        ("many", |e| matches!(e, P::Manifest { source: M::TooManyLayers { count: 129 }, .. })),
        ("old", |e| matches!(e, P::Manifest { source: M::SchemaVersion(1), .. })),
        ("wasm", |e| matches!(e, P::Manifest { source: M::LayerType { .. }, .. })),
        ("count", |e| matches!(e, P::Manifest { source: M::LayerCount { layers: 1, diff_ids: 0 }, .. })),
        ("arch", |e| matches!(e, P::Manifest { source: M::Platform { .. }, .. })),
        ("damaged", |e| matches!(e, P::Fetch { source: F::Digest { .. }, .. })),
        ("gone", |e| matches!(e, P::Fetch { source: F::NoBlob { .. }, .. })),
        ("absent", |e| matches!(e, P::Manifest { source: M::NoTag { .. }, .. })),
    ];
    for (tag, expected) in cases {
        let error = get(tag).await.unwrap_err();
        assert!(expected(&error), "{tag}: {error:?}");
    }
    let error = chain(&get("arch").await.unwrap_err());
    assert!(error.contains("linux/m68k"), "{error}");
}
