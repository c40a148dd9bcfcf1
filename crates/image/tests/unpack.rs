//! What archives contain arrives on disk, in overlayfs's form.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
use common::*;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 70_000];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

fn is_opaque(path: &Path) -> bool {
    xattr(path, "trusted.overlay.opaque") == Some(b"y".to_vec())
}

#[tokio::test]
async fn files_with_owner_mode_time() {
    if not_root() {
        return;
    }
    let (_f, root) = unpacked(&[
        dir("./").mode(0o755).mtime(5),
        dir("d/").mode(0o1777).owner(7, 8).mtime(1234),
        file("d/plain", "hello").owner(1000, 1001).mode(0o640).mtime(77),
        file("d/suid", "x").mode(0o6755).owner(3, 4),
        file("d/fine", "x").pax("mtime", "1350244992.023960108"),
        file("big-uid", "x").pax("uid", "4000000000").pax("gid", "4000000001"),
    ])
    .await;
    let meta = |p: &str| fs::symlink_metadata(root.join(p)).unwrap();
    let plain = meta("d/plain");
    assert_eq!((plain.uid(), plain.gid(), plain.mode() & 0o7777, plain.mtime()), (1000, 1001, 0o640, 77));
    assert_eq!(fs::read(root.join("d/plain")).unwrap(), b"hello");
    assert_eq!(meta("d/suid").mode() & 0o7777, 0o6755);
    assert_eq!((meta("d/fine").mtime(), meta("d/fine").mtime_nsec()), (1350244992, 23960108));
    assert_eq!((meta("big-uid").uid(), meta("big-uid").gid()), (4_000_000_000, 4_000_000_001));
    let d = meta("d");
    assert_eq!((d.mode() & 0o7777, d.uid(), d.gid(), d.mtime()), (0o1777, 7, 8, 1234));
    assert_eq!(meta("").mtime(), 5);
}

#[tokio::test]
async fn links() {
    if not_root() {
        return;
    }
    let long = "t/".repeat(80) + "end";
    let (_f, root) = unpacked(&[
        file("a", "data"),
        hardlink("b", "a"),
        hardlink("./c/d", "./b"),
        hardlink("a", "a"),
        symlink("s", "/nowhere/at/all").owner(9, 9),
        hardlink("s2", "s"),
        symlink("long", &long),
    ])
    .await;
    let inode = |p: &str| fs::symlink_metadata(root.join(p)).unwrap().ino();
    assert_eq!(inode("a"), inode("b"));
    assert_eq!(inode("a"), inode("c/d"));
    assert_eq!(fs::symlink_metadata(root.join("a")).unwrap().nlink(), 3);
    assert_eq!(inode("s"), inode("s2"));
    assert_eq!(fs::symlink_metadata(root.join("s")).unwrap().uid(), 9);
    assert_eq!(fs::read_link(root.join("s")).unwrap(), Path::new("/nowhere/at/all"));
    assert_eq!(fs::read_link(root.join("long")).unwrap(), Path::new(&long));
}

#[tokio::test]
async fn devices_and_fifos() {
    if not_root() {
        return;
    }
    let (_f, root) = unpacked(&[
        node(3, "dev/null", (1, 3)),
        node(4, "dev/sda", (8, 17)).mode(0o660).owner(0, 6),
        node(6, "dev/pipe", (0, 0)).mtime(9),
    ])
    .await;
    let null = fs::symlink_metadata(root.join("dev/null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o666));
    let sda = fs::symlink_metadata(root.join("dev/sda")).unwrap();
    assert!(sda.file_type().is_block_device());
    assert_eq!((sda.rdev(), sda.gid()), (rustix::fs::makedev(8, 17), 6));
    let pipe = fs::symlink_metadata(root.join("dev/pipe")).unwrap();
    assert!(pipe.file_type().is_fifo());
    assert_eq!(pipe.mtime(), 9);
}

#[tokio::test]
async fn extended_attributes() {
    if not_root() {
        return;
    }
    // VFS_CAP_REVISION_2 with cap_net_bind_service, effective (linux/capability.h).
    let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
    capability.resize(20, 0);
    let (_f, root) = unpacked(&[
        file("ping", "x").owner(5, 5).mode(0o755).xattr("security.capability", &capability),
        file("f", "x").xattr("user.bin", b"a\nb=c\n\0d").xattr("security.selinux", "label").xattr("trusted.other", "x"),
        dir("d").xattr("user.k", "v"),
        symlink("l", "f"),
    ])
    .await;
    assert_eq!(xattr(&root.join("ping"), "security.capability"), Some(capability));
    assert_eq!(xattr(&root.join("f"), "user.bin"), Some(b"a\nb=c\n\0d".to_vec()));
    assert_eq!(xattr(&root.join("d"), "user.k"), Some(b"v".to_vec()));
    assert_eq!(xattr(&root.join("f"), "trusted.other"), None);
}

#[tokio::test]
async fn deletions() {
    if not_root() {
        return;
    }
    let (_f, root) = unpacked(&[
        file("etc/.wh.gone", ""),
        file("etc/.wh.kept", ""),
        file("etc/kept", "new"),
        file("etc/again", "new"),
        file("etc/.wh.again", ""),
        file("etc/.wh.dir", ""),
        file("etc/dir/inside", "x"),
        dir("etc/dir2"),
        file("etc/.wh.dir2", ""),
        dir("opq"),
        file("opq/.wh..wh..opq", ""),
        file("opq/x", "x"),
        file("fresh/.wh..wh..opq", ""),
        file(".wh..wh.plnk/1.2", "aufs"),
        file(".wh..wh.aufs", "aufs"),
    ])
    .await;
    assert!(is_whiteout(&root.join("etc/gone")));
    assert_eq!(fs::read(root.join("etc/kept")).unwrap(), b"new");
    assert_eq!(fs::read(root.join("etc/again")).unwrap(), b"new");
    for name in ["etc/dir", "etc/dir2", "opq", "fresh"] {
        assert!(is_opaque(&root.join(name)), "{name}");
    }
    assert!(!is_opaque(&root.join("etc")));
    assert_eq!(names(&root), ["etc", "fresh", "opq"]);
}

#[tokio::test]
async fn layers_merge_under_overlayfs() {
    if not_root() {
        return;
    }
    let low = layer(&[file("etc/a", "1"), file("etc/b", "1"), dir("gone"), file("gone/x", "1"), file("opq/old", "1")]);
    let mid = layer(&[file("etc/.wh.a", ""), file(".wh.gone", ""), file("opq/.wh..wh..opq", ""), file("opq/new", "2")]);
    let top = layer(&[file("etc/c", "3")]);
    let (fixture, image) = pull(&[low, mid, top]).await;
    let image = image.unwrap();
    let [up, work, merged] = ["up", "work", "merged"].map(|name| fixture.dir.path().join(name));
    for path in [&up, &work, &merged] {
        fs::create_dir(path).unwrap();
    }
    let lower: Vec<String> = image.layers.iter().rev().map(|path| path.display().to_string()).collect();
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), up.display(), work.display());
    // In a mount namespace of its own the mount cannot outlive this test.
    let script = "mount -t overlay overlay -o \"$1\" \"$2\" && cd \"$2\" && find . -mindepth 1 | sort";
    let out = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh", &options])
        .arg(&merged)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "./etc\n./etc/b\n./etc/c\n./opq\n./opq/new\n");
}

#[tokio::test]
async fn replacing() {
    if not_root() {
        return;
    }
    let (_f, root) = unpacked(&[
        dir("d"),
        file("d/x", "1"),
        symlink("d", "elsewhere"),
        symlink("l", "target"),
        dir("l"),
        file("l/y", "2"),
        file("f", "old"),
        file("f", "new"),
        dir("df"),
        file("df/z", "1"),
        file("df", "file"),
        file("fd", "file"),
        dir("fd"),
        dir("kept").mode(0o700),
        file("kept/a", "1"),
        dir("kept").mode(0o711),
    ])
    .await;
    assert_eq!(fs::read_link(root.join("d")).unwrap(), Path::new("elsewhere"));
    assert_eq!(fs::read(root.join("l/y")).unwrap(), b"2");
    assert!(fs::symlink_metadata(root.join("l")).unwrap().is_dir());
    assert_eq!(fs::read(root.join("f")).unwrap(), b"new");
    assert_eq!(fs::read(root.join("df")).unwrap(), b"file");
    assert!(root.join("fd").is_dir());
    assert_eq!(fs::symlink_metadata(root.join("kept")).unwrap().mode() & 0o777, 0o711);
    assert!(root.join("kept/a").exists());
}

#[tokio::test]
async fn implicit_parents_and_directory_links() {
    if not_root() {
        return;
    }
    let (_f, root) = unpacked(&[
        file("made/up/f", "1").owner(5, 5),
        dir("usr/lib"),
        symlink("lib", "usr/lib"),
        file("lib/so", "2"),
        symlink("abs", "/usr/lib/deep"),
        file("abs/so", "3"),
        symlink("up", "usr/../new/place"),
        file("up/f", "4"),
        dir("x"),
        symlink("x/back", "../usr"),
        file("x/back/f", "5"),
        dir("sg").mode(0o2775).owner(0, 50),
        file("sg/sub/f", "6"),
    ])
    .await;
    let read = |p: &str| fs::read_to_string(root.join(p)).unwrap();
    let made = fs::metadata(root.join("made/up")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (0, 0, 0o755));
    assert_eq!(read("usr/lib/so"), "2");
    assert_eq!(read("usr/lib/deep/so"), "3");
    assert_eq!(read("new/place/f"), "4");
    assert_eq!(read("usr/f"), "5");
    let sub = fs::metadata(root.join("sg/sub")).unwrap();
    assert_eq!((sub.gid(), sub.mode() & 0o7777), (0, 0o755));
}

#[tokio::test]
async fn long_names() {
    if not_root() {
        return;
    }
    let deep = format!("{}/file", vec!["directory-with-a-long-name"; 40].join("/"));
    let mut gnu = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o644);
    let gnu_name = format!("gnu/{}", "n".repeat(200));
    gnu.append_data(&mut header, &gnu_name, &b"gnu"[..]).unwrap();
    let gnu = gnu.into_inner().unwrap();
    let both = [
        archive(&[file(&deep, "deep"), hardlink("link", &deep)])
            .split_at(archive(&[file(&deep, "deep"), hardlink("link", &deep)]).len() - 1024)
            .0
            .to_vec(),
        gnu,
    ]
    .concat();
    let (_f, image) = pull(&[from_blob(both.clone(), &both, "application/vnd.oci.image.layer.v1.tar")]).await;
    let root = image.unwrap().layers[0].clone();
    assert_eq!(fs::read(root.join(&deep)).unwrap(), b"deep");
    assert_eq!(fs::read(root.join("link")).unwrap(), b"deep");
    assert_eq!(fs::read(root.join(&gnu_name)).unwrap(), b"gnu");
}

/// Sparse files as GNU tar itself writes them, in all of its formats.
#[tokio::test]
async fn sparse() {
    if not_root() {
        return;
    }
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let size = 3 << 20;
    let sparse = fs::File::create(dir.path().join("sparse")).unwrap();
    sparse.set_len(size).unwrap();
    // More pieces than one old GNU header holds.
    for piece in 0..40u64 {
        sparse.write_all_at(&[piece as u8 + 1; 4096], piece * 65536 + 4096).unwrap();
    }
    sparse.sync_all().unwrap();
    let want = fs::read(dir.path().join("sparse")).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let out = std::process::Command::new("tar")
            .arg("-cS")
            .args(format)
            .arg("-C")
            .arg(dir.path())
            .args(["-f", "-", "sparse"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(out.stdout.len() < size as usize / 2, "{format:?}: tar kept the holes");
        let (_f, image) =
            pull(&[from_blob(out.stdout.clone(), &out.stdout, "application/vnd.oci.image.layer.v1.tar")]).await;
        let path = image.unwrap_or_else(|e| panic!("{format:?}: {}", chain(&e))).layers[0].join("sparse");
        assert!(fs::read(&path).unwrap() == want, "{format:?}");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < size / 2, "{format:?}: holes were filled");
    }
}

#[tokio::test]
async fn compressions() {
    if not_root() {
        return;
    }
    let tar = archive(&[file("f", vec![7; 300_000])]);
    let halves = tar.split_at(1000);
    let blobs = [
        (tar.clone(), "application/vnd.oci.image.layer.v1.tar"),
        (gzip(&tar), "application/vnd.oci.image.layer.v1.tar+gzip"),
        ([gzip(halves.0), gzip(halves.1)].concat(), "application/vnd.docker.image.rootfs.diff.tar.gzip"),
        (zstd::encode_all(&tar[..], 3).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd"),
        // The name is wrong, the content right.
        (zstd::encode_all(&tar[..], 3).unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip"),
    ];
    for (blob, kind) in blobs {
        let (_f, image) = pull(&[from_blob(blob, &tar, kind)]).await;
        let image = image.unwrap_or_else(|e| panic!("{kind}: {}", chain(&e)));
        assert_eq!(fs::metadata(image.layers[0].join("f")).unwrap().len(), 300_000);
    }
}

#[tokio::test]
async fn empty_layers() {
    if not_root() {
        return;
    }
    let (_f, root) = unpacked(&[]).await;
    assert!(names(&root).is_empty());
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o7777, 0o755);
    // Nothing at all, not even the two closing blocks.
    let (_f, image) = pull(&[from_blob(vec![], &[], "application/vnd.oci.image.layer.v1.tar")]).await;
    assert!(names(&image.unwrap().layers[0]).is_empty());
}
