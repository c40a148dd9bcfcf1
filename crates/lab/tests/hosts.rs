//! Labs on the real kernel: made, measured, broken, unmade. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use godwit_lab::{Lab, LabName, LabSpec, Node, UpError};

/// A lab of this test process; unmade when the test ends, however it ends.
struct World {
    name: LabName,
}

impl World {
    fn new(tag: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        Some(Self { name: LabName::new(format!("t-{tag}-{}", std::process::id())).unwrap() })
    }

    fn spec(&self, hosts: u32) -> LabSpec {
        LabSpec { start_daemons: false, ..LabSpec::new(self.name.clone(), hosts, "/bin/true") }
    }

    fn down_and_check(&self) {
        Lab::down_by_name(&self.name).unwrap();
        assert_eq!(Lab::leftovers(&self.name), Vec::<String>::new());
        assert!(!godwit_lab::list().contains(&self.name));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(error) = Lab::down_by_name(&self.name) {
            eprintln!("{error}");
        }
    }
}

fn output(lab: &Lab, node: Node, argv: &[&str]) -> String {
    let output = lab.exec(node, argv).unwrap().output().unwrap();
    assert!(output.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn hosts_are_separate_and_reach_each_other() {
    let Some(world) = World::new("sep") else { return };
    let machine_links = fs::read_dir("/sys/class/net").unwrap().count();
    let mut spec = world.spec(2);
    spec.memory_bytes = Some(1 << 30);
    spec.cpus_milli = Some(500);
    let lab = Lab::up(spec).unwrap();
    let (h1, h2) = (Node::Host(1), Node::Host(2));
    assert!(godwit_lab::list().contains(&world.name));
    assert!(matches!(Lab::up(world.spec(1)), Err(UpError::Exists(_))));

    // Network: own devices, also in /sys; everyone reaches everyone at the first frame.
    assert_eq!(output(&lab, h1, &["ls", "/sys/class/net"]).split_whitespace().collect::<Vec<_>>(), ["eth0", "lo"]);
    assert_eq!(fs::read_dir("/sys/class/net").unwrap().count(), machine_links, "no link leads out");
    assert!(fs::read_dir("/sys/fs/cgroup").unwrap().count() > 0);
    let cgroup_seen = output(&lab, h1, &["ls", "/sys/fs/cgroup"]);
    assert!(!cgroup_seen.is_empty(), "cgroup hierarchies stay visible below the new /sys");
    let listener = lab.visit(h2, || TcpListener::bind((h2.address(), 0)).unwrap()).unwrap();
    for from in [h1, Node::Client, Node::Controller] {
        lab.visit(from, || TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
    }

    // Files: own /run and own state.
    output(&lab, h1, &["sh", "-c", "echo one >/run/godwit/f && echo disk >/var/lib/godwit/f"]);
    assert!(!lab.exec(h2, &["cat", "/run/godwit/f"]).unwrap().stderr(Stdio::null()).status().unwrap().success());
    assert_eq!(fs::read_to_string(lab.paths().host_state(h1).join("f")).unwrap(), "disk\n");
    assert!(!PathBuf::from("/run/godwit/f").exists() && !PathBuf::from("/var/lib/godwit/f").exists());
    let table = output(&lab, h1, &["cat", "/proc/self/mountinfo"]);
    assert!(!table.contains("net:["), "pins do not leak into hosts: {table}");

    // Limits: in the host's subtree, and commands are inside it.
    let groups = output(&lab, h1, &["cat", "/proc/self/cgroup"]);
    assert!(groups.contains(&lab.paths().exec_cgroup(h1)), "{groups}");
    let memory = PathBuf::from("/sys/fs/cgroup/memory").join(&lab.paths().host_cgroup(h1)[1..]);
    if memory.exists() {
        assert_eq!(fs::read_to_string(memory.join("memory.limit_in_bytes")).unwrap().trim(), (1 << 30).to_string());
        let cpu = PathBuf::from("/sys/fs/cgroup/cpu").join(&lab.paths().host_cgroup(h1)[1..]);
        assert_eq!(fs::read_to_string(cpu.join("cpu.cfs_quota_us")).unwrap().trim(), "50000");
        // A grandchild cpuset takes processes without being prepared.
        let deep = PathBuf::from("/sys/fs/cgroup/cpuset").join(&lab.paths().containers_cgroup(h1)[1..]).join("a");
        fs::create_dir_all(deep.join("b")).unwrap();
        assert!(!fs::read_to_string(deep.join("b/cpuset.cpus")).unwrap().trim().is_empty());
    }

    // The exit code is the program's.
    assert_eq!(lab.exec(h1, &["sh", "-c", "exit 42"]).unwrap().status().unwrap().code(), Some(42));
    assert_eq!(Lab::open(&world.name).unwrap().spec().hosts, 2);
    drop(listener);
    world.down_and_check();
    world.down_and_check();
}

/// Bytes per second from one node to another over `seconds`, counted at the receiver.
fn throughput(lab: &Lab, from: Node, to: Node, seconds: f64) -> f64 {
    let listener = lab.visit(to, || TcpListener::bind((to.address(), 0)).unwrap()).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let sender = lab.visit(from, || TcpStream::connect(address).unwrap()).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    let writer = std::thread::spawn(move || {
        let mut sender = sender;
        let block = vec![7_u8; 256 << 10];
        while sender.write_all(&block).is_ok() {}
    });
    let mut block = vec![0_u8; 256 << 10];
    // The first tenth fills buckets and windows.
    let mut counted = 0_u64;
    let warm = Instant::now() + Duration::from_secs_f64(seconds / 10.0);
    while Instant::now() < warm {
        let _ = receiver.read(&mut block).unwrap();
    }
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        counted += receiver.read(&mut block).unwrap() as u64;
    }
    let rate = counted as f64 / start.elapsed().as_secs_f64();
    drop(receiver);
    writer.join().unwrap();
    rate
}

#[test]
fn links_keep_their_rate_and_can_be_cut() {
    let Some(world) = World::new("rate") else { return };
    let mut spec = world.spec(2);
    spec.link = Some("200mbit".parse().unwrap());
    let lab = Lab::up(spec).unwrap();
    let (h1, h2) = (Node::Host(1), Node::Host(2));
    for (from, to) in [(h1, h2), (h2, h1)] {
        let mbit = throughput(&lab, from, to, 1.0) * 8e-6;
        println!("200mbit link {from} to {to}: {mbit:.0} Mbit/s of payload");
        assert!((140.0..205.0).contains(&mbit), "{from} to {to}: {mbit}");
    }
    lab.set_link_rate(h2, Some("20mbit".parse().unwrap())).unwrap();
    let mbit = throughput(&lab, h1, h2, 1.0) * 8e-6;
    println!("20mbit link: {mbit:.1} Mbit/s of payload");
    assert!((14.0..20.5).contains(&mbit), "{mbit}");
    for node in [h1, h2] {
        lab.set_link_rate(node, Some("10gbit".parse().unwrap())).unwrap();
    }
    let ten = throughput(&lab, h1, h2, 1.0) * 8e-9;
    for node in [h1, h2] {
        lab.set_link_rate(node, None).unwrap();
    }
    let free = throughput(&lab, h1, h2, 1.0) * 8e-9;
    println!("10gbit link: {ten:.2} Gbit/s of payload; no limit: {free:.2} Gbit/s");
    assert!(ten > 0.5 && ten < 10.1, "{ten}");

    // A cut link is silent, keeps its carrier, and a connection survives a short cut.
    let listener = lab.visit(h2, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
    let target = SocketAddr::from((h2.address(), listener.local_addr().unwrap().port()));
    let mut near = lab.visit(h1, || TcpStream::connect(target).unwrap()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    lab.cut_link(h2).unwrap();
    near.write_all(b"x").unwrap();
    far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut byte = [0];
    assert!(far.read(&mut byte).is_err(), "nothing passes a cut link");
    assert_eq!(output(&lab, h2, &["cat", "/sys/class/net/eth0/carrier"]).trim(), "1");
    lab.restore_link(h2).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(far.read(&mut byte).unwrap(), 1, "and it goes on when the link is back");
    world.down_and_check();
}

#[test]
fn down_finds_everything_and_deletes_through_no_mount() {
    let Some(world) = World::new("down") else { return };
    let canary = tempfile::tempdir().unwrap();
    fs::write(canary.path().join("bird"), "alive").unwrap();
    let lab = Lab::up(world.spec(1)).unwrap();
    let h1 = Node::Host(1);

    // Bind mounts of a directory that is not the lab's, on the machine and inside the host.
    let on_machine = lab.paths().host_state(h1).join("deep/bound");
    fs::create_dir_all(&on_machine).unwrap();
    rustix::mount::mount_bind(canary.path(), &on_machine).unwrap();
    let source = canary.path().display().to_string();
    output(
        &lab,
        h1,
        &[
            "sh",
            "-c",
            &format!(
                "mkdir /var/lib/godwit/inner && mount --bind {source} /var/lib/godwit/inner && touch /var/lib/godwit/inner/seen"
            ),
        ],
    );

    // Processes: a daemon-like one, one frozen, one in its own namespaces, one outside the lab's
    // cgroups but inside its network namespace.
    let mut children = Vec::new();
    let mut start = |mut command: Command| {
        children.push(command.stdout(Stdio::piped()).spawn().unwrap());
        let child = children.last_mut().unwrap();
        let mut line = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        child.id()
    };
    start(lab.exec(h1, &["setsid", "sh", "-c", "echo; exec sleep 1000"]).unwrap());
    start(lab.exec(h1, &["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", "echo; sleep 1000"]).unwrap());
    let frozen = start(lab.exec(h1, &["sh", "-c", "echo; exec sleep 1000"]).unwrap());
    let freezer = PathBuf::from("/sys/fs/cgroup/freezer");
    if freezer.exists() {
        let group = freezer.join(&lab.paths().containers_cgroup(h1)[1..]).join("c");
        fs::create_dir(&group).unwrap();
        fs::write(group.join("cgroup.procs"), frozen.to_string()).unwrap();
        fs::write(group.join("freezer.state"), "FROZEN").unwrap();
    }
    let mut outside = Command::new("nsenter");
    outside.arg(format!("--net={}", lab.paths().net_namespace(h1).display())).args([
        "sh",
        "-c",
        "echo; exec sleep 1000",
    ]);
    start(outside);

    let before = Lab::leftovers(&world.name);
    assert!(before.iter().filter(|l| l.starts_with("process")).count() >= 4, "{before:#?}");
    for kind in ["mount", "cgroup", "directory"] {
        assert!(before.iter().any(|l| l.starts_with(kind)), "{kind}: {before:#?}");
    }
    // A mount namespace that copied the lab's mounts is not the lab's, and its process lives on.
    let mut bystander = Command::new("unshare")
        .args(["--mount", "sh", "-c", "echo; exec sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    bystander.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();

    lab.down().unwrap();
    assert_eq!(Lab::leftovers(&world.name), Vec::<String>::new(), "also not in the bystander's mount namespace");
    assert!(bystander.try_wait().unwrap().is_none(), "the bystander was not touched");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    for mut child in children {
        assert!(!child.wait().unwrap().success());
    }
    assert_eq!(fs::read_to_string(canary.path().join("bird")).unwrap(), "alive");
    assert!(canary.path().join("seen").exists(), "the bind mount inside the host was the canary's");
}

#[test]
fn half_made_and_half_removed_labs_go_too() {
    let Some(world) = World::new("half") else { return };
    // Only directories; only the tmpfs without a record; only cgroups.
    let paths = godwit_lab::LabPaths::new(world.name.clone());
    fs::create_dir_all(paths.run()).unwrap();
    fs::create_dir_all(paths.state().join("h1/agent")).unwrap();
    assert!(matches!(Lab::up(world.spec(1)), Err(UpError::Exists(_))));
    assert!(Lab::open(&world.name).is_err());
    world.down_and_check();

    // State without anything running, as after a reboot: refused, and not deleted by the refusal.
    fs::create_dir_all(paths.state().join("h1/agent")).unwrap();
    assert!(matches!(Lab::up(world.spec(1)), Err(UpError::Exists(_))));
    assert!(paths.state().join("h1/agent").exists());
    world.down_and_check();

    // A complete lab of which others have removed parts.
    let lab = Lab::up(world.spec(2)).unwrap();
    fs::write(paths.record(), "{ not json").unwrap();
    rustix::mount::unmount(paths.mount_namespace(Node::Host(1)), rustix::mount::UnmountFlags::DETACH).unwrap();
    rustix::mount::unmount(paths.net_namespace(Node::Client), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(Lab::open(&world.name).is_err());
    lab.down().unwrap();
    world.down_and_check();

    // A lab whose making fails unmakes itself: this daemon ends at once.
    let mut spec = world.spec(2);
    spec.start_daemons = true;
    spec.binary = "/bin/false".into();
    let error = Lab::up(spec).unwrap_err();
    assert!(error.to_string().contains("ended"), "{error}");
    assert_eq!(Lab::leftovers(&world.name), Vec::<String>::new());
}

#[test]
fn labs_run_side_by_side() {
    let Some(first) = World::new("one") else { return };
    let Some(second) = World::new("two") else { return };
    let one = Lab::up(first.spec(1)).unwrap();
    let two = Lab::up(second.spec(1)).unwrap();
    let h1 = Node::Host(1);
    let listener = one.visit(h1, || TcpListener::bind((h1.address(), 0)).unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let same_address = two.visit(Node::Client, || TcpStream::connect((h1.address(), port))).unwrap();
    assert!(same_address.is_err(), "the same address in another lab is another host");
    drop(listener);
    // The second was made while the first was there, and must not keep any of it alive.
    first.down_and_check();
    assert_eq!(output(&two, h1, &["echo", "fine"]), "fine\n");
    second.down_and_check();
}

/// Not a test of its own: run by the stand-in for `godwit controller` below, it holds the API socket.
#[test]
fn stand_in_controller() {
    let Some(socket) = std::env::var_os("GODWIT_TEST_SOCKET") else { return };
    let _ = fs::remove_file(&socket);
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for connection in listener.incoming() {
        drop(connection);
    }
}

#[test]
fn daemons_outlive_their_starter_and_are_killed_one_by_one() {
    use std::os::unix::fs::PermissionsExt;
    let Some(world) = World::new("daemons") else { return };
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("stand-in");
    let script = format!(
        "#!/bin/sh\necho \"$@\"\n[ $1 = agent ] && exec sleep 100000\nmkdir -p $3 && echo t >$3/join-token\n\
         GODWIT_TEST_SOCKET=$5 exec {} --exact stand_in_controller\n",
        std::env::current_exe().unwrap().display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let spec = LabSpec { start_daemons: true, binary: program, ..world.spec(2) };
    let mut asked = 0;
    let lab = Lab::up_until(spec, |_| {
        asked += 1;
        if asked < 3 { Err("asked too early".to_owned()) } else { Ok(()) }
    })
    .unwrap();

    let (controller, one, two) = (lab.controller_pid().unwrap(), lab.agent_pid(1).unwrap(), lab.agent_pid(2).unwrap());
    let groups = fs::read_to_string(format!("/proc/{one}/cgroup")).unwrap();
    assert!(groups.contains(&lab.paths().daemon_cgroup(Node::Host(1))), "{groups}");
    let session = fs::read_to_string(format!("/proc/{one}/stat")).unwrap();
    assert_eq!(
        session.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap(),
        one.to_string(),
        "a session of its own"
    );

    lab.kill_agent(1).unwrap();
    assert_eq!(lab.agent_pid(1), None);
    assert!(lab.kill_agent(1).is_err());
    let again = lab.start_agent(1).unwrap();
    assert!(again != one && lab.start_agent(1).is_err());
    assert_ne!(lab.restart_controller().unwrap(), controller);
    assert_eq!(lab.agent_pid(2), Some(two), "the others were not touched");
    assert!(lab.log_tail(Node::Host(2)).contains("--name h2"));

    // Everything killed at once, by someone else.
    for pid in [lab.controller_pid(), lab.agent_pid(1), lab.agent_pid(2)].into_iter().flatten() {
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid as i32).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
    }
    world.down_and_check();
}
