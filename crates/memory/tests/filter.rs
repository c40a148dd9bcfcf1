//! The library for criu in other programs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use godwit_memory::{ObjectId, ObjectKind, ObjectPages, PageFilter, PageSet, Round};

/// CRIU dumps a tmpfs by tar: a listed file must become a hole of the same size, others stay what they are.
#[test]
fn tar_sees_a_listed_file_as_one_hole() {
    let directory = tempfile::Builder::new().prefix("godwit-filter-").tempdir_in("/dev/shm").unwrap();
    let (files, out) = (directory.path().join("files"), directory.path().join("out"));
    std::fs::create_dir(&files).unwrap();
    std::fs::create_dir(&out).unwrap();
    std::fs::write(files.join("listed"), vec![7; 8 << 20]).unwrap();
    std::fs::write(files.join("other"), vec![9; 1 << 20]).unwrap();
    let meta = std::fs::metadata(files.join("listed")).unwrap();
    let object = ObjectPages {
        id: ObjectId { device: meta.dev(), inode: meta.ino(), sysv: false },
        kind: ObjectKind::File,
        size_bytes: meta.len(),
        reset: false,
        pages: PageSet::default(),
        gone: PageSet::default(),
        compared: false,
    };
    let filter = PageFilter::install(directory.path()).unwrap();
    filter.leave_out(&Round { objects: vec![object], ..Round::default() }).unwrap();
    let archive = directory.path().join("archive");
    // As CRIU calls it (tmpfs_dump in its filesystems.c), but for gzip.
    let tar = |arguments: &[&str], at: &std::path::Path| {
        let status = Command::new("tar")
            .envs(filter.environment())
            .args(arguments)
            .args(["--no-unquote", "--no-wildcards", "--directory"])
            .arg(at)
            .args(if arguments.contains(&"--create") { &["."][..] } else { &[] })
            .status();
        assert!(status.unwrap().success());
    };
    let file = format!("--file={}", archive.display());
    tar(&["--create", "--one-file-system", "--check-links", "--preserve-permissions", "--sparse", &file], &files);
    let size = std::fs::metadata(&archive).unwrap().len();
    assert!((1 << 20..2 << 20).contains(&size), "{size} bytes");
    tar(&["--extract", &file], &out);
    assert_eq!(std::fs::read(out.join("listed")).unwrap(), vec![0; 8 << 20]);
    assert_eq!(std::fs::read(out.join("other")).unwrap(), vec![9; 1 << 20]);
}
