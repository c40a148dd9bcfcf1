//! When a filler in a process of its own ends, and when it must not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::held::{Held, PAGES, World, store};
use common::{PAGE, root_or_skip, signal, victim_path};
use godwit_memory::{FillError, FillerProcess, Key, ObjectId, PageStore, StoreError};
use nix::sys::signal::Signal;

/// What ends, ends within this; it is looked for twice a second.
const SOON: Duration = Duration::from_secs(10);

fn runs(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// It ends, and nothing of it is left, no zombie either.
fn assert_ends(pid: i32) {
    let deadline = Instant::now() + SOON;
    while runs(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// It is there, and stays.
fn assert_stays(pid: i32) {
    std::thread::sleep(Duration::from_millis(1500));
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    assert!(!stat.contains(") Z "), "{stat}");
}

#[test]
fn it_fills_everything_and_ends() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.start();
    assert!(world.socket().exists());
    let store = store();
    let began = Instant::now();
    filler.load(Arc::clone(&store)).unwrap();
    eprintln!("96 MiB handed over in {:?}", began.elapsed());
    assert!(matches!(store.put(Key::Process(1), 0, 0, &[0; PAGE]), Err(StoreError::HandedOver { .. })));
    drop(store);
    assert!(filler.load(Arc::new(PageStore::new().unwrap())).is_err(), "a second time");
    let mut held = Held::start(&world);
    assert_eq!(held.ask("read 5000"), "5001");
    assert_eq!(filler.wait(Duration::from_millis(50)).unwrap(), None);
    let progress = filler.progress().unwrap();
    assert!((progress.processes, progress.faults) == (1, 1) && progress.filled_bytes < 1 << 20, "{progress:?}");
    filler.restored(Vec::new()).unwrap();
    assert_eq!(held.ask("finish"), "finished");
    let report = filler.wait(SOON).unwrap().expect("everything is filled");
    assert_eq!((report.filled_bytes, report.left_bytes, report.unplaced_pages), (PAGES * PAGE as u64, 0, 0));
    assert_ends(filler.pid());
    assert_eq!(held.ask("all"), "0");
    // Also long after its end.
    assert_eq!(filler.wait(Duration::ZERO).unwrap(), Some(report));
    assert_eq!(filler.progress().unwrap().filled_bytes, report.filled_bytes);
    assert!(!world.socket().exists());
}

#[test]
fn it_goes_on_without_the_agent_after_the_restore() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.loaded();
    let mut held = Held::start(&world);
    filler.restored(Vec::new()).unwrap();
    let pid = filler.pid();
    drop(filler);
    // What an agent's end may bring with it.
    [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT].into_iter().for_each(|s| signal(pid, s));
    assert_eq!(held.ask("finish"), "finished");
    assert_eq!(held.ask("all"), "0");
    assert_ends(pid);
    assert_eq!(held.ask("all"), "0");
}

#[test]
fn it_goes_on_without_the_agent_while_processes_are_held() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.loaded();
    let mut held = Held::start(&world);
    let pid = filler.pid();
    assert_eq!(held.ask("read 100"), "101");
    drop(filler);
    [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT].into_iter().for_each(|s| signal(pid, s));
    assert_stays(pid);
    assert_eq!(held.ask("read 20000"), "20001");
    assert_eq!(held.ask("finish"), "finished");
    assert_ends(pid);
    assert_eq!(held.ask("all"), "0");
}

#[test]
fn processes_stand_still_rather_than_run_without_their_shared_memory() {
    if !root_or_skip() {
        return;
    }
    for with_agent in [true, false] {
        let world = World::new();
        let filler = world.start();
        let store = store();
        let object = Key::Object(ObjectId { device: 1, inode: 2, sysv: false });
        store.put(object, 0, 0, &[7; PAGE]).unwrap();
        filler.load(store).unwrap();
        let mut held = Held::start(&world);
        let pid = filler.pid();
        let filler = with_agent.then_some(filler);
        assert_eq!(held.ask("finish"), "finished");
        if let Some(filler) = &filler {
            let error = filler.wait(SOON).unwrap_err();
            assert!(matches!(error, FillError::SharedUnplaced), "{error}");
        } else {
            // Nobody tells when it has heard criu.
            std::thread::sleep(Duration::from_millis(500));
        }
        held.tell("read 9");
        assert_stays(pid);
        held.kill();
        assert_eq!(held.line(), "", "it has read something");
        assert_ends(pid);
    }
}

#[test]
fn it_ends_when_nobody_will_come() {
    let world = World::new();
    let filler = world.start();
    let pid = filler.pid();
    drop(filler);
    assert_ends(pid);
    assert!(!world.socket().exists());
    let filler = world.loaded();
    let pid = filler.pid();
    drop(filler);
    assert_ends(pid);
    assert!(!world.socket().exists());
}

#[test]
fn a_failed_restore_is_told_and_nobody_reads_zeroes_until_it_is_gone() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.loaded();
    let mut held = Held::start(&world);
    assert_eq!(held.ask("close"), "closed");
    let error = filler.wait(SOON).unwrap_err();
    assert!(matches!(error, FillError::RestoreFailed), "{error}");
    assert!(matches!(filler.restored(Vec::new()), Err(FillError::RestoreFailed)));
    assert!(matches!(filler.progress(), Err(FillError::RestoreFailed)));
    // It stands still at a page that is not there.
    held.tell("read 9");
    assert_stays(filler.pid());
    held.kill();
    assert_eq!(held.line(), "", "it has read something");
    assert_ends(filler.pid());
}

#[test]
fn it_ends_when_all_processes_are_killed_while_held() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.loaded();
    // criu is still there.
    let mut held = Held::start(&world);
    let criu = keep_connection(&held);
    assert_stays(filler.pid());
    held.kill();
    let error = filler.wait(SOON).unwrap_err();
    assert!(matches!(error, FillError::Gone), "{error}");
    assert_ends(filler.pid());
    drop(criu);
}

#[test]
fn it_ends_when_all_processes_are_killed_without_agent() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.loaded();
    let mut held = Held::start(&world);
    let criu = keep_connection(&held);
    let pid = filler.pid();
    drop(filler);
    assert_stays(pid);
    held.kill();
    assert_ends(pid);
    drop(criu);
}

#[test]
fn it_ends_when_all_processes_are_killed_while_filled() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.loaded();
    let mut held = Held::start(&world);
    filler.restored(Vec::new()).unwrap();
    assert_eq!(held.ask("finish"), "finished");
    held.kill();
    filler.wait(SOON).unwrap().expect("nothing is left to do");
    assert_ends(filler.pid());
}

/// The socket that a program has to the filler, as a descriptor of ours: it stays open when the program is killed.
fn keep_connection(held: &Held) -> std::os::fd::OwnedFd {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pid = held.child.id().cast_signed();
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_socket = |e: &std::fs::DirEntry| {
        std::fs::read_link(e.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    let socket = all.filter(is_socket).find_map(|e| e.file_name().to_str()?.parse().ok()).unwrap();
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(pidfd, socket, PidfdGetfdFlags::empty()).unwrap()
}

#[test]
fn it_can_be_abandoned_at_any_time() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.start();
    filler.abandon();
    assert_ends(filler.pid());
    assert!(!world.socket().exists());
    assert!(matches!(filler.progress(), Err(FillError::Process { .. })));
    let filler = world.loaded();
    let mut held = Held::start(&world);
    assert_eq!(held.ask("read 7"), "8");
    held.kill();
    filler.abandon();
    assert_ends(filler.pid());
    assert!(filler.wait(SOON).is_err());
}

#[test]
fn criu_waits_for_the_pages_to_come() {
    if !root_or_skip() {
        return;
    }
    let world = World::new();
    let filler = world.start();
    assert!(matches!(filler.restored(Vec::new()), Err(FillError::Remote(_))), "there are no pages yet");
    assert_eq!(filler.progress().unwrap().processes, 0);
    let mut held = Held::start(&world);
    held.tell("read 9");
    std::thread::sleep(Duration::from_millis(100));
    filler.load(store()).unwrap();
    assert_eq!(held.line(), "10");
    held.kill();
    assert!(filler.wait(SOON).is_err());
}

#[test]
fn what_cannot_be_started_is_an_error_and_no_process() {
    let world = World::new();
    let children = || std::fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id())).unwrap();
    let start = |command| FillerProcess::start(command, world.directory.path()).err().expect("an error");
    let error = start(Command::new("/no/such/program"));
    assert!(matches!(error, FillError::Process { .. }), "{error:?}");
    let error = start(Command::new("/bin/true"));
    assert!(matches!(error, FillError::Process { .. }), "{error:?}");
    let mut command = Command::new(victim_path());
    command.args(["filler", "/no/such/directory"]);
    let error = start(command);
    assert!(matches!(&error, FillError::Remote(text) if text.contains("No such file")), "{error:?}");
    let deadline = Instant::now() + SOON;
    while !children().is_empty() {
        assert!(Instant::now() < deadline, "{}", children());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_has_a_session_of_its_own_and_no_descriptor_of_ours() {
    let world = World::new();
    // Without O_CLOEXEC.
    let leaked = nix::unistd::dup(std::io::stderr()).unwrap();
    let filler = world.start();
    let pid = filler.pid();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().parse();
    assert_eq!(session, Ok(pid));
    let link = |fd: &str| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).map(|p| p.display().to_string());
    for standard in ["0", "1", "2"] {
        assert_eq!(link(standard).unwrap(), "/dev/null");
    }
    assert!(link("3").unwrap().starts_with("socket:"));
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let all: Vec<_> = all.filter_map(|e| link(e.file_name().to_str().unwrap()).ok()).collect();
    // Its control socket and the one it listens on.
    assert!(all.iter().filter(|l| *l != "/dev/null").all(|l| l.starts_with("socket:")), "{all:?}");
    drop(leaked);
    // What the caller has set stays.
    let log = world.directory.path().join("log");
    let mut command = Command::new(victim_path());
    command.arg("filler").arg(world.directory.path()).stderr(std::fs::File::create(&log).unwrap());
    let other = FillerProcess::start(command, world.directory.path()).unwrap();
    assert_eq!(std::fs::read_link(format!("/proc/{}/fd/2", other.pid())).unwrap(), log);
}
