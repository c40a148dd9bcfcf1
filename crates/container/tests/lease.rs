//! What a keeper does when the lease of its host ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{World, root_or_skip};
use godwit_container::keeper::fence::boottime_ms;

const COUNTS: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done";

/// As an agent writes it: whoever reads sees the old or the new.
fn write(lease: &Path, text: &str) {
    let new = lease.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, lease).unwrap();
}

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !there() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_container_stands_still_at_the_end_and_goes_on_by_the_agents_word() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("lease", COUNTS);
    let lease = world.dir().with_file_name("lease");
    let end = boottime_ms() + 4_000;
    write(&lease, &end.to_string());
    let keeper = world.spawn_with(Some(&lease));
    keeper.client.create().unwrap();
    keeper.client.start().unwrap();
    world.wait_for_log("3");
    assert!(keeper.client.status().unwrap().guarded);
    // Nobody is needed for it: the connection is gone as with an agent that was killed.
    drop(keeper);
    wait_until("it stands still", || world.cgroup().is_frozen().unwrap());
    assert!(boottime_ms() >= end, "not before the end");
    assert!(boottime_ms() < end + 1_000, "at once");
    // Somebody thaws it all the same.
    world.cgroup().thaw().unwrap();
    wait_until("it stands still again", || world.cgroup().is_frozen().unwrap());
    let keeper = world.connect();
    let state = keeper.client.status().unwrap();
    assert!(state.fenced && state.pid.is_some());
    let refused = keeper.client.unfence().unwrap_err().to_string();
    assert!(refused.contains("lease"), "{refused}");
    assert!(world.cgroup().is_frozen().unwrap());
    write(&lease, &(boottime_ms() + 60_000).to_string());
    assert!(world.cgroup().is_frozen().unwrap(), "a new lease alone is not the word");
    let lines = world.log_of_frozen(&keeper).lines().count();
    keeper.client.unfence().unwrap();
    assert!(!keeper.client.status().unwrap().fenced);
    wait_until("it goes on", || world.log().lines().count() > lines);
    keeper.client.quit(true).unwrap();
    world.finish();
}

#[test]
fn nothing_starts_after_the_end() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("ended", COUNTS);
    let lease = world.dir().with_file_name("lease");
    write(&lease, "1");
    let keeper = world.spawn_with(Some(&lease));
    keeper.client.create().unwrap();
    let refused = keeper.client.start().unwrap_err().to_string();
    assert!(refused.contains("lease"), "{refused}");
    write(&lease, "none");
    keeper.client.start().unwrap();
    world.wait_for_log("3");
    keeper.client.quit(true).unwrap();
    world.finish();
}

#[test]
fn who_was_frozen_by_a_move_is_taken_over() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("moved", COUNTS);
    let lease = world.dir().with_file_name("lease");
    write(&lease, "none");
    let keeper = world.spawn_with(Some(&lease));
    keeper.client.create().unwrap();
    keeper.client.start().unwrap();
    world.wait_for_log("3");
    world.cgroup().freeze().unwrap();
    keeper.client.fence().unwrap();
    assert!(keeper.client.status().unwrap().fenced && world.cgroup().is_frozen().unwrap());
    keeper.client.unfence().unwrap();
    assert!(!world.cgroup().is_frozen().unwrap());
    keeper.client.quit(true).unwrap();
    world.finish();
}
