//! A container's life by its keeper, on the real kernel.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{World, root_or_skip, wait_readable};
use godwit_container::KeeperEvent;
use godwit_container::keeper::spawn;
use godwit_container::keeper::state::{self, Phase};
use godwit_container::spec::{BindMount, EtcFile, Tmpfs, User};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

fn pidfd(pid: u32) -> std::os::fd::OwnedFd {
    pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap()
}

#[test]
fn a_program_runs_isolated_and_its_exit_code_and_output_are_known() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("run", "echo pid $$ on $(hostname), $COLOUR; id -u; echo oops >&2; exit 7");
    let (exit, log) = world.run_to_end();
    assert_eq!((exit.code, exit.signal), (Some(7), None), "{log}");
    assert!(log.contains("pid 1 on box-1, green\n0\n"), "{log}");
    assert!(log.contains("oops"), "{log}");
    assert_eq!(state::read_exit(world.dir()).unwrap().unwrap(), exit);
    world.finish();
}

#[test]
fn a_created_container_waits_for_its_start() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("created", "cat /sys/class/net/*/address; exit 0");
    let keeper = world.spawn();
    let pid = keeper.client.create().unwrap();
    let state = keeper.client.status().unwrap();
    assert_eq!((state.phase, state.pid), (Phase::Created, Some(pid)));
    for (stream, inode) in [(1, state.stdout_pipe), (2, state.stderr_pipe)] {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{stream}")).unwrap();
        assert_eq!(link.to_str().unwrap(), format!("pipe:[{}]", inode.unwrap()));
    }
    let host = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap(), host);
    assert_eq!(world.log(), "", "nothing runs before the start");
    assert!(keeper.client.create().is_err(), "there is one container to a keeper");
    keeper.client.start().unwrap();
    assert!(keeper.client.start().is_err());
    assert_eq!(keeper.exit().code, Some(0));
    keeper.client.quit(false).unwrap();
    assert_eq!(world.log(), "00:00:00:00:00:00\n", "only its own loopback is there");
    world.finish();
}

#[test]
fn signals_arrive() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("signal", "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.1; done");
    let keeper = world.start();
    world.wait_for_log("ready");
    keeper.client.signal(15).unwrap();
    assert_eq!(keeper.exit().code, Some(9));
    assert!(keeper.client.signal(15).is_err(), "nobody is there to signal");
    keeper.client.quit(false).unwrap();
    assert!(world.log().ends_with("bye\n"));
    world.finish();

    let world = World::new("kill", "echo ready; while :; do sleep 1; done");
    let keeper = world.start();
    world.wait_for_log("ready");
    assert!(keeper.client.quit(false).is_err(), "a running container is not dropped");
    keeper.client.signal(9).unwrap();
    let exit = keeper.exit();
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (None, Some(9), false));
    world.finish();
}

#[test]
fn the_agent_may_go_and_come_back() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("adopt", "echo one; read x < /tmp/go; echo two; read x < /tmp/end; exit 3");
    let go = world.rootfs.path().join("tmp/go");
    // One each: who opens a pipe again before its writer has closed it reads an end.
    let end = world.rootfs.path().join("tmp/end");
    for pipe in [&go, &end] {
        rustix::fs::mknodat(rustix::fs::CWD, pipe, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
    }
    let keeper = world.start();
    let pid = keeper.client.status().unwrap().pid;
    world.wait_for_log("one");
    drop(keeper);
    std::fs::write(&go, "x\n").unwrap();
    world.wait_for_log("two");

    let keeper = world.connect();
    let state = keeper.client.status().unwrap();
    assert_eq!((state.phase, state.pid), (Phase::Running, pid));
    assert_eq!(state::read_state(world.dir()).unwrap().unwrap(), state);
    // A second agent takes over.
    let second = world.connect();
    assert!(matches!(keeper.next(), KeeperEvent::Lost));
    assert!(keeper.client.status().is_err());
    let keeper_process = pidfd(second.client.status().unwrap().keeper_pid);
    drop(second);

    // It ends while nobody is there: the record is written and the keeper goes.
    std::fs::write(&end, "x\n").unwrap();
    wait_readable(&keeper_process);
    assert_eq!(state::read_exit(world.dir()).unwrap().unwrap().code, Some(3));
    assert!(!state::is_keeper_alive(world.dir()).unwrap());
    world.finish();
}

#[test]
fn a_killed_keeper_takes_its_container_along() {
    if !root_or_skip() {
        return;
    }
    // Also a container whose program runs as another user, for whom the kernel would have
    // dropped the death signal had it been set too early.
    for user in [0, 1000] {
        let mut world = World::new("orphan", "echo ready; while :; do sleep 1; done");
        world.spec.user = User { uid: user, gid: user, groups: vec![] };
        let keeper = world.start();
        world.wait_for_log("ready");
        let state = keeper.client.status().unwrap();
        let init = pidfd(state.pid.unwrap());
        assert!(state::is_keeper_alive(world.dir()).unwrap());
        assert!(spawn::clear_after_keeper(world.dir()).is_err(), "not while it lives");
        pidfd_send_signal(pidfd(state.keeper_pid), Signal::KILL).unwrap();
        wait_readable(&init);
        assert!(matches!(keeper.next(), KeeperEvent::Lost));
        assert!(!state::is_keeper_alive(world.dir()).unwrap());
        assert_eq!(state::read_exit(world.dir()).unwrap(), None, "nobody saw it end");
        spawn::clear_after_keeper(world.dir()).unwrap();
        assert!(!world.cgroup().exists());
        world.finish();
    }
}

#[test]
fn a_keeper_killed_before_the_start_leaves_nothing_running() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("orphan-created", "sleep 100");
    let keeper = world.spawn();
    let init = pidfd(keeper.client.create().unwrap());
    pidfd_send_signal(pidfd(keeper.client.status().unwrap().keeper_pid), Signal::KILL).unwrap();
    wait_readable(&init);
    world.finish();
}

#[test]
fn what_cannot_start_is_said_in_a_sentence() {
    if !root_or_skip() {
        return;
    }
    let mut world = World::new("missing", "");
    world.spec.argv = vec!["no-such-program".into()];
    let keeper = world.spawn();
    keeper.client.create().unwrap();
    let said = keeper.client.start().unwrap_err().to_string();
    assert!(said.contains("no program \"no-such-program\""), "{said}");
    assert_eq!(keeper.exit().code, Some(127));
    keeper.client.quit(false).unwrap();
    world.finish();

    let mut world = World::new("bad-mount", "");
    let missing = world.base.join("not-there");
    world.spec.mounts = vec![BindMount { source: missing, target: "/data".into(), read_only: false }];
    let keeper = world.spawn();
    let said = keeper.client.create().unwrap_err().to_string();
    assert!(said.contains("not-there"), "{said}");
    assert!(!world.cgroup().exists(), "a failed create leaves no cgroup");
    assert_eq!(keeper.client.status().unwrap().phase, Phase::New);
    world.finish();
}

#[test]
fn one_keeper_to_a_directory() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("second", "sleep 100");
    let _keeper = world.start();
    let said = spawn::spawn(common::keeper_binary(), world.dir(), &world.spec, None).unwrap_err().to_string();
    assert!(said.contains("another keeper"), "{said}");
    world.connect().client.status().unwrap();
    world.finish();
}

#[test]
fn volumes_memory_file_systems_and_generated_files_are_there() {
    if !root_or_skip() {
        return;
    }
    let script = "cat /data/in; echo out > /data/out; echo x > /fixed/x || echo fixed is read-only; \
        df -m /scratch | tail -1; stat -c %a /scratch; cat /etc/hosts; echo x > /x || echo root is read-only; \
        echo x > /scratch/x && echo scratch is writable; stat -c %u /data/in; pwd; id -G";
    let mut world = World::new("volumes", script);
    let (data, fixed) = (world.base.join("data"), world.base.join("fixed"));
    for dir in [&data, &fixed] {
        std::fs::create_dir(dir).unwrap();
        std::os::unix::fs::chown(dir, Some(200_000), Some(200_000)).unwrap();
    }
    // The way to the volume is closed to the container's ids.
    std::fs::set_permissions(&world.base, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::write(data.join("in"), "from outside\n").unwrap();
    std::os::unix::fs::chown(data.join("in"), Some(200_005), Some(200_005)).unwrap();
    let bind = |source: &std::path::Path, target: &str, read_only| BindMount {
        source: source.to_owned(),
        target: target.into(),
        read_only,
    };
    world.spec.mounts = vec![bind(&data, "/data", false), bind(&fixed, "/fixed", true)];
    world.spec.tmpfs = vec![Tmpfs { target: "/scratch".into(), size_bytes: 8 << 20, mode: 0o1777 }];
    world.spec.etc_files = vec![EtcFile { name: "hosts".into(), content: "10.0.0.2 box-1\n".into() }];
    // A link in the image is replaced, not followed.
    std::os::unix::fs::symlink("/data/in", world.rootfs.path().join("etc/hosts")).unwrap();
    world.spec.read_only_rootfs = true;
    world.spec.cwd = "/tmp".into();
    world.spec.user.groups = vec![7, 8];
    let targets: Vec<String> = godwit_container::external_mounts(&world.spec, world.dir())
        .into_iter()
        .map(|mount| mount.target_in_container)
        .collect();
    assert_eq!(targets[..3], ["/dev", "/data", "/fixed"]);
    assert!(targets.contains(&"/proc/keys".to_owned()), "{targets:?}");
    let (exit, log) = world.run_to_end();
    assert_eq!(exit.code, Some(0), "{log}");
    for want in [
        "from outside\n",
        "fixed is read-only\n",
        " 8 ",
        "\n1777\n",
        "10.0.0.2 box-1\n",
        "root is read-only\n",
        "scratch is writable\n",
        "\n5\n",
        "/tmp\n",
        "0 7 8\n",
    ] {
        assert!(log.contains(want), "{want:?} in {log}");
    }
    let out = std::fs::metadata(data.join("out")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&out), 200_000);
    assert_eq!(std::fs::read_to_string(data.join("in")).unwrap(), "from outside\n");
    world.finish();
}
