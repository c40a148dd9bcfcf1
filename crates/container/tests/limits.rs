//! Limits hold, can be changed, and are reported; cgroups freeze, thaw, empty and go.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{World, root_or_skip};
use godwit_container::Cgroup;
use godwit_container::cgroup::{CgroupError, Hierarchies};
use godwit_container::spec::Resources;

const MIB: u64 = 1 << 20;

#[test]
fn a_program_that_takes_too_much_memory_is_killed_and_that_is_known() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new("oom", "exec tail /dev/zero");
    world.spec.resources.memory_bytes = Some(32 * MIB);
    let (exit, _) = world.run_to_end();
    assert_eq!((exit.signal, exit.oom_killed), (Some(9), true));
    let usage = world.cgroup().usage().unwrap();
    assert!(usage.oom_kills >= 1 && usage.memory_peak_bytes <= 32 * MIB && usage.cpu_usec > 0, "{usage:?}");
    world.finish();
}

#[test]
fn processes_are_counted_and_limited() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new("pids", "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done; echo all started");
    world.spec.resources.pids_max = Some(8);
    let (_, log) = world.run_to_end();
    assert!(log.contains("can't fork") && !log.contains("all started"), "{log}");
    world.finish();
}

#[test]
fn a_processor_limit_holds_and_can_be_changed() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new("cpu", "echo ready; while :; do :; done");
    world.spec.resources.cpu_millis = Some(100);
    let _keeper = world.start();
    world.wait_for_log("ready");
    let share = || {
        let (start, used) = (std::time::Instant::now(), world.cgroup().usage().unwrap().cpu_usec);
        // Time itself is measured here: let some pass.
        std::thread::sleep(std::time::Duration::from_millis(700));
        (world.cgroup().usage().unwrap().cpu_usec - used) as f64 / start.elapsed().as_micros() as f64
    };
    let limited = share();
    assert!(limited < 0.2, "{limited} of a core with a limit of 0.1");
    world.cgroup().set(&Resources::default()).unwrap();
    // More than the limit allowed, as soon as the machine has it to give.
    let deadline = std::time::Instant::now() + common::EVENT_TIMEOUT;
    loop {
        let unlimited = share();
        if unlimited > 0.15 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{unlimited} of a core without a limit");
    }
    world.finish();
}

#[test]
fn memory_cannot_be_shrunk_below_use() {
    if !root_or_skip() {
        return;
    }
    // 20 MiB in a memory file system cannot be given back.
    let world =
        World::new("shrink", "head -c 20971520 /dev/zero > /dev/shm/held; echo ready; while :; do sleep 1; done");
    let keeper = world.start();
    world.wait_for_log("ready");
    let cgroup = world.cgroup();
    cgroup.set(&Resources { memory_bytes: Some(64 * MIB), ..Resources::default() }).unwrap();
    let refused = cgroup.set(&Resources { memory_bytes: Some(8 * MIB), ..Resources::default() });
    assert!(matches!(refused, Err(CgroupError::LimitBelowUse { .. })), "{refused:?}");
    assert_eq!(keeper.exec("wc -c < /dev/shm/held").1, "20971520\n");
    assert_eq!(cgroup.usage().unwrap().oom_kills, 0);
    world.finish();
}

#[test]
fn a_container_freezes_and_goes_on() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("freeze", "sleep 600 & i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done");
    let keeper = world.start();
    world.wait_for_log("3");
    let cgroup = world.cgroup();
    for _ in 0..20 {
        cgroup.freeze().unwrap();
        assert!(cgroup.is_frozen().unwrap());
        cgroup.thaw().unwrap();
        assert!(!cgroup.is_frozen().unwrap());
    }
    cgroup.freeze().unwrap();
    // What it wrote before is drained by its keeper, which is not frozen.
    let lines = world.log_of_frozen(&keeper).lines().count();
    // Time for twenty more, if it ran.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(world.log_of_frozen(&keeper).lines().count(), lines, "nothing runs while frozen");
    // The shell and the sleep it started first; it may have been frozen between two of its short ones.
    assert!(cgroup.pids().unwrap().len() >= 2);
    // Frozen processes can be ended.
    cgroup.kill_all().unwrap();
    assert!(cgroup.pids().unwrap().is_empty());
    world.finish();
}

/// The core files of version 2 work on a hierarchy without controllers too.
#[test]
fn version_2_freezes_and_kills() {
    if !root_or_skip() {
        return;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let Some(root) = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4))
    else {
        println!("skipped: no cgroup2 hierarchy is mounted");
        return;
    };
    let path = format!("/godwit-test-v2-{}/box", std::process::id());
    let own = std::path::Path::new(root).join(path.trim_start_matches('/'));
    std::fs::create_dir_all(&own).unwrap();
    let hierarchies = Hierarchies::v2_at(root.as_ref());
    let cgroup = Cgroup::open_in(&path, hierarchies.clone()).unwrap();
    let mut child = std::process::Command::new("sh").args(["-c", "while :; do sleep 0.01; done"]).spawn().unwrap();
    cgroup.join(child.id()).unwrap();
    for _ in 0..10 {
        cgroup.freeze().unwrap();
        assert!(cgroup.is_frozen().unwrap());
        cgroup.thaw().unwrap();
        assert!(!cgroup.is_frozen().unwrap());
    }
    assert!(cgroup.pids().unwrap().contains(&child.id()));
    cgroup.freeze().unwrap();
    cgroup.kill_all().unwrap();
    child.wait().unwrap();
    cgroup.delete().unwrap();
    Cgroup::open_in(path.trim_end_matches("/box"), hierarchies).unwrap().delete().unwrap();
    assert!(!own.exists());
}
