//! A container is dumped in one directory and restored in another: what a move does, without network and second host.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::net::UnixStream;
use std::process::Command;

use common::{EVENT_TIMEOUT, World, root_or_skip};
use godwit_container::KeeperEvent;
use godwit_container::external_mounts;
use godwit_container::keeper::protocol::{Event, Request, RestoreSpec};
use godwit_container::keeper::state::Phase;
use godwit_container::spec::BindMount;
use godwit_criu::{Criu, Directories, DumpOptions, Ends, ExternalMount, Message, PageServerOptions, PassedFd, Session};

/// CRIU's images and working files, on a tmpfs; unmounted and removed at the end.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Images {
        let dir = tempfile::Builder::new().prefix("godwit-restore-").tempdir_in("/dev/shm").unwrap();
        for name in ["images", "work"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert!(Command::new("chmod").args(["-R", "755"]).arg(dir.path()).status().unwrap().success());
        Images(dir)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }
}

fn dump(world: &World, pid: u32, images: &Images) {
    let (pages_in, pages_out) = UnixStream::pair().unwrap();
    let criu = Criu::find().unwrap();
    let directories = Directories { images: images.path("images"), work: images.path("work") };
    let socket = |stream: UnixStream| vec![PassedFd { number: 10, fd: stream.into() }];
    let mut server = Session::start(&criu, socket(pages_in), Ends::Undone).unwrap();
    server.request_page_server(&PageServerOptions { directories: directories.clone(), socket_fd: 10 }).unwrap();
    let server_pid = match server.receive_within(EVENT_TIMEOUT) {
        Ok(Message::PageServer { pid }) => pid,
        other => {
            panic!("{other:?}: {}", std::fs::read_to_string(images.path("work/page-server.log")).unwrap_or_default())
        }
    };
    let mut session = Session::start(&criu, socket(pages_out), Ends::Undone).unwrap();
    let mounts = external_mounts(&world.spec, world.dir());
    session
        .request_dump(&DumpOptions {
            pid: pid.cast_signed(),
            directories,
            freeze_cgroup: world.cgroup().freezer_directory().unwrap(),
            external_mounts: mounts
                .into_iter()
                .map(|m| ExternalMount { target: m.target_in_container, source: m.source_on_host })
                .collect(),
            root: world.spec.rootfs.clone(),
            page_server_fd: Some(10),
        })
        .unwrap();
    loop {
        match session.receive_within(EVENT_TIMEOUT) {
            Ok(Message::Dumped) => break,
            Ok(Message::Notify { .. }) => session.proceed(true).unwrap(),
            other => panic!("{other:?}: {}", std::fs::read_to_string(images.path("work/dump.log")).unwrap_or_default()),
        }
    }
    drop(session);
    server.request_wait(server_pid).unwrap();
    let ended = server.receive_within(EVENT_TIMEOUT).unwrap();
    assert_eq!(ended, Message::Done { status: Some(0) }, "the page server has stored everything");
}

#[test]
fn a_dumped_container_goes_on_where_it_is_restored() {
    if !root_or_skip() {
        return;
    }
    let script = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.05; done";
    let mut source = World::new("dump", script);
    let mut destination = World::new("restore", script);
    destination.spec.id_base = source.spec.id_base;
    for world in [&mut source, &mut destination] {
        let volume = world.base.join("volume");
        std::fs::create_dir(&volume).unwrap();
        for target in ["/one", "/two"] {
            std::fs::create_dir(world.spec.rootfs.join(&target[1..])).unwrap();
            world.spec.mounts.push(BindMount { source: volume.clone(), target: target.into(), read_only: true });
        }
    }
    let keeper = source.start();
    source.wait_for_log("tick 5\n");
    let state = keeper.client.status().unwrap();
    let pid = state.pid.unwrap();

    source.cgroup().freeze().unwrap();
    // What is still in its pipe when it is dumped would be written on both sides.
    let last = source.log_of_frozen(&keeper);
    let images = Images::new();
    dump(&source, pid, &images);
    assert!(source.cgroup().is_frozen().unwrap(), "a dumped container stands still");
    assert_eq!(source.log(), last, "a dumped container says nothing");
    let count = last.lines().count();

    let other = destination.spawn();
    let restore = RestoreSpec {
        criu: Criu::find().unwrap().path,
        images_dir: images.path("images"),
        work_dir: images.path("work"),
        stdout_pipe: state.stdout_pipe,
        stderr_pipe: state.stderr_pipe,
        lazy_pages: false,
    };
    other.client.call(Request::Restore(restore)).unwrap();
    let log = || std::fs::read_to_string(images.path("work/restore.log")).unwrap_or_default();
    let expect = |wanted: &str| match other.next() {
        KeeperEvent::Happened(event) => {
            assert!(format!("{event:?}").starts_with(wanted), "{event:?} instead of {wanted}: {}", log());
            event
        }
        KeeperEvent::Lost => panic!("lost the keeper: {}", log()),
    };
    expect("RestoreNetwork");
    other.client.call(Request::RestoreProceed { go_on: true }).unwrap();
    let Event::Restored { pid: restored } = expect("Restored") else { unreachable!() };
    assert_eq!(other.client.status().unwrap().phase, Phase::Restored);
    assert!(destination.log().is_empty(), "nothing runs before the word");
    let cgroups = std::fs::read_to_string(format!("/proc/{restored}/cgroup")).unwrap();
    assert!(cgroups.contains(&destination.spec.cgroup_path()), "{cgroups}");
    other.client.call(Request::RestoreProceed { go_on: true }).unwrap();
    expect("Resumed");
    destination.wait_for_log(&format!("tick {}\n", count + 3));
    assert!(source.cgroup().is_frozen().unwrap());
    assert_eq!(source.log(), last, "the source has not moved");

    // The source can also go on: a failed move thaws it.
    source.cgroup().thaw().unwrap();
    source.wait_for_log(&format!("tick {}\n", count + 3));
    let first = destination.log().lines().next().unwrap().to_owned();
    assert_eq!(first, format!("tick {}", count + 1), "nothing is lost and nothing repeated");
    // Isolation came along.
    let status = std::fs::read_to_string(format!("/proc/{restored}/status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    let mounts = std::fs::read_to_string(format!("/proc/{restored}/mountinfo")).unwrap();
    assert!(!mounts.contains("shared:") && !mounts.contains("master:"), "{mounts}");
    let seen = "cat /proc/1/cgroup; cut -d' ' -f5-6 /proc/1/mountinfo | sort";
    assert_eq!(keeper.exec(seen), other.exec(seen), "cgroup paths and mounts look the same inside");
    drop((keeper, other));
    source.finish();
    destination.finish();
}
