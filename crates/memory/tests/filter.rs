//! The library for criu in other programs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use godwit_memory::{
    ObjectId, ObjectKind, ObjectPages, PageFilter, PageRange, PageSet, ProcessPages, Round, page_size,
};

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

/// Where CRIU reads a process's page map itself, pages that are listed are not there.
#[test]
fn listed_pages_are_not_in_the_page_map() {
    const PAGES: u64 = 16;
    let memory = vec![1u8; (PAGES as usize + 1) * page_size() as usize];
    let start = (memory.as_ptr() as u64).next_multiple_of(page_size());
    let directory = tempfile::Builder::new().prefix("godwit-filter-").tempdir_in("/dev/shm").unwrap();
    let filter = PageFilter::install(directory.path()).unwrap();
    // Of PAGES from here on, one figure each.
    let told = |first: u64, pages: u64| {
        let numbers = [u64::from(std::process::id()), start + first * page_size(), pages].map(|n| n.to_string());
        let output = Command::new(common::victim_path()).envs(filter.environment()).arg("pages").args(numbers).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(told(0, PAGES), "1111111111111111", "without a list");
    let part = |from: u64, to: u64| PageRange { start: start + from * page_size(), end: start + to * page_size() };
    let process = ProcessPages {
        pid: std::process::id().cast_signed(),
        inner_pid: 1,
        reset: false,
        pages: PageSet::default(),
        gone: PageSet::default(),
        carried: [part(4, 8), part(12, 20)].into_iter().collect(),
        shared: Vec::new(),
        left: Vec::new(),
        untracked: None,
        stopped: None,
    };
    filter.leave_out(&Round { processes: vec![process], ..Round::default() }).unwrap();
    assert_eq!(told(0, PAGES), "1111000011110000");
    assert_eq!(told(3, 2), "10");
    assert_eq!(told(5, 2), "00");
    assert_eq!(told(7, 3), "011");
    assert_eq!(memory[0], 1);
}
