//! `godwit exec -it` on a terminal: raw while it runs, as before on every way out.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use support::Controller;

const TIMEOUT_S: u64 = 20;

/// A terminal, and the binary on it.
struct Session {
    ours: OwnedFd,
    theirs: OwnedFd,
    child: Child,
    seen: String,
    before: LocalModes,
}

impl Session {
    fn start(controller: &Controller, command: &[&str]) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let theirs = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).unwrap();
        tcsetwinsize(&theirs, size(100, 40)).unwrap();
        let before = tcgetattr(&theirs).unwrap().local_modes;
        assert!(before.contains(LocalModes::ICANON | LocalModes::ECHO));
        let stdio = || Stdio::from(theirs.try_clone().unwrap());
        let args = [&["exec", "-it", "shop/db-1", "--"], command].concat();
        let mut command = controller.godwit(&args);
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        Self { ours, theirs, child, seen: String::new(), before }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.theirs)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn is_as_before(&self) -> bool {
        tcgetattr(&self.theirs).unwrap().local_modes == self.before
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn types(&self, text: &str) {
        rustix::io::write(&self.ours, text.as_bytes()).unwrap();
    }

    /// Reads what the terminal shows until `text` is there, and forgets it.
    fn sees(&mut self, text: &str) {
        let end = Instant::now() + Duration::from_secs(TIMEOUT_S);
        while !self.seen.contains(text) {
            assert!(Instant::now() < end, "{text:?} does not come; seen: {:?}", self.seen);
            let mut fds = [PollFd::new(&self.ours, PollFlags::IN)];
            poll(&mut fds, Some(&Duration::from_millis(200).try_into().unwrap())).unwrap();
            if fds[0].revents().contains(PollFlags::IN) {
                let mut buffer = [0; 4096];
                let n = rustix::io::read(self.ours.as_fd(), &mut buffer).unwrap();
                self.seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        }
        self.seen.clear();
    }

    fn exit_code(&mut self) -> i32 {
        let end = Instant::now() + Duration::from_secs(TIMEOUT_S);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().expect("ended by a signal");
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn signals_that_end_it_restore_the_terminal() {
    let controller = Controller::start();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        let mut session = Session::start(&controller, &["sleep"]);
        session.sees("asleep");
        assert!(session.is_raw());
        session.signal(signal);
        assert_eq!(session.exit_code(), 128 + signal as i32);
        assert!(session.is_as_before(), "{signal}");
    }
}

#[test]
fn keys_go_through_and_the_exit_code_comes_back() {
    let controller = Controller::start();
    let mut session = Session::start(&controller, &["cat"]);
    session.sees("ready");
    // Ctrl-C is a byte for the program here, no signal for us.
    session.types("a\x03b");
    session.sees("a\x03b");
    drop(session);

    let mut session = Session::start(&controller, &["exit", "42"]);
    assert_eq!(session.exit_code(), 42);
    assert!(session.is_as_before());
}

#[test]
fn the_container_learns_the_size() {
    let controller = Controller::start();
    let mut session = Session::start(&controller, &["size"]);
    session.sees(r#"{"columns":100,"rows":40}"#);
    tcsetwinsize(&session.theirs, size(120, 50)).unwrap();
    // The kernel sends it to the terminal's foreground group; this process group is none of that terminal.
    session.signal(Signal::SIGWINCH);
    session.sees("120x50");
}

#[test]
fn a_session_that_breaks_restores_the_terminal() {
    let controller = Controller::start();
    let mut session = Session::start(&controller, &["sleep"]);
    session.sees("asleep");
    assert!(session.is_raw());
    drop(controller);
    session.sees("error: the connection broke");
    assert_eq!(session.exit_code(), 1);
    assert!(session.is_as_before());
}
