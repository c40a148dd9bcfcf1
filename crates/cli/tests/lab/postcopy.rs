//! Post-copy: memory that follows when the container runs on the other host already.

use std::time::Duration;

use godwit_lab::Node;
use serde_json::Value;

use crate::moves::{WORKLOAD, status, wait_listening};
use crate::sending::WRITER;
use crate::site;
use crate::world::World;

/// A writer of 80 MB/s on a link of 25 MB/s, which no rounds can catch up with.
struct Writer {
    world: World,
    from: u32,
    to: u32,
}

impl Writer {
    fn begin(tag: &str) -> Option<Self> {
        let world = World::up(tag, 2, &["--link", "200mbit"])?;
        world.apply(WRITER);
        world.wait_running("t/w-1");
        wait_listening(&world, &format!("{}:7000", world.host_address(1)));
        let from: u32 = world.host_of("t/w-1")[1..].parse().unwrap();
        Some(Self { world, from, to: 3 - from })
    }

    /// Begins a move and waits until the container is the other host's, while most of its memory is still here.
    fn handed_over(&self) -> String {
        let to = format!("h{}", self.to);
        let id =
            self.world.ok(&["migrate", "t/w-1", "--to", &to, "--mode", "post-copy", "--compress", "never", "--detach"]);
        let owned = || (self.world.host_of("t/w-1") == to).then_some(());
        assert!(self.world.until(Duration::from_secs(30), owned).is_some(), "{}", self.world.logs());
        id.trim().to_owned()
    }

    /// It runs on the destination and nowhere else, as another process than before: started anew from its files, which
    /// are as they were when it stood still.
    fn started_anew(&self, before: &Value) {
        let to = format!("h{}", self.to);
        self.world.wait_within("t/w-1", "anew", Duration::from_secs(20), |c| {
            c["state"] == "running" && c["host"] == to.as_str() && c["moving"].is_null()
        });
        let answers = || {
            let address = format!("{}:7000", self.world.host_address(1));
            let said = self.world.on_client(&[crate::world::GODWIT, "workload", "status", "--address", &address]);
            let said: Value = serde_json::from_slice(&said.stdout).ok()?;
            (said["instance"] != before["instance"]).then_some(said)
        };
        let after = self.world.until(Duration::from_secs(20), answers);
        if after.is_none() {
            println!("{}\n{}\n{}", self.world.ok(&["events"]), self.world.ok(&["ps"]), String::from_utf8_lossy(&self.world.lab.exec(Node::Host(self.to), &["sh", "-c", "ps axo pid,ppid,stat,args | tail -30; cat /var/lib/godwit/agent/containers/*/state.json /var/lib/godwit/agent/containers/*/container.json /var/lib/godwit/agent/containers/*/filler.json"]).unwrap().output().unwrap().stdout));
        }
        let after = after.unwrap_or_else(|| panic!("it never started anew\n{}", self.world.logs()));
        assert_eq!(after["ok"], true, "{after:#}");
        let id = self.world.container("t/w-1").unwrap()["id"].as_str().unwrap().to_owned();
        let wrong = || {
            (1..=2).map(|n| (n, site::remains(&self.world, n))).find(|(n, remains)| *remains != self.wanted(*n, &id))
        };
        let clean = self.world.until(Duration::from_secs(20), || wrong().is_none().then_some(()));
        assert!(clean.is_some(), "{:?}\n{}", wrong(), self.world.logs());
    }

    fn wanted(&self, host: u32, id: &str) -> Vec<String> {
        if host == self.to { site::one_container(id, "t.w-1") } else { Vec::new() }
    }
}

#[test]
fn what_rounds_cannot_catch_up_with_follows_after_the_hand_over() {
    let Some(Writer { world, from, to }) = Writer::begin("post-copy") else { return };
    let address = format!("{}:7000", world.host_address(1));
    let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
    let before = status(&world);
    let never = ["--compress", "never"];
    let budget = ["--max-downtime", "400", "--never-slow"];
    let mut to = [format!("h{to}"), format!("h{from}")].into_iter().cycle();
    for options in [&["--mode", "post-copy"][..], &budget] {
        let to = to.next().unwrap();
        let done = world.json(&[&["migrate", "t/w-1", "--to", &to][..], options, &never].concat());
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        let summary = &done["summary"];
        let late = summary["late_bytes"].as_u64().unwrap();
        println!("{options:?}: {late} bytes late, {summary:#}");
        // At 25 MB/s all of it would have taken two seconds and more.
        assert!(late > 32 << 20, "{done:#}");
        assert!(summary["downtime_ms"].as_f64().unwrap() < 1000.0, "{done:#}");
        assert_eq!(summary["slowed_to_percent"], Value::Null, "{done:#}");
        let after = status(&world);
        for same in ["instance", "pid", "started_unix_ms"] {
            assert_eq!(after[same], before[same], "{same}");
        }
        assert_eq!((&after["ok"], &after["streams_broken"]), (&true.into(), &0.into()), "{after:#}");
    }
    client.finish();
    world.down();
}

#[test]
fn the_sources_agent_is_killed_before_all_memory_has_followed() {
    let Some(writer) = Writer::begin("post-source") else { return };
    let before = status(&writer.world);
    writer.handed_over();
    writer.world.lab.kill_agent(writer.from).unwrap();
    writer.world.lab.start_agent(writer.from).unwrap();
    writer.started_anew(&before);
    writer.world.down();
}

#[test]
fn the_destinations_agent_is_killed_before_all_memory_has_followed() {
    let Some(writer) = Writer::begin("post-dest") else { return };
    let before = status(&writer.world);
    writer.handed_over();
    writer.world.lab.kill_agent(writer.to).unwrap();
    writer.world.lab.start_agent(writer.to).unwrap();
    writer.started_anew(&before);
    writer.world.down();
}

#[test]
fn the_link_is_cut_before_all_memory_has_followed() {
    let Some(writer) = Writer::begin("post-cut") else { return };
    let before = status(&writer.world);
    writer.handed_over();
    writer.world.lab.cut_link(Node::Host(writer.from)).unwrap();
    let lost = || writer.world.ok(&["events"]).contains("is ended and started anew").then_some(());
    assert!(writer.world.until(Duration::from_secs(40), lost).is_some(), "{}", writer.world.logs());
    writer.world.lab.restore_link(Node::Host(writer.from)).unwrap();
    writer.started_anew(&before);
    writer.world.down();
}

/// The kernel's switch for merging equal pages, which takes soft-dirty marks away; off again when this is dropped.
struct Merging;

const MERGING: &str = "/sys/kernel/mm/ksm/run";

impl Merging {
    fn begin() -> Self {
        std::fs::write(MERGING, "1").unwrap();
        Self
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        let _ = std::fs::write(MERGING, "0");
    }
}

/// Only a kernel whose one means are soft-dirty bits can be left without any: `./dev test old-kernel`.
#[test]
fn where_nothing_tells_written_pages_memory_follows_if_that_is_allowed() {
    if !matches!(godwit_memory::check_tracking(), Ok(godwit_memory::Means::SoftDirty)) {
        println!("skipped: this kernel has a means that cannot be taken away");
        return;
    }
    let Some(world) = World::up("untold", 2, &["--link", "10gbit"]) else { return };
    world.apply(WORKLOAD);
    world.wait_running("t/w-1");
    let address = format!("{}:7000", world.host_address(1));
    wait_listening(&world, &address);
    let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
    let _merging = Merging::begin();
    let other = |world: &World| if world.host_of("t/w-1") == "h1" { "h2" } else { "h1" };
    for (options, late) in
        [(&["--mode", "post-copy"][..], true), (&["--max-downtime", "60000"][..], true), (&[][..], false)]
    {
        let done = world.json(&[&["migrate", "t/w-1", "--to", other(&world)][..], options].concat());
        let summary = &done["summary"];
        println!("{options:?}: downtime {} ms, late {}", summary["downtime_ms"], summary["late_bytes"]);
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        assert!(summary["stood_still"].as_str().unwrap().contains("/sys/kernel/mm/ksm/run"), "{done:#}");
        assert_eq!(summary["late_bytes"].as_u64().unwrap() > 32 << 20, late, "{done:#}");
        assert_eq!(summary["paused_ms"], Value::Null, "{done:#}");
    }
    let said = world.refused(1, &["migrate", "t/w-1", "--to", other(&world), "--mode", "pre-copy"]);
    assert!(said.contains("/sys/kernel/mm/ksm/run"), "{said}");
    let after = status(&world);
    assert_eq!((&after["ok"], &after["streams_broken"]), (&true.into(), &0.into()), "{after:#}");
    client.finish();
    world.down();
}
