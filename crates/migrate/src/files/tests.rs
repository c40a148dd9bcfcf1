use std::collections::HashSet;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::*;

/// Writes straight through, as the wire would.
pub(super) struct Through<'a>(pub(super) &'a mut Writer);

impl Sink for Through<'_> {
    fn entry(&mut self, entry: Entry) -> bool {
        let json = serde_json::to_vec(&entry).unwrap();
        self.0.entry(serde_json::from_slice(&json).unwrap()).unwrap();
        true
    }
    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> bool {
        self.0.data(offset, &bytes).unwrap();
        true
    }
    fn remove(&mut self, tree: &str, path: Vec<u8>) -> bool {
        self.0.remove(tree, &path).unwrap();
        true
    }
}

pub(super) struct Pair {
    pub from: tempfile::TempDir,
    pub to: tempfile::TempDir,
    pub scanner: Scanner,
    pub writer: Writer,
}

impl Pair {
    /// To a destination that takes patches, or to one that does not.
    pub fn new(patches: bool) -> Self {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut scanner = Scanner::new("root", from.path());
        if patches {
            scanner.send_patches();
        }
        let writer = Writer::open(&[("root".into(), to.path().into())]).unwrap();
        Self { from, to, scanner, writer }
    }

    fn round(&mut self) -> ScanStats {
        let stats = self.scanner.round(&HashSet::new(), None, &mut Through(&mut self.writer)).unwrap();
        self.writer.end_round().unwrap();
        stats
    }

    pub fn assert_same(&self) {
        assert_eq!(listing(self.from.path()), listing(self.to.path()));
        let diff = Command::new("diff")
            .args(["-r", "--no-dereference", "-x", "fifo", "-x", "whiteout"])
            .args([self.from.path(), self.to.path()])
            .output()
            .unwrap();
        assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
    }
}

/// Path, mode, owner, size, links and modification time of everything.
fn listing(root: &Path) -> Vec<String> {
    let out = Command::new("find").arg(root).args(["-printf", "%P %m %U %G %n %y %l %T@ %D\\n"]).output().unwrap();
    let mut lines: Vec<String> =
        String::from_utf8(out.stdout).unwrap().lines().map(|l| l.rsplit_once(' ').unwrap().0.to_owned()).collect();
    lines.sort();
    lines
}

pub(super) fn settle() {
    // Past the grain within which a ctime says nothing: waiting for the clock is the very thing under test.
    let begun = std::time::Instant::now();
    while begun.elapsed().as_millis() < u128::from(CTIME_GRAIN_MS) + 15 {
        std::thread::yield_now();
    }
}

#[test]
fn every_kind_of_file_arrives_and_the_next_round_sends_only_changes() {
    every_kind_of_file(false);
    every_kind_of_file(true);
}

fn every_kind_of_file(patches: bool) {
    let mut pair = Pair::new(patches);
    let at = |p: &str| pair.from.path().join(p);
    std::fs::create_dir_all(at("a/b")).unwrap();
    std::fs::write(at("a/file"), "content").unwrap();
    std::fs::write(at("a/b/set-id"), "x").unwrap();
    std::fs::set_permissions(at("a/b/set-id"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::hard_link(at("a/file"), at("a/b/link")).unwrap();
    std::os::unix::fs::symlink("../file", at("a/b/symlink")).unwrap();
    let sparse = std::fs::File::create(at("sparse")).unwrap();
    sparse.write_all_at(b"end", 64 << 20).unwrap();
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    let root = rustix::process::geteuid().is_root();
    if root {
        assert!(Command::new("mknod").arg(at("whiteout")).args(["c", "0", "0"]).status().unwrap().success());
        assert!(Command::new("chown").arg("1234:5678").arg(at("a/file")).status().unwrap().success());
    }
    settle();
    let first = pair.round();
    assert!(first.entries_sent >= 8, "{first:?}");
    pair.assert_same();
    let copy = std::fs::metadata(pair.to.path().join("sparse")).unwrap();
    assert!(copy.blocks() < 1024, "holes stay holes: {} blocks", copy.blocks());
    assert_eq!(
        std::fs::metadata(pair.to.path().join("a/file")).unwrap().ino(),
        std::fs::metadata(pair.to.path().join("a/b/link")).unwrap().ino()
    );

    assert_eq!(pair.round(), ScanStats::default(), "nothing changed, nothing is sent");

    let at = |p: &str| pair.from.path().join(p);
    std::fs::write(at("a/file"), "other").unwrap();
    std::fs::remove_file(at("fifo")).unwrap();
    std::fs::rename(at("a/b"), at("moved")).unwrap();
    std::fs::remove_file(at("sparse")).unwrap();
    std::fs::create_dir(at("sparse")).unwrap();
    settle();
    let second = pair.round();
    assert!(second.removed >= 2 && second.bytes_sent < 100, "{second:?}");
    pair.assert_same();
}

#[test]
fn a_changed_byte_of_a_big_file_costs_a_block() {
    let mut pair = Pair::new(true);
    let (name, link) = (pair.from.path().join("big"), pair.from.path().join("link"));
    std::fs::write(&name, vec![7; 8 << 20]).unwrap();
    std::fs::hard_link(&name, &link).unwrap();
    settle();
    assert_eq!(pair.round().bytes_sent, 8 << 20);
    let file = std::fs::File::options().write(true).open(&link).unwrap();
    for (at, bytes) in [(0u64, 4096), (5 << 20, 4096), ((9 << 20) - 1, 4096)] {
        file.write_all_at(b"x", at).unwrap();
        settle();
        assert_eq!(pair.round().bytes_sent, bytes);
        pair.assert_same();
    }
    file.set_len(3 << 20).unwrap();
    settle();
    assert_eq!(pair.round().bytes_sent, 0);
    pair.assert_same();
    // Another file of the same name is no change of the old one.
    std::fs::rename(&name, pair.from.path().join("moved")).unwrap();
    std::fs::write(&name, "new").unwrap();
    settle();
    pair.round();
    pair.assert_same();
}

#[test]
fn a_write_within_the_clocks_grain_is_not_missed() {
    let mut pair = Pair::new(true);
    let file = pair.from.path().join("f");
    for i in 0..50u8 {
        std::fs::write(&file, [i; 8]).unwrap();
        pair.round();
        std::fs::write(&file, [i ^ 0xff; 8]).unwrap();
        pair.round();
        assert_eq!(std::fs::read(pair.to.path().join("f")).unwrap(), [i ^ 0xff; 8]);
    }
}

#[test]
fn nothing_is_written_outside_of_the_tree() {
    let mut pair = Pair::new(false);
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), pair.to.path().join("door")).unwrap();
    let entry = |path: &str, kind| Entry {
        tree: "root".into(),
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        modified_ns: 0,
        xattrs: Vec::new(),
    };
    for path in ["../x", "/etc/x", "a/../../x", "door/x", ".", "..", "a//../x"] {
        let result = pair.writer.entry(entry(path, EntryKind::File { size: 1 }));
        assert!(result.is_err(), "{path}");
    }
    let link = pair.writer.entry(entry("l", EntryKind::HardLink { to: b"door/x".to_vec() }));
    assert!(link.is_err());
    assert!(matches!(
        pair.writer.entry(Entry { tree: "other".into(), ..entry("x", EntryKind::Directory) }),
        Err(WriteError::UnknownTree { .. })
    ));
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}
