//! Pages that come after the processes run.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::held::{BASE, Held, INNER, PAGES, World};
use common::{PAGE, root_or_skip};
use godwit_memory::{FillError, FillerProcess, Key, Late, LateFeed, PageRange, PageSet, PageStore};

const SOON: Duration = Duration::from_secs(10);
const KEY: Key = Key::Process(INNER);

fn range(from: u64, to: u64) -> PageRange {
    PageRange { start: BASE + from * PAGE as u64, end: BASE + to * PAGE as u64 }
}

/// What page number `n` holds, as `store()` makes it.
fn content(pages: std::ops::Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (pages.end - pages.start) as usize * PAGE];
    pages.zip(bytes.chunks_mut(PAGE)).for_each(|(n, page)| page[..8].copy_from_slice(&(n + 1).to_ne_bytes()));
    bytes
}

/// Every third page of the first half, and all of the second half, come late.
fn late(n: u64) -> bool {
    n >= PAGES / 2 || n.is_multiple_of(3)
}

fn begin(world: &World) -> (FillerProcess, LateFeed) {
    let store = PageStore::new().unwrap();
    (0..PAGES)
        .filter(|n| !late(*n))
        .for_each(|n| store.put(KEY, range(n, n + 1).start, 0, &content(n..n + 1)).unwrap());
    let pages: PageSet = (0..PAGES).filter(|n| late(*n)).map(|n| range(n, n + 1)).collect();
    let (late, feed) = Late::new(HashMap::from([(KEY, pages)])).unwrap();
    let filler = world.start();
    filler.expect(late).unwrap();
    filler.load(Arc::new(store)).unwrap();
    (filler, feed)
}

#[test]
fn whoever_needs_what_has_not_come_waits_for_it() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let (filler, mut feed) = begin(&world);
    let mut wants = feed.wants().unwrap();
    let mut held = Held::start(&world);
    assert_eq!(held.ask("read 1"), "2", "it is here");
    filler.restored(Vec::new()).unwrap();
    assert_eq!(held.ask("finish"), "finished");
    held.tell("read 3000");
    assert_eq!(wants.hear().unwrap(), Some((KEY, range(3000, 3001))));
    // What is here is put in behind it, and the rest is waited for.
    let here = (0..PAGES).filter(|n| !late(*n)).count() * PAGE;
    let filled = || filler.progress().unwrap().filled_bytes;
    let deadline = std::time::Instant::now() + SOON;
    while filled() < here as u64 {
        assert!(std::time::Instant::now() < deadline, "{} of {here}", filled());
        std::thread::yield_now();
    }
    assert_eq!(filler.wait(Duration::from_millis(100)).unwrap(), None);
    feed.pages(KEY, &[(range(3000, 3001), &content(3000..3001))]).unwrap();
    assert_eq!(held.line(), "3001");
    for n in (0..PAGES / 2).filter(|n| late(*n) && *n != 3000) {
        feed.pages(KEY, &[(range(n, n + 1), &content(n..n + 1))]).unwrap();
    }
    for n in (PAGES / 2..PAGES).step_by(256) {
        feed.pages(KEY, &[(range(n, n + 256), &content(n..n + 256))]).unwrap();
    }
    feed.complete().unwrap();
    let report = filler.wait(SOON).unwrap().expect("everything is filled");
    assert_eq!((report.filled_bytes, report.left_bytes, report.unplaced_pages), (PAGES * PAGE as u64, 0, 0));
    assert_eq!(held.ask("all"), "0", "pages with other content");
}

#[test]
fn nobody_goes_on_without_what_was_lost() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let (filler, mut feed) = begin(&world);
    let mut held = Held::start(&world);
    filler.restored(Vec::new()).unwrap();
    assert_eq!(held.ask("finish"), "finished");
    feed.pages(KEY, &[(range(0, 1), &content(0..1))]).unwrap();
    held.tell("read 3000");
    drop(feed);
    let error = filler.wait(SOON).unwrap_err();
    assert!(matches!(&error, FillError::Remote(text) if text.contains("did not come")), "{error}");
    std::thread::sleep(Duration::from_millis(300));
    held.kill();
    assert_eq!(held.line(), "", "it has read something");
}
