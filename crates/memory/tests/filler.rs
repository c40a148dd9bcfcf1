//! The filler against a program that moves, gives back and forks its memory while it is filled.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PAGE, root_or_skip, victim_path};
use godwit_memory::{FillError, Filler, Key, PageStore};

/// As in examples/victim/lazy.rs.
const BASE: u64 = 0x6000_0000_0000;
const PAGES: u64 = 8 * 512;
const UNKNOWN: u64 = 5;

fn store(pid: i32) -> Arc<PageStore> {
    let store = PageStore::new().unwrap();
    for page in (0..PAGES).filter(|n| n % 8 != UNKNOWN) {
        let mut content = [0; PAGE];
        content[..8].copy_from_slice(&(page + 1).to_ne_bytes());
        store.put(Key::Process(pid), BASE + page * PAGE as u64, 0, &content).unwrap();
    }
    Arc::new(store)
}

fn filled_while_it_changes(seed: u64) {
    if !root_or_skip() {
        return;
    }
    let directory = tempfile::Builder::new().prefix("godwit-filler-").tempdir_in("/dev/shm").unwrap();
    let socket = directory.path().join("lazy-pages.socket");
    let listens = directory.path().join("listens");
    // The store must know the number before the program has one: it starts when the filler listens.
    let mut child = Command::new("/bin/sh")
        .args(["-c", "while [ ! -e \"$3\" ]; do sleep 0.01; done; exec \"$1\" lazy \"$0\" \"$2\""])
        .arg(&socket)
        .arg(victim_path())
        .arg(seed.to_string())
        .arg(&listens)
        .spawn()
        .unwrap();
    let store = store(child.id().cast_signed());
    let filler = Filler::listen(directory.path(), Arc::clone(&store)).unwrap();
    // A socket is there a moment before it is listened on.
    std::fs::write(&listens, "").unwrap();
    let report = filler.wait(Duration::from_secs(60)).unwrap().expect("everything is filled");
    let status = child.wait().unwrap();
    assert!(status.success(), "the program found wrong content: {status}, {report:?}");
    eprintln!("seed {seed}: {report:?}");
    drop(filler);
    assert!(!socket.exists());
}

#[test]
fn memory_is_right_while_it_changes_1() {
    filled_while_it_changes(1);
}

#[test]
fn memory_is_right_while_it_changes_2() {
    filled_while_it_changes(77);
}

#[test]
fn memory_is_right_while_it_changes_3() {
    filled_while_it_changes(4_242);
}

#[test]
fn a_restore_that_breaks_off_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let filler = Filler::listen(directory.path(), Arc::new(PageStore::new().unwrap())).unwrap();
    drop(std::os::unix::net::UnixStream::connect(directory.path().join("lazy-pages.socket")).unwrap());
    let error = filler.wait(Duration::from_secs(10)).unwrap_err();
    assert!(matches!(error, FillError::RestoreFailed), "{error}");
}

#[test]
fn it_can_be_cancelled_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    let filler = Filler::listen(directory.path(), Arc::new(PageStore::new().unwrap())).unwrap();
    assert!(filler.wait(Duration::from_millis(20)).unwrap().is_none());
    let began = Instant::now();
    drop(filler);
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(count(), before);
}
