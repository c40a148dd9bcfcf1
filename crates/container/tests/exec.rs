//! Commands run in a running container.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};

use common::{World, command, root_or_skip};
use godwit_container::keeper::protocol::WindowSize;
use godwit_container::spec::User;

const WAIT: &str = "echo ready; while :; do sleep 1; done";

#[test]
fn a_command_has_the_containers_world_and_its_own_streams() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("exec", WAIT);
    let keeper = world.start();
    let (code, text) = keeper.exec("echo on $(hostname), $(ls /proc/1/exe); echo bad >&2; exit 5");
    assert_eq!(code, Some(5));
    assert_eq!(text, "on box-1, /proc/1/exe\nbad\n");
    // The same walls as for the program.
    let (_, text) = keeper.exec("grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/1/status; grep -E 'memory|^0::' /proc/self/cgroup | head -n 1; grep -E 'memory|^0::' /proc/1/cgroup | head -n 1");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], lines[4..8], "{text}");
    assert_eq!(lines[8], lines[9], "{text}");
    let (_, text) = keeper.exec("for p in $$ 1; do for n in user pid mnt net; do readlink /proc/$p/ns/$n; done; done");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], lines[4..], "{text}");

    let (id, fds) = keeper.client.exec(command("read line; echo got $line; sleep 100", None)).unwrap();
    let [stdin, stdout, _stderr]: [File; 3] = fds.into_iter().map(File::from).collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(keeper.client.status().unwrap().execs, 1);
    { stdin }.write_all(b"hello\n").unwrap();
    let mut answer = [0; 10];
    { &stdout }.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"got hello\n");
    keeper.client.signal_exec(id, 15).unwrap();
    assert_eq!(keeper.exec_exit(id).signal, Some(15));
    assert_eq!(keeper.client.status().unwrap().execs, 0);
    world.finish();
}

#[test]
fn a_terminal_has_its_size_and_is_the_controlling_one() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("tty", WAIT);
    let keeper = world.start();
    for uid in [0, 1000] {
        let size = WindowSize { rows: 33, columns: 101 };
        let mut spec = command("tty; stty size; echo user $(id -u); read x </dev/tty; stty size; exit 4", Some(size));
        spec.user = User { uid, gid: uid, groups: vec![] };
        let (id, mut fds) = keeper.client.exec(spec).unwrap();
        assert_eq!(fds.len(), 1);
        let mut master = File::from(fds.remove(0));
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while !text.contains(&format!("user {uid}\r\n")) {
            let count = master.read(&mut buffer).unwrap();
            text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        }
        assert!(text.starts_with("/dev/pts/") && text.contains("33 101"), "{text:?}");
        let larger = rustix::termios::Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, larger).unwrap();
        master.write_all(b"\n").unwrap();
        assert_eq!(keeper.exec_exit(id).code, Some(4));
        let mut rest = Vec::new();
        // The end of a terminal is an error to its master.
        let _ = master.read_to_end(&mut rest);
        assert!(String::from_utf8_lossy(&rest).contains("40 120"), "{rest:?}");
    }
    world.finish();
}

#[test]
fn what_cannot_run_is_refused_and_nothing_is_left() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("exec-no", WAIT);
    let keeper = world.spawn();
    assert!(keeper.client.exec(command("true", None)).is_err(), "nothing runs yet");
    keeper.client.create().unwrap();
    keeper.client.start().unwrap();
    let mut spec = command("", None);
    spec.argv = vec!["/bin/nothing".into()];
    let said = keeper.client.exec(spec).unwrap_err().to_string();
    assert!(said.contains("/bin/nothing"), "{said}");

    let cgroup = world.cgroup();
    cgroup.freeze().unwrap();
    let said = keeper.client.exec(command("true", None)).unwrap_err().to_string();
    assert!(said.contains("frozen"), "{said}");
    cgroup.thaw().unwrap();
    assert_eq!(keeper.exec("exit 0").0, Some(0));
    assert_eq!(keeper.client.status().unwrap().execs, 0);

    // Commands end with their container, and are told apart from it.
    let (id, _fds) = keeper.client.exec(command("sleep 100", None)).unwrap();
    keeper.client.signal(9).unwrap();
    assert_eq!(keeper.exec_exit(id).signal, Some(9));
    assert_eq!(keeper.exit().signal, Some(9));
    world.finish();
}
