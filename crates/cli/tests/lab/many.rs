//! Containers of many parts.

use std::time::Duration;

use crate::world::{World, text};

const PROCESSES: usize = 150;
/// The limit is far below what as many copies of CRIU need.
const CROWD: &str = r#"
name: many
services:
  p:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, 'i=0; while [ $$i -lt 150 ]; do sleep 100000 & i=$$((i+1)); done; wait']
    mem_limit: 128m
"#;

/// CRIU restores a container by as many copies of itself as it has processes, in its cgroup.
#[test]
fn what_criu_needs_itself_does_not_count_against_the_container() {
    let Some(world) = World::up("many", 2, &[]) else { return };
    world.apply(CROWD);
    world.wait_running("many/p-1");
    let sleeping = || {
        let said = world.ok(&["exec", "many/p-1", "--", "sh", "-c", "cat /proc/[0-9]*/comm"]);
        said.lines().filter(|name| *name == "sleep").count()
    };
    let all = || (sleeping() == PROCESSES).then_some(());
    assert!(world.until(Duration::from_secs(20), all).is_some(), "{} processes", sleeping());
    let to = if world.host_of("many/p-1") == "h1" { "h2" } else { "h1" };
    let done = world.json(&["migrate", "many/p-1", "--to", to]);
    assert_eq!(done["outcome"]["state"], "done", "{done:#}");
    assert_eq!((world.host_of("many/p-1").as_str(), sleeping()), (to, PROCESSES));
    // Its own limit holds again: what needs more is ended, not let be.
    let greedy = ["exec", "many/p-1", "--", "sh", "-c", "dd if=/dev/zero of=/dev/null bs=300M count=1 && echo taken"];
    let said = text(&world.godwit(&greedy).output().unwrap());
    assert!(!said.contains("taken"), "it took more than its limit: {said}");
    world.down();
}
