//! A container of busybox in a world of the test's own, taken down also when the test fails.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use godwit_container::keeper::protocol::{Event, ExecSpec, WindowSize};
use godwit_container::keeper::spawn;
use godwit_container::keeper::state::{self, Exit};
use godwit_container::spec::{LaunchSpec, LogLimits, Masks, Resources, Rlimits, User};
use godwit_container::{Cgroup, KeeperClient, KeeperEvent, RootFs};

/// How long something that must happen may take on a machine that others load. Nothing waits as long as that: it waits
/// for the event.
pub const EVENT_TIMEOUT: Duration = Duration::from_secs(120);

pub fn keeper_binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_godwit-keeper"))
}

/// True when the test can run; says why when not.
pub fn root_or_skip() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

pub struct World {
    pub base: PathBuf,
    pub rootfs: RootFs,
    pub spec: LaunchSpec,
    pub parent: String,
}

impl World {
    /// A mounted root file system and a specification that runs `script` in its shell.
    pub fn new(name: &str, script: &str) -> World {
        let unique = format!("{name}-{}", std::process::id());
        // Not /tmp: an overlay's upper directory needs a disk file system.
        let base = PathBuf::from(format!("/var/tmp/godwit-container-{unique}"));
        let layer = base.join("layer");
        let dir = base.join("container");
        std::fs::create_dir_all(&dir).unwrap();
        install_busybox(&layer);
        let rootfs = RootFs { layers: vec![layer], dir };
        let id_base = 200_000;
        let path = rootfs.mount(id_base).unwrap();
        let parent = format!("/godwit-test-{unique}");
        let spec = LaunchSpec {
            id: format!("{:012x}", std::process::id()),
            hostname: "box-1".into(),
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            env: vec!["PATH=/bin".into(), "COLOUR=green".into()],
            cwd: "/".into(),
            user: User::default(),
            rootfs: path,
            id_base,
            id_count: 65_536,
            cgroup_parent: parent.clone(),
            keeper_cgroup: Some(format!("{parent}/keepers")),
            resources: Resources::default(),
            mounts: vec![],
            tmpfs: vec![],
            read_only_rootfs: false,
            etc_files: vec![],
            masks: Masks::of_this_host(),
            stop_signal: 15,
            log: LogLimits::default(),
            rlimits: Rlimits { nofile: 1024 },
        };
        World { base, rootfs, spec, parent }
    }

    pub fn dir(&self) -> &Path {
        &self.rootfs.dir
    }

    pub fn cgroup(&self) -> Cgroup {
        Cgroup::open(&self.spec.cgroup_path()).unwrap()
    }

    /// Starts the keeper and connects.
    pub fn spawn(&self) -> Box1 {
        self.spawn_with(None)
    }

    /// As [`World::spawn`]; the container stands still at the end of this lease.
    pub fn spawn_with(&self, lease: Option<&Path>) -> Box1 {
        spawn::spawn(keeper_binary(), self.dir(), &self.spec, lease).unwrap();
        self.connect()
    }

    pub fn connect(&self) -> Box1 {
        let (sender, events) = channel();
        let client = KeeperClient::connect(self.dir(), move |event| {
            let _ = sender.send(event);
        })
        .unwrap();
        Box1 { client, events }
    }

    /// Keeper, container, program: all running.
    pub fn start(&self) -> Box1 {
        let keeper = self.spawn();
        keeper.client.create().unwrap();
        keeper.client.start().unwrap();
        keeper
    }

    /// Runs the script to its end; gives exit and the log's text.
    pub fn run_to_end(&self) -> (Exit, String) {
        let keeper = self.start();
        let exit = keeper.exit();
        keeper.client.quit(false).unwrap();
        (exit, self.log())
    }

    pub fn log(&self) -> String {
        let lines = godwit_container::log::read_logs(self.dir(), None, None).unwrap();
        lines.into_iter().map(|line| line.text + "\n").collect()
    }

    /// Waits until the log has `text`.
    pub fn wait_for_log(&self, text: &str) {
        let mut follower = godwit_container::log::LogFollower::new(self.dir()).unwrap();
        let deadline = std::time::Instant::now() + EVENT_TIMEOUT;
        while !self.log().contains(text) {
            assert!(std::time::Instant::now() < deadline, "no {text:?} in {:?}", self.log());
            follower.next(Duration::from_millis(500)).unwrap();
        }
    }

    /// The log of a container that is frozen: all that it wrote before is in it.
    pub fn log_of_frozen(&self, keeper: &Box1) -> String {
        let pid = keeper.client.status().unwrap().pid.unwrap();
        let deadline = std::time::Instant::now() + EVENT_TIMEOUT;
        for stream in [1, 2] {
            let pipe = std::fs::File::open(format!("/proc/{pid}/fd/{stream}")).unwrap();
            while rustix::io::ioctl_fionread(&pipe).unwrap() > 0 {
                assert!(std::time::Instant::now() < deadline, "its keeper does not read what it wrote");
                // The keeper does one thing after the other: each answer is one turn further.
                keeper.client.status().unwrap();
            }
        }
        // What it read last is in the log before it answers again.
        keeper.client.status().unwrap();
        self.log()
    }

    /// Everything goes; panics when something stays.
    pub fn finish(self) {
        self.take_down().unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.base.to_str().unwrap()), "mounts are left");
        assert!(!self.cgroup().exists(), "the cgroup is left");
        assert!(!self.base.exists(), "files are left");
    }

    fn take_down(&self) -> Result<(), Box<dyn std::error::Error>> {
        if let Ok(Some(state)) = state::read_state(self.dir())
            && state::is_keeper_alive(self.dir())?
        {
            let pid = rustix::process::Pid::from_raw(state.keeper_pid as i32).unwrap();
            let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
            if let Ok(client) = KeeperClient::connect(self.dir(), |_| {}) {
                let _ = client.quit(true);
            }
            wait_readable(&pidfd);
        }
        if self.dir().join("spec.json").exists() {
            spawn::clear_after_keeper(self.dir())?;
        }
        self.rootfs.delete()?;
        godwit_container::remove_dir_all_no_xdev(&self.base)?;
        Cgroup::open(&self.parent)?.delete()?;
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("take down {}: {error}", self.base.display());
        }
    }
}

pub fn wait_readable(fd: &impl std::os::fd::AsFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let limit = Timespec { tv_sec: EVENT_TIMEOUT.as_secs().cast_signed(), tv_nsec: 0 };
    let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&limit))).unwrap();
    assert_eq!(ready, 1, "nothing happened for {EVENT_TIMEOUT:?}");
}

/// The connection to a box's keeper.
pub struct Box1 {
    pub client: KeeperClient,
    pub events: Receiver<KeeperEvent>,
}

impl Box1 {
    pub fn next(&self) -> KeeperEvent {
        self.events.recv_timeout(EVENT_TIMEOUT).expect("an event in time")
    }

    pub fn exit(&self) -> Exit {
        loop {
            match self.next() {
                KeeperEvent::Happened(Event::Exited(exit)) => return exit,
                KeeperEvent::Happened(_) => {}
                KeeperEvent::Lost => panic!("lost the keeper"),
            }
        }
    }

    pub fn exec_exit(&self, id: u64) -> Exit {
        loop {
            match self.next() {
                KeeperEvent::Happened(Event::ExecExited { exec_id, exit }) if exec_id == id => return exit,
                KeeperEvent::Happened(_) => {}
                KeeperEvent::Lost => panic!("lost the keeper"),
            }
        }
    }

    /// Runs a command to its end; gives exit code and what it wrote.
    pub fn exec(&self, script: &str) -> (Option<i32>, String) {
        use std::io::Read;
        let (id, fds) = self.client.exec(command(script, None)).unwrap();
        let mut fds = fds.into_iter();
        drop(fds.next());
        let mut text = String::new();
        for fd in fds {
            std::fs::File::from(fd).read_to_string(&mut text).unwrap();
        }
        (self.exec_exit(id).code, text)
    }
}

pub fn command(script: &str, tty: Option<WindowSize>) -> ExecSpec {
    ExecSpec {
        argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        user: User::default(),
        tty,
    }
}

fn install_busybox(layer: &Path) {
    let bin = layer.join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    for dir in ["etc", "tmp", "proc", "sys", "dev"] {
        std::fs::create_dir_all(layer.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox-static is installed");
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
    }
    std::fs::write(layer.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n").unwrap();
}
