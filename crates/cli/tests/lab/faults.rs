//! Faults in the middle of a move, through the real binary. After each: exactly one copy runs, its connections work,
//! `ps` tells the truth within ten seconds, and nothing is left over.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use godwit_lab::Node;
use serde_json::Value;

use crate::site;
use crate::world::{Client, World};

/// `ps` tells the truth after this long, in seconds.
const TRUTH_S: u64 = 10;

const SLOW: &str = r#"
name: f
services:
  w:
    image: oci:${WORKLOAD}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "MEMORY"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
volumes: {files: {}}
"#;

struct Fault {
    world: World,
    client: Client,
    before: Value,
    from: u32,
    to: u32,
}

impl Fault {
    /// A workload under load on one of three hosts. `memory_mib` decides how long it stands still.
    fn begin(tag: &str, memory_mib: u32, options: &[&str]) -> Option<Self> {
        let world = World::up(tag, 3, options)?;
        world.apply(&SLOW.replace("MEMORY", &memory_mib.to_string()));
        world.wait_running("f/w-1");
        let host = world.host_of("f/w-1");
        let from: u32 = host[1..].parse().unwrap();
        let to = from % 3 + 1;
        // Through a host that is no side of the move.
        let address = format!("{}:7000", world.host_address(to % 3 + 1));
        crate::moves::wait_listening(&world, &address);
        let client = world.client(&["client", "--address", &address, "--connections", "4", "--until-stdin-closes"]);
        let mut fault = Self { world, client, before: Value::Null, from, to };
        fault.before = fault.status().unwrap();
        Some(fault)
    }

    fn status(&self) -> Option<Value> {
        let address = format!("{}:7000", self.world.host_address(self.to % 3 + 1));
        let output = self.world.on_client(&[crate::world::GODWIT, "workload", "status", "--address", &address]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// Makes the copy take its time: a file that has to be sent over a slow link.
    fn long_copy(&self) {
        self.world.ok(&["exec", "f/w-1", "--", "/usr/bin/godwit", "workload", "status", "--address", "127.0.0.1:7000"]);
        let volumes = self.world.lab.paths().host_state(Node::Host(self.from)).join("agent/volumes/f.w-1/files");
        let mut file = std::fs::File::create(volumes.join("big")).unwrap();
        let mut random = std::fs::File::open("/dev/urandom").unwrap();
        std::io::copy(&mut std::io::Read::take(&mut random, 256 << 20), &mut file).unwrap();
        self.world.lab.set_link_rate(Node::Host(self.to), Some("200mbit".parse().unwrap())).unwrap();
    }

    fn full_speed(&self) {
        self.world.lab.set_link_rate(Node::Host(self.to), Some("10gbit".parse().unwrap())).unwrap();
    }

    fn start_move(&self) -> Child {
        self.start_move_by("auto")
    }

    /// In this mode; `stop-and-copy` stands still for as long as its memory takes.
    fn start_move_by(&self, mode: &str) -> Child {
        let to = format!("h{}", self.to);
        let argv = ["--output", "json", "migrate", "f/w-1", "--to", &to, "--mode", mode];
        let mut command: Command = self.world.godwit(&argv);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until the move is in this phase, or has sent this much.
    fn until_phase(&self, phase: &str, bytes: u64) {
        let seen = self.world.until(Duration::from_secs(60), || {
            let moves = self.world.json(&["move", "list"]);
            let open = moves.as_array().unwrap().iter().find(|m| m["outcome"]["state"] == "moving")?.clone();
            (open["phase"] == phase && open["progress"]["bytes_sent"].as_u64().unwrap() >= bytes).then_some(())
        });
        assert!(seen.is_some(), "the move never came to {phase}\n{}", self.world.logs());
    }

    /// The container stands still. (CRIU thaws the cgroup while it holds the processes: that does not tell.)
    fn until_frozen(&self) {
        self.until_phase("freeze", 0);
    }

    /// The move has failed and the container runs where it was, its connections alive.
    fn survived(self, since: Instant, mut migrate: Child) {
        let name = "f/w-1";
        let from = format!("h{}", self.from);
        let limit = Duration::from_secs(TRUTH_S).saturating_sub(since.elapsed());
        self.world.wait_within(name, "back", limit, |c| {
            c["state"] == "running" && c["host"] == from.as_str() && c["moving"].is_null()
        });
        let after = self.world.until(Duration::from_secs(10), || self.status()).expect("it answers");
        self.check(&after);
        let said = self.world.until(Duration::from_secs(30), || migrate.try_wait().unwrap());
        let _ = migrate.kill();
        let output = migrate.wait_with_output().unwrap();
        assert_eq!(said.and_then(|s| s.code()), Some(1), "{}", crate::world::text(&output));
        println!("{}", String::from_utf8_lossy(&output.stderr).trim());
        self.finish(&from);
    }

    fn check(&self, after: &Value) {
        assert_eq!(after["ok"], true, "{after:#}");
        for same in ["instance", "pid", "started_unix_ms"] {
            assert_eq!(after[same], self.before[same], "{same}");
        }
        assert_eq!(after["streams_broken"], 0, "{after:#}");
    }

    /// One copy only, no leftovers on the other hosts, and it can still be moved.
    fn finish(self, at: &str) {
        self.only_on(at);
        self.full_speed();
        let free = "umount /run/ballast 2>/dev/null; true";
        self.world.lab.exec(Node::Host(self.to), &["sh", "-c", free]).unwrap().status().unwrap();
        let to = if at == "h3" { "h1" } else { "h3" };
        let done = self.world.migrate("f/w-1", to);
        assert_eq!(done["outcome"]["state"], "done", "{done:#}");
        let after = self.status().unwrap();
        self.check(&after);
        self.only_on(to);
        let Self { client, world, .. } = self;
        client.finish();
        world.down();
    }

    fn only_on(&self, at: &str) {
        let id = self.world.container("f/w-1").unwrap()["id"].as_str().unwrap().to_owned();
        let wanted = |n: u32| if at == format!("h{n}") { site::one_container(&id, "f.w-1") } else { Vec::new() };
        let wrong = || (1..=3).map(|n| (n, site::remains(&self.world, n))).find(|(n, remains)| *remains != wanted(*n));
        let clean = self.world.until(Duration::from_secs(10), || wrong().is_none().then_some(()));
        assert!(clean.is_some(), "it is on {at}, and yet: {:?}\n{}", wrong(), self.world.logs());
    }
}

#[test]
fn the_destinations_agent_is_killed_while_copying() {
    let Some(fault) = Fault::begin("f-dest", 32, &["--link", "10gbit"]) else { return };
    fault.long_copy();
    let migrate = fault.start_move();
    fault.until_phase("copy", 16 << 20);
    let killed = Instant::now();
    fault.world.lab.kill_agent(fault.to).unwrap();
    fault.world.lab.start_agent(fault.to).unwrap();
    fault.survived(killed, migrate);
}

/// Its memory is put in by a process that lives on.
#[test]
fn the_destinations_agent_is_killed_while_memory_is_filled_in() {
    let Some(fault) = Fault::begin("f-fill", 512, &["--link", "10gbit"]) else { return };
    let mut migrate = fault.start_move();
    let to = format!("h{}", fault.to);
    let fillers = || site::running(&fault.world, fault.to, site::Program::Filler).len();
    let filling = || fault.world.host_of("f/w-1") == to && fillers() > 0;
    let owned = fault.world.until(Duration::from_secs(60), || filling().then_some(()));
    fault.world.lab.kill_agent(fault.to).unwrap();
    assert!(owned.is_some(), "nobody filled anything\n{}", fault.world.logs());
    fault.world.lab.start_agent(fault.to).unwrap();
    let ended = fault.world.until(Duration::from_secs(60), || migrate.try_wait().unwrap());
    assert!(ended.is_some_and(|s| s.success()), "{}", fault.world.logs());
    fault.world.wait_running("f/w-1");
    let after = fault.world.until(Duration::from_secs(10), || fault.status()).expect("it answers");
    fault.check(&after);
    fault.finish(&to);
}

#[test]
fn the_sources_agent_is_killed_while_frozen() {
    let Some(fault) = Fault::begin("f-source", 512, &["--link", "1gbit"]) else { return };
    let migrate = fault.start_move_by("stop-and-copy");
    fault.until_frozen();
    let killed = Instant::now();
    fault.world.lab.kill_agent(fault.from).unwrap();
    fault.world.lab.start_agent(fault.from).unwrap();
    fault.survived(killed, migrate);
}

/// Where soft-dirty bits tell written pages a container stands still for a moment while it is copied, and whoever should
/// let it go on may be gone: `./dev test old-kernel`.
#[test]
fn the_sources_agent_is_killed_while_it_looks_at_memory() {
    if !matches!(godwit_memory::check_tracking(), Ok(godwit_memory::Means::SoftDirty)) {
        println!("skipped: nobody stands still for a look on this kernel");
        return;
    }
    let Some(fault) = Fault::begin("f-look", 32, &["--link", "10gbit", "--hold-points"]) else { return };
    let node = Node::Host(fault.from);
    fault.world.hold(node, "look");
    let migrate = fault.start_move();
    let held = fault.world.until(Duration::from_secs(60), || fault.world.is_held(node, "look").then_some(()));
    assert!(held.is_some(), "nobody looked\n{}", fault.world.logs());
    fault.world.lab.kill_agent(fault.from).unwrap();
    fault.world.let_go(node, "look");
    let killed = Instant::now();
    fault.world.lab.start_agent(fault.from).unwrap();
    fault.survived(killed, migrate);
}

#[test]
fn the_controller_is_killed_while_copying() {
    let Some(fault) = Fault::begin("f-ctl-copy", 32, &["--link", "10gbit"]) else { return };
    fault.long_copy();
    let migrate = fault.start_move();
    fault.until_phase("copy", 16 << 20);
    controller_killed(fault, migrate);
}

#[test]
fn the_controller_is_killed_while_frozen() {
    let Some(fault) = Fault::begin("f-ctl-frozen", 512, &["--link", "1gbit"]) else { return };
    let migrate = fault.start_move_by("stop-and-copy");
    fault.until_frozen();
    controller_killed(fault, migrate);
}

fn controller_killed(fault: Fault, migrate: Child) {
    let killed = Instant::now();
    fault.world.lab.kill_controller().unwrap();
    fault.world.lab.start_controller().unwrap();
    fault.survived(killed, migrate);
}

#[test]
fn the_link_is_cut_while_copying() {
    let Some(fault) = Fault::begin("f-link", 32, &["--link", "10gbit"]) else { return };
    fault.long_copy();
    let migrate = fault.start_move();
    fault.until_phase("copy", 16 << 20);
    let cut = Instant::now();
    fault.world.lab.cut_link(Node::Host(fault.to)).unwrap();
    // The truth has to be told while the link is still cut.
    let from = format!("h{}", fault.from);
    fault.world.wait_within("f/w-1", "back", Duration::from_secs(TRUTH_S), |c| {
        c["state"] == "running" && c["host"] == from.as_str() && c["moving"].is_null()
    });
    println!("told after {:.1} s", cut.elapsed().as_secs_f64());
    fault.world.lab.restore_link(Node::Host(fault.to)).unwrap();
    let to = format!("h{}", fault.to);
    let back = fault.world.until(Duration::from_secs(20), || {
        let hosts = fault.world.json(&["host", "list"]);
        hosts.as_array().unwrap().iter().find(|h| h["name"] == to.as_str())?["connected"].as_bool()?.then_some(())
    });
    assert!(back.is_some());
    fault.survived(Instant::now(), migrate);
}

/// Known beforehand, too little memory is a reason not to begin.
#[test]
fn a_destination_with_too_little_memory_is_refused() {
    let Some(fault) = Fault::begin("f-memory", 400, &["--link", "10gbit", "--memory", "1536MiB"]) else { return };
    fault.world.wait("f/w-1", "measured", |c| c["status"]["memory"].as_u64() > Some(350 << 20));
    ballast(&fault, 1200);
    let migrate = fault.start_move();
    let output = migrate.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("of memory is free"), "{said}");
    let again = fault.start_move();
    fault.survived(Instant::now(), again);
}

/// Its memory is there once, not twice: pages that have come are given back while they are put to their places. Where it
/// has to go through CRIU it is there twice, which is told before anything of it has come.
#[test]
fn a_destination_needs_little_more_than_the_container() {
    let Some(fault) = Fault::begin("f-room", 400, &["--link", "10gbit", "--memory", "1536MiB"]) else { return };
    fault.world.wait("f/w-1", "measured", |c| c["status"]["memory"].as_u64() > Some(350 << 20));
    ballast(&fault, 800);
    let mut migrate = fault.start_move_by("stop-and-copy");
    let ended = fault.world.until(Duration::from_secs(60), || migrate.try_wait().unwrap());
    let said = String::from_utf8_lossy(&migrate.wait_with_output().unwrap().stderr).into_owned();
    let told = said.contains("of memory is free") && said.contains("because it is copied while it stands still");
    assert!(ended.is_some_and(|s| s.code() == Some(1)) && told, "{said}");
    fault.check(&fault.world.until(Duration::from_secs(10), || fault.status()).expect("it answers"));
    let output = fault.start_move().wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", crate::world::text(&output), fault.world.logs());
    let to = format!("h{}", fault.to);
    fault.world.wait_running("f/w-1");
    fault.check(&fault.world.until(Duration::from_secs(10), || fault.status()).expect("it answers"));
    fault.finish(&to);
}

/// It runs out in the middle, and the kernel ends whom it likes, the agent too: an init system starts that again.
#[test]
fn the_destination_runs_out_of_memory() {
    let Some(fault) = Fault::begin("f-oom", 400, &["--link", "10gbit", "--memory", "1536MiB"]) else { return };
    fault.long_copy();
    let migrate = fault.start_move();
    fault.until_phase("copy", 16 << 20);
    let since = Instant::now();
    ballast(&fault, 1500);
    let ended = fault.world.until(Duration::from_secs(60), || {
        if fault.world.lab.agent_pid(fault.to).is_none() {
            fault.world.lab.start_agent(fault.to).unwrap();
        }
        let moves = fault.world.json(&["move", "list"]);
        moves.as_array().unwrap().iter().all(|m| m["outcome"]["state"] == "failed").then_some(())
    });
    assert!(ended.is_some(), "{:#}", fault.world.json(&["move", "list"]));
    println!("given up after {:.1} s", since.elapsed().as_secs_f64());
    fault.survived(Instant::now(), migrate);
}

/// Files on a tmpfs of the destination that take this much of its memory, or all there is.
fn ballast(fault: &Fault, mib: u32) {
    let script = format!(
        "mkdir -p /run/ballast && mount -t tmpfs -o size=4g ballast /run/ballast && head -c {mib}M /dev/zero >/run/ballast/file; true"
    );
    let status = fault.world.lab.exec(Node::Host(fault.to), &["sh", "-c", &script]).unwrap().status().unwrap();
    println!("ballast: {status}");
}

#[test]
fn the_destination_has_too_little_disk() {
    let Some(fault) = Fault::begin("f-disk", 32, &["--link", "10gbit"]) else { return };
    // The destination's volumes are on a file system that is too small for the workload's files.
    let state = "/var/lib/godwit/agent/volumes";
    let mounted =
        fault.world.lab.exec(Node::Host(fault.to), &["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", state]);
    assert!(mounted.unwrap().status().unwrap().success());
    let mut migrate = fault.start_move();
    let ended = fault.world.until(Duration::from_secs(60), || migrate.try_wait().unwrap());
    assert!(ended.is_some());
    let unmounted = fault.world.lab.exec(Node::Host(fault.to), &["umount", state]).unwrap().status().unwrap();
    assert!(unmounted.success());
    fault.survived(Instant::now(), migrate);
}
