//! One cell: a move, a fault in the middle of it, and everything that has to be true afterwards.
//!
//! Asserted: `ps` tells the truth within ten seconds; exactly one copy runs, and it is the same process unless the fault
//! has ended the container itself; no stream is broken, no connection of the client lost; nothing is left over on any
//! host; and a move that is tried again succeeds, with every page of memory verified after it.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use godwit_lab::Node;
use serde_json::Value;

use super::faults::Fault;
use super::{Cell, Outcome, Phase, Side};
use crate::site::{self, Program};
use crate::world::{Client, GODWIT, World};

/// `ps` tells the truth after this long, in seconds.
const TRUTH_S: u64 = 10;
/// After a link is healed hosts are back within this time, in seconds: a try to connect takes 5, the pause after it 2.
const HEAL_S: u64 = 15;
/// A move comes to its phase, and to its end, within this time, in seconds.
const MOVE_S: u64 = 60;
/// How long the link is cut that heals by itself, in milliseconds: the length of the fault.
const BLIP_MS: u64 = 1_000;

const NAME: &str = "f/w-1";
/// The workload checks itself. All of its memory is verified eight times a second.
const MANIFEST: &str = r#"
name: f
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "32", --check-mib-per-second, "256"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
    restart: always
volumes: {files: {}}
"#;

/// A lab with one container, used for one cell after the other.
pub struct Yard {
    world: World,
    id: String,
}

impl Yard {
    pub fn new(tag: &str) -> Self {
        let world = World::up(tag, 3, &["--link", "10gbit", "--memory", "1GiB", "--hold-points"]).unwrap();
        world.apply(MANIFEST);
        let id = world.wait_running(NAME)["id"].as_str().unwrap().to_owned();
        Self { world, id }
    }

    pub fn keep_logs(&self) {
        self.world.keep_logs();
    }

    pub fn down(self) {
        self.world.down();
    }

    /// What became of the container, and how fast.
    pub fn cell(&self, (phase, fault): Cell) -> String {
        let from: u32 = self.world.host_of(NAME)[1..].parse().unwrap();
        Hit::begin(self, phase, fault, from, from % 3 + 1).run()
    }
}

struct Hit<'a> {
    yard: &'a Yard,
    world: &'a World,
    phase: Phase,
    fault: Fault,
    from: u32,
    to: u32,
    client: Option<Client>,
    before: Value,
    migrate: Child,
}

impl<'a> Hit<'a> {
    /// A client at work, and a move that stands still in the phase.
    fn begin(yard: &'a Yard, phase: Phase, fault: Fault, from: u32, to: u32) -> Self {
        let world = &yard.world;
        // Through the host that is no side of the move.
        let address = format!("{}:7000", world.host_address(6 - from - to));
        crate::moves::wait_listening(world, &address);
        let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
        let before = status(world, &address).unwrap();
        if fault == Fault::Disk {
            small_disk(world, to);
        }
        let (node, point) = hold_of(phase, from, to);
        world.hold(node, point);
        let to_host = format!("h{to}");
        let mut command = world.godwit(&["--output", "json", "migrate", NAME, "--to", &to_host]);
        let migrate = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut hit = Self { yard, world, phase, fault, from, to, client: Some(client), before, migrate };
        let reached = world.until(Duration::from_secs(MOVE_S), || {
            let ended = hit.migrate.try_wait().unwrap().filter(|_| phase != Phase::Fill);
            (world.is_held(node, point) || ended.is_some()).then_some(ended)
        });
        assert_eq!(reached, Some(None), "the move never came to {}\n{}", phase.name(), world.logs());
        if phase == Phase::Fill {
            // The filler stands still before the hand-over; what is meant is after it.
            let to = format!("h{to}");
            world.wait(NAME, "activated", |c| c["host"] == to.as_str() && c["state"] == "running");
        }
        hit
    }

    fn run(mut self) -> String {
        let since = Instant::now();
        self.strike();
        let (outcome, told) = self.settle(since);
        let allowed = self.fault.allows(self.phase);
        assert!(allowed.contains(&outcome), "{}, not {allowed:?}; {}", outcome.name(), self.said().1);
        let (status, said) = self.said();
        // Somebody who watches is told the truth too.
        assert_eq!(status == Some(0), self.at() == self.to, "exit code {status:?}: {said}");
        let at = self.at();
        self.check(outcome);
        self.only_on(at);
        if self.fault == Fault::Disk {
            site::shell(
                self.world,
                self.to,
                "cd /var/lib/godwit/agent; mount -o remount,size=64m containers; mount -o remount,size=64m volumes",
            );
        }
        self.all_connected();
        let back_or_again = if at == self.to { self.from } else { self.to };
        let done = self.world.migrate(NAME, &format!("h{back_or_again}"));
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        self.check(outcome);
        self.only_on(back_or_again);
        if self.fault == Fault::Disk {
            self.drop_small_disk(back_or_again);
        }
        match self.client.take() {
            Some(client) if matches!(outcome, Outcome::Torn | Outcome::Anew) => client.end(),
            Some(client) => drop(client.finish()),
            None => {}
        }
        let error = said.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or_default();
        format!("{} {told:.1}; {error}", outcome.name())
    }

    /// The fault happens, and whoever stands still goes on.
    fn strike(&mut self) {
        let (world, from, to) = (self.world, self.from, self.to);
        let release = || {
            let (node, point) = hold_of(self.phase, from, to);
            world.let_go(node, point);
        };
        let killed = |host, program| {
            let gone =
                world.until(Duration::from_secs(MOVE_S), || (site::kill(world, host, program) > 0).then_some(()));
            assert!(gone.is_some(), "there is no {program:?} on h{host}");
        };
        match self.fault {
            Fault::SourceAgent | Fault::DestinationAgent => {
                let host = if self.fault == Fault::SourceAgent { from } else { to };
                world.lab.kill_agent(host).unwrap();
                release();
                world.lab.start_agent(host).unwrap();
            }
            Fault::Controller => {
                world.lab.kill_controller().unwrap();
                release();
                world.lab.start_controller().unwrap();
            }
            Fault::SourceKeeper => killed(from, Program::Keeper),
            Fault::DestinationKeeper => killed(to, Program::Keeper),
            Fault::SourceCriu => killed(from, Program::Criu),
            Fault::DestinationCriu => killed(to, Program::Criu),
            Fault::Cut => world.lab.cut_link(Node::Host(to)).unwrap(),
            Fault::SourceCut => world.lab.cut_link(Node::Host(from)).unwrap(),
            Fault::Blip => {
                world.lab.cut_link(Node::Host(to)).unwrap();
                release();
                std::thread::sleep(Duration::from_millis(BLIP_MS));
                world.lab.restore_link(Node::Host(to)).unwrap();
            }
            Fault::Disk => fill_disk(world, to, self.phase < Phase::Freeze),
            Fault::Memory => {
                use_up_memory(world, to);
                release();
                if world.lab.agent_pid(to).is_none() {
                    world.lab.start_agent(to).unwrap();
                }
            }
            Fault::Cancel => {
                self.cancel();
                if self.phase == Phase::Prepare {
                    // As with an image that takes its time: everybody has long been told.
                    self.world.wait(NAME, "back", |c| c["state"] == "running" && c["moving"].is_null());
                }
            }
            Fault::Clock => unreachable!("cannot happen"),
        }
        release();
    }

    fn cancel(&self) {
        let moves = self.world.json(&["move", "list"]);
        let id = moves.as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_owned();
        let output = self.world.godwit(&["move", "cancel", &id]).output().unwrap();
        let cancelled = output.status.success();
        assert_eq!(cancelled, self.phase <= Phase::HandOver, "{}", crate::world::text(&output));
    }

    /// Waits until `ps` tells the truth, with the link still cut if it is; how long that took in seconds.
    fn settle(&mut self, since: Instant) -> (Outcome, f64) {
        let limit = Duration::from_secs(TRUTH_S);
        let mut told = None;
        if let Some(cut) = self.cut() {
            self.told_while_cut(cut, limit.saturating_sub(since.elapsed()));
            told = Some(since.elapsed());
            self.world.lab.restore_link(Node::Host(cut)).unwrap();
        }
        let anew = self.fault.allows(self.phase) == [Outcome::Anew];
        let limit = told.map_or(limit.saturating_sub(since.elapsed()), |_| Duration::from_secs(HEAL_S));
        let sides = [format!("h{}", self.from), format!("h{}", self.to)];
        let running = self.world.wait_within(NAME, "running", limit, |c| {
            c["state"] == "running"
                && c["moving"].is_null()
                && sides.iter().any(|side| c["host"] == side.as_str())
                && (!anew || self.status().is_some_and(|s| s["instance"] != self.before["instance"]))
        });
        let told = told.unwrap_or_else(|| since.elapsed()).as_secs_f64();
        let after = self.world.until(limit.max(Duration::from_secs(1)), || self.status()).expect("it answers");
        let outcome = match running["host"] == sides[0].as_str() {
            _ if after["instance"] != self.before["instance"] => Outcome::Anew,
            true if self.fault.allows(self.phase) == [Outcome::Torn] => Outcome::Torn,
            true => Outcome::Back,
            false => Outcome::Moved,
        };
        (outcome, told)
    }

    /// Whose link is cut for as long as it takes.
    fn cut(&self) -> Option<u32> {
        match self.fault {
            Fault::Cut => Some(self.to),
            Fault::SourceCut => Some(self.from),
            _ => None,
        }
    }

    fn told_while_cut(&self, cut: u32, limit: Duration) {
        let host = format!("h{cut}");
        // After its last word the source is not needed.
        let before = self.phase < if self.fault == Fault::SourceCut { Phase::Restore } else { Phase::HandOver };
        let mut last = Value::Null;
        let told = self.world.until(limit, || {
            let silent = !self.connected(&host);
            last = self.world.container(NAME).unwrap();
            let at = |n: u32| last["host"] == format!("h{n}").as_str();
            let fits = match (self.fault, before) {
                // Taken back, with what is known of it.
                (Fault::Cut, true) => at(self.from) && last["state"] == "running" && last["moving"].is_null(),
                (Fault::SourceCut, true) => at(self.from) && last["state"] == "unknown" && last["moving"].is_null(),
                // It is the destination's, and nobody claims to know that it runs there.
                (Fault::Cut, false) => at(self.to) && last["state"] != "running",
                _ => at(self.to),
            };
            (silent && fits).then_some(())
        });
        assert!(told.is_some(), "with the link of {host} cut: {last:#}\n{}", self.world.logs());
    }

    /// Where it is.
    fn at(&self) -> u32 {
        self.world.host_of(NAME)[1..].parse().unwrap()
    }

    /// How `godwit migrate` ended, and what it said.
    fn said(&mut self) -> (Option<i32>, String) {
        let ended = self.world.until(Duration::from_secs(MOVE_S), || self.migrate.try_wait().unwrap());
        let mut text = String::new();
        if let Some(stderr) = self.migrate.stderr.as_mut().filter(|_| ended.is_some()) {
            std::io::Read::read_to_string(stderr, &mut text).unwrap();
        }
        (ended.and_then(|e| e.code()), text)
    }

    fn status(&self) -> Option<Value> {
        status(self.world, &format!("{}:7000", self.world.host_address(6 - self.from - self.to)))
    }

    /// The right process answers, and has found all of its memory right since.
    fn check(&self, outcome: Outcome) {
        let limit = Duration::from_secs(MOVE_S);
        let first = self.world.until(limit, || self.status()).expect("it answers");
        let passes = first["memory_passes"].as_u64().unwrap();
        let later = self.world.until(limit, || {
            self.status().filter(|s| s["ok"] != true || s["memory_passes"].as_u64() >= Some(passes + 2))
        });
        let later = later.expect("it goes on checking itself");
        assert_eq!(later["ok"], true, "{later:#}");
        if !matches!(outcome, Outcome::Torn | Outcome::Anew) {
            assert_eq!(later["streams_broken"], self.before["streams_broken"], "{later:#}");
        }
        for same in ["instance", "pid", "started_unix_ms"].iter().filter(|_| outcome != Outcome::Anew) {
            assert_eq!(later[same], self.before[same], "{same}");
        }
    }

    fn only_on(&self, at: u32) {
        let wrong = || {
            let remains = (1..=3).map(|host| (host, site::remains(self.world, host)));
            let one = site::one_container(&self.yard.id, "f.w-1");
            remains.filter(|(host, remains)| *remains != if *host == at { one.clone() } else { Vec::new() }).collect()
        };
        let mut left: Vec<(u32, Vec<String>)> = Vec::new();
        let clean = self.world.until(Duration::from_secs(TRUTH_S), || {
            left = wrong();
            left.is_empty().then_some(())
        });
        assert!(clean.is_some(), "it is on h{at}, and yet: {left:?}\n{}", self.world.logs());
    }

    fn connected(&self, host: &str) -> bool {
        let hosts = self.world.json(&["host", "list"]);
        hosts.as_array().unwrap().iter().any(|h| h["name"] == host && h["connected"] == true)
    }

    fn all_connected(&self) {
        let all = || (1..=3).all(|n| self.connected(&format!("h{n}")));
        let connected = self.world.until(Duration::from_secs(HEAL_S), || all().then_some(()));
        assert!(connected.is_some(), "not all hosts are back\n{}", self.world.logs());
    }

    /// Nothing of the container may be on it.
    fn drop_small_disk(&self, at: u32) {
        if at == self.to {
            self.world.migrate(NAME, &format!("h{}", self.from));
            self.only_on(self.from);
        }
        let script = "cd /var/lib/godwit/agent && umount containers && umount volumes && echo done";
        assert_eq!(site::shell(self.world, self.to, script).trim(), "done");
    }
}

impl Drop for Hit<'_> {
    fn drop(&mut self) {
        let _ = self.migrate.kill();
        let _ = self.migrate.wait();
    }
}

fn hold_of(phase: Phase, from: u32, to: u32) -> (Node, &'static str) {
    let (side, point) = phase.hold();
    let node = match side {
        Side::Source => Node::Host(from),
        Side::Destination => Node::Host(to),
        Side::Controller => Node::Controller,
    };
    (node, point)
}

fn status(world: &World, address: &str) -> Option<Value> {
    let output = world.on_client(&[GODWIT, "workload", "status", "--address", address]);
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

/// The host's disk for containers and volumes becomes one that can be filled.
fn small_disk(world: &World, host: u32) {
    let script = "cd /var/lib/godwit/agent || exit
        for part in containers volumes; do mount -t tmpfs -o size=64m,mode=755 tmpfs $part || exit; done; echo done";
    assert_eq!(site::shell(world, host, script).trim(), "done");
}

/// Leaves no room for anything more. The container's own volumes only if it does not run there: a program that finds its
/// disk full is right to complain.
fn fill_disk(world: &World, host: u32, volumes: bool) {
    let parts = if volumes { "containers volumes" } else { "containers" };
    let script = format!(
        "cd /var/lib/godwit/agent || exit
        for part in {parts}; do
            used=$(($(df -k --output=used $part | tail -n 1))); [ $used -gt 0 ] || used=4
            mount -o remount,size=${{used}}k $part || exit
        done; echo done"
    );
    assert_eq!(site::shell(world, host, &script).trim(), "done");
}

/// Takes all memory that the host has, until the kernel ends somebody for it, and gives it back.
fn use_up_memory(world: &World, host: u32) {
    let script = "mkdir -p /run/ballast && mount -t tmpfs -o size=4g ballast /run/ballast || exit
        head -c 2G /dev/zero >/run/ballast/file";
    // It may be among those that are ended, and nobody there has the memory to give it back.
    site::shell(world, host, script);
    let mounts = format!("--mount={}", world.lab.paths().mount_namespace(Node::Host(host)).display());
    let given_back = Command::new("nsenter").args([&mounts, "--", "umount", "/run/ballast"]).status().unwrap();
    assert!(given_back.success());
}
