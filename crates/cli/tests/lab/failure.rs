//! Hosts that die, that are cut off, and controllers that are away. The witness is outside of Godwit: every copy writes the
//! machine's uptime into its own file again and again, and all hosts of a lab have the same clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use godwit_lab::Node;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::site::{kill_everything, shell};
use crate::world::World;

/// From the death of a host until everything it had runs elsewhere, in seconds.
const RECOVERY_LIMIT_S: u64 = 30;
/// Longest pause between two beats of a container that runs, in seconds; a loaded machine makes it wait.
const BEAT_GAP_S: f64 = 2.0;

const APPLICATION: &str = r#"
name: e
services:
  a: &layer
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "while :; do cat /proc/uptime >> /beats; sleep 0.1; done"]
    deploy: {replicas: 3}
    x-godwit: {spread: strict}
  b: *layer
  c: *layer
"#;

const WITH_A_VOLUME: &str = r#"
name: v
services:
  db:
    image: oci:${IMAGES}/busybox:latest
    command: [sh, -c, "while :; do cat /proc/uptime >> /data/beats; sleep 0.1; done"]
    volumes: ["data:/data"]
volumes: {data: {}}
"#;

fn all() -> Vec<String> {
    ["a", "b", "c"].iter().flat_map(|layer| (1..=3).map(move |n| format!("e/{layer}-{n}"))).collect()
}

fn begin(tag: &str, hosts: u32) -> Option<World> {
    let world = World::up(tag, hosts, &["--link", "10gbit"])?;
    world.apply(APPLICATION);
    for name in all() {
        world.wait_running(&name);
    }
    // Every host holds its lease for as long as the controller wants to have seen.
    std::thread::sleep(Duration::from_secs(16));
    Some(world)
}

fn number(host: &str) -> u32 {
    host[1..].parse().unwrap()
}

/// All containers' views, by name.
fn views(world: &World) -> BTreeMap<String, Value> {
    let list = world.json(&["ps"]);
    list.as_array().unwrap().iter().map(|c| (c["name"].as_str().unwrap().to_owned(), c.clone())).collect()
}

/// What of the environment is on a host.
fn on(world: &World, host: &str) -> Vec<String> {
    views(world).into_iter().filter(|(name, c)| name.starts_with("e/") && c["host"] == host).map(|(n, _)| n).collect()
}

/// The times at which a container has run on a host, as it wrote them itself.
fn beats(world: &World, host: &str, id: &str) -> Vec<f64> {
    let text =
        shell(world, number(host), &format!("cat /var/lib/godwit/agent/containers/{id}/upper/beats 2>/dev/null"));
    text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect()
}

fn state_of(world: &World, host: &str) -> String {
    let hosts = world.json(&["host", "list"]);
    let view = hosts.as_array().unwrap().iter().find(|h| h["name"] == host).unwrap().clone();
    view["state"].as_str().unwrap().to_owned()
}

/// Waits until all of these run on other hosts; their views.
fn recovered(world: &World, names: &[String], from: &[&str], since: Instant) -> BTreeMap<String, Value> {
    let limit = Duration::from_secs(RECOVERY_LIMIT_S).saturating_sub(since.elapsed());
    let there = |c: &Value| c["state"] == "running" && from.iter().all(|host| c["host"] != *host);
    let found = world.until(limit, || {
        let views = views(world);
        names.iter().all(|name| there(&views[name])).then_some(views)
    });
    found.unwrap_or_else(|| panic!("not recovered within {RECOVERY_LIMIT_S} s: {:#?}\n{}", views(world), world.logs()))
}

fn spread(world: &World) -> bool {
    let views = views(world);
    ["a", "b", "c"].iter().all(|layer| {
        let mut hosts: Vec<&str> =
            (1..=3).map(|n| views[&format!("e/{layer}-{n}")]["host"].as_str().unwrap()).collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts.len() == 3
    })
}

/// For each of these the copy on the old host was still before the one on the new host ran; the longest time between.
fn never_two(
    world: &World,
    before: &BTreeMap<String, Value>,
    after: &BTreeMap<String, Value>,
    names: &[String],
) -> f64 {
    let mut longest = 0.0;
    for name in names {
        let id = before[name]["id"].as_str().unwrap();
        assert_eq!(after[name]["id"], id, "{name}");
        let old = beats(world, before[name]["host"].as_str().unwrap(), id);
        let first = world.until(Duration::from_secs(10), || {
            beats(world, after[name]["host"].as_str().unwrap(), id).first().copied()
        });
        let (last, first) = (*old.last().unwrap(), first.unwrap());
        assert!(last < first, "{name}: the old copy ran at {last}, the new one at {first}\n{}", world.logs());
        longest = f64::max(longest, first - last);
    }
    longest
}

/// Nothing but these was started anew.
fn untouched(before: &BTreeMap<String, Value>, after: &BTreeMap<String, Value>, lost: &[String]) {
    for (name, was) in before.iter().filter(|(name, _)| !lost.contains(name)) {
        let is = &after[name];
        for key in ["host", "generation"] {
            assert_eq!(is[key], was[key], "{name}: {key}");
        }
        assert_eq!(is["status"]["pid"], was["status"]["pid"], "{name} was started anew");
    }
}

#[test]
fn what_a_dead_host_had_starts_elsewhere_and_nothing_else() {
    let Some(world) = begin("dies", 5) else { return };
    world.apply(WITH_A_VOLUME);
    let host = world.wait_running("v/db-1")["host"].as_str().unwrap().to_owned();
    let lost = on(&world, &host);
    assert!(!lost.is_empty());
    let before = views(&world);
    kill_everything(&world, number(&host));
    let died = Instant::now();
    let after = recovered(&world, &lost, &[&host], died);
    println!("{} containers run elsewhere {:.1} s after their host died", lost.len(), died.elapsed().as_secs_f64());
    assert!(died.elapsed() > Duration::from_secs(10), "not before its lease has ended");
    never_two(&world, &before, &after, &lost);
    let stays = ["v/db-1".to_owned()];
    untouched(&before, &after, &[&lost[..], &stays[..]].concat());
    assert!(spread(&world));
    assert_eq!(state_of(&world, &host), "failed");
    // Its volume is nowhere else: it is not started without it, and that is said.
    let view =
        world.wait("v/db-1", "told as stranded", |c| c["message"].as_str().is_some_and(|m| m.contains("volumes")));
    assert_eq!((view["state"].as_str(), view["host"].as_str()), (Some("waiting"), Some(&host[..])), "{view:#}");
    let said = world.refused(1, &["host", "activate", &host]);
    assert!(said.contains("lost"), "{said}");

    world.lab.start_agent(number(&host)).unwrap();
    let back = world.wait_running("v/db-1");
    assert_eq!(back["host"], host);
    assert_eq!(state_of(&world, &host), "active");
    let kept = "find /var/lib/godwit/agent/containers -mindepth 1 -maxdepth 1 | wc -l";
    let clean = || (shell(&world, number(&host), kept).trim() == "1").then_some(());
    assert!(world.until(Duration::from_secs(20), clean).is_some(), "what it lost is gone\n{}", world.logs());
    untouched(&after, &views(&world), &stays);
    world.down();
}

/// One host is cut off, on another one the agent dies and leaves its containers behind.
#[test]
fn who_has_lost_its_lease_stands_still_before_others_start() {
    let Some(world) = begin("cut", 5) else { return };
    let before = views(&world);
    let mut hosts: Vec<String> = before
        .iter()
        .filter(|(n, _)| n.starts_with("e/"))
        .map(|(_, c)| c["host"].as_str().unwrap().to_owned())
        .collect();
    hosts.sort();
    hosts.dedup();
    let (cut, without_agent) = (hosts[0].clone(), hosts[1].clone());
    let lost = [on(&world, &cut), on(&world, &without_agent)].concat();
    world.lab.cut_link(Node::Host(number(&cut))).unwrap();
    world.lab.kill_agent(number(&without_agent)).unwrap();
    let begun = Instant::now();
    let suspect = || (state_of(&world, &cut) == "suspect").then_some(());
    assert!(world.until(Duration::from_secs(14), suspect).is_some(), "{}", world.logs());
    let after = recovered(&world, &lost, &[&cut, &without_agent], begun);
    println!("{} containers run elsewhere after {:.1} s", lost.len(), begun.elapsed().as_secs_f64());
    let longest = never_two(&world, &before, &after, &lost);
    println!("none of them ran anywhere for up to {longest:.1} s");
    untouched(&before, &after, &lost);
    assert!(spread(&world));

    // Both come back, learn what they lost, and remove it.
    world.lab.restore_link(Node::Host(number(&cut))).unwrap();
    world.lab.start_agent(number(&without_agent)).unwrap();
    for host in [&cut, &without_agent] {
        let clean = || {
            let left = shell(&world, number(host), "ls /var/lib/godwit/agent/containers");
            let none = lost.iter().all(|name| !left.contains(before[name]["id"].as_str().unwrap()));
            (none && state_of(&world, host) == "active").then_some(())
        };
        assert!(world.until(Duration::from_secs(30), clean).is_some(), "{host}\n{}", world.logs());
    }
    untouched(&after, &views(&world), &[]);
    world.down();
}

fn signal(pid: Option<u32>, signal: Signal) {
    kill_process(Pid::from_raw(pid.unwrap() as i32).unwrap(), signal).unwrap();
}

/// No container stood still for longer than a busy machine makes it.
fn all_beat(world: &World, views: &BTreeMap<String, Value>) {
    for name in all() {
        let times = beats(world, views[&name]["host"].as_str().unwrap(), views[&name]["id"].as_str().unwrap());
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        assert!(longest < BEAT_GAP_S, "{name} stood still for {longest:.1} s\n{}", world.logs());
    }
}

/// Silence for less than a lease is nothing but silence, and a controller that stood still does not judge by that time.
#[test]
fn a_slow_agent_and_a_slow_controller_lose_nothing() {
    let Some(world) = begin("slow", 3) else { return };
    let before = views(&world);
    signal(world.lab.agent_pid(2), Signal::STOP);
    let stopped = Instant::now();
    let suspect = || (state_of(&world, "h2") == "suspect").then_some(());
    assert!(world.until(Duration::from_millis(8_500), suspect).is_some(), "{}", world.logs());
    std::thread::sleep(Duration::from_millis(8_500).saturating_sub(stopped.elapsed()));
    signal(world.lab.agent_pid(2), Signal::CONT);
    let active = || (state_of(&world, "h2") == "active").then_some(());
    assert!(world.until(Duration::from_secs(10), active).is_some(), "{}", world.logs());

    signal(world.lab.controller_pid(), Signal::STOP);
    std::thread::sleep(Duration::from_secs(20));
    signal(world.lab.controller_pid(), Signal::CONT);
    for name in all() {
        world.wait_running(&name);
    }
    let after = views(&world);
    untouched(&before, &after, &[]);
    all_beat(&world, &after);
    let events = world.ok(&["events"]);
    assert!(!events.contains("host-failed") && !events.contains("is lost"), "{events}");
    world.down();
}

/// A person who knows more need not wait.
#[test]
fn a_persons_word_is_enough() {
    let Some(world) = World::up("word", 3, &["--link", "10gbit"]) else { return };
    world.apply(APPLICATION.replace("replicas: 3", "replicas: 2").as_str());
    let all: Vec<String> = all().into_iter().filter(|name| !name.ends_with("-3")).collect();
    for name in &all {
        world.wait_running(name);
    }
    let host = world.host_of("e/a-1");
    let said = world.refused(1, &["host", "declare-dead", &host]);
    assert!(said.contains("connected"), "{said}");
    let lost = on(&world, &host);
    let before = views(&world);
    kill_everything(&world, number(&host));
    let died = Instant::now();
    let silent = || (state_of(&world, &host) == "suspect").then_some(());
    assert!(world.until(Duration::from_secs(8), silent).is_some(), "{}", world.logs());
    world.ok(&["host", "declare-dead", &host]);
    let after = recovered(&world, &lost, &[&host], died);
    assert!(
        died.elapsed() < Duration::from_secs(10),
        "nobody waits for the lease: {:.1} s",
        died.elapsed().as_secs_f64()
    );
    untouched(&before, &after, &lost);
    world.down();
}

/// Hosts vouch for each other that nobody can start anything.
#[test]
fn everything_runs_on_without_a_controller() {
    let Some(world) = begin("alone", 3) else { return };
    let before = views(&world);
    world.lab.kill_controller().unwrap();
    let gone = Instant::now();
    // An agent is started anew meanwhile, and goes on like the others.
    world.lab.kill_agent(2).unwrap();
    world.lab.start_agent(2).unwrap();
    // Longer than a lease with its margin.
    std::thread::sleep(Duration::from_secs(25));
    world.lab.start_controller().unwrap();
    for name in all() {
        world.wait_running(&name);
    }
    let after = views(&world);
    untouched(&before, &after, &[]);
    all_beat(&world, &after);
    println!("without a controller for {:.0} s", gone.elapsed().as_secs_f64());
    world.down();
}
