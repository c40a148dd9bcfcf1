//! A lab as a whole: making it, opening it, faults on demand.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::cgroups::{self, CgroupError};
use crate::daemons::{self, DaemonError};
use crate::down::{self, DownError};
use crate::links::{self, LinkError};
use crate::namespaces::{self, NamespaceError};
use crate::paths::{HOST_STATE, LabPaths, RUN_ROOT, STATE_ROOT};
use crate::processes::Process;
use crate::record::{self, LabRecord, RECORD_VERSION, RecordError};
use crate::spec::{BitsPerSecond, LabName, LabSpec, Node, SpecError};

/// Longest wait for the controller's socket, the join token, and a caller's own condition.
const READY_TIMEOUT_MS: u64 = 30_000;
/// Time between two looks at a condition that the kernel has no event for.
const READY_POLL_MS: u64 = 5;
/// Longest wait for a killed daemon to end.
const KILL_TIMEOUT_MS: u64 = 10_000;

/// A lab that could not be made. What had been made is unmade again.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    #[error("there is a lab {0} already: `godwit lab down --name {0}` removes it")]
    Exists(LabName),
    #[error("a lab needs root")]
    NotRoot,
    #[error("{} cannot be run by lab hosts", .path.display())]
    Binary { path: PathBuf, source: io::Error },
    #[error("cannot make {}", .path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot mount a tmpfs at {}", .path.display())]
    Tmpfs { path: PathBuf, source: io::Error },
    #[error("the lab's hosts were not ready within {timeout_ms} ms: {missing}")]
    NotReady { timeout_ms: u64, missing: String },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error("{cause}; and then {left}")]
    HalfMade { cause: Box<UpError>, left: DownError },
}

/// Something that cannot be done with a lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("lab {lab} has no host {node}")]
    NoHost { lab: LabName, node: Node },
    #[error("no command given to run on {0}")]
    NoCommand(Node),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// A lab that exists. Dropping the value leaves the lab as it is: labs outlive programs.
#[derive(Debug)]
pub struct Lab {
    spec: LabSpec,
    paths: LabPaths,
}

/// The names of all labs of which anything exists, also of half-made and half-removed ones.
pub fn list() -> Vec<LabName> {
    let mut names = cgroups::lab_names();
    for root in [RUN_ROOT, STATE_ROOT] {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        names.extend(entries.filter_map(|e| e.file_name().into_string().ok()));
    }
    let mut names: Vec<LabName> = names.into_iter().filter_map(|n| LabName::new(n).ok()).collect();
    names.sort();
    names.dedup();
    names
}

impl Lab {
    /// Makes a lab; returns when the controller's socket accepts and every agent has started.
    pub fn up(spec: LabSpec) -> Result<Self, UpError> {
        Self::up_until(spec, |_| Ok(()))
    }

    /// As [`up`](Self::up), and then asks `ready` until it agrees; its error says what is missing.
    pub fn up_until(spec: LabSpec, ready: impl FnMut(&Lab) -> Result<(), String>) -> Result<Self, UpError> {
        spec.check()?;
        if !rustix::process::geteuid().is_root() {
            return Err(UpError::NotRoot);
        }
        let binary = |source| UpError::Binary { path: spec.binary.clone(), source };
        let mut spec = spec.clone();
        if spec.start_daemons {
            // Daemons run in another directory.
            spec.binary = spec.binary.canonicalize().map_err(binary)?;
        }
        let lab = Self { paths: LabPaths::new(spec.name.clone()), spec };
        let run = lab.paths.run();
        make_directory(Path::new(RUN_ROOT))?;
        // Whoever makes this directory owns the name.
        match fs::create_dir(&run) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(UpError::Exists(lab.spec.name)),
            Err(source) => return Err(UpError::Directory { path: run, source }),
        }
        if remains_of_earlier(&lab.paths) {
            // Its state may still be wanted: only `down` deletes it.
            let _ = fs::remove_dir(&run);
            return Err(UpError::Exists(lab.spec.name));
        }
        match lab.make(ready) {
            Ok(()) => Ok(lab),
            Err(cause) => match lab.down() {
                Ok(()) => Err(cause),
                Err(left) => Err(UpError::HalfMade { cause: Box::new(cause), left }),
            },
        }
    }

    fn make(&self, ready: impl FnMut(&Lab) -> Result<(), String>) -> Result<(), UpError> {
        let paths = &self.paths;
        mount_tmpfs(&paths.run())?;
        record::write(&paths.record(), &LabRecord { version: RECORD_VERSION, spec: self.spec.clone() })?;
        for directory in [paths.pins(), PathBuf::from(HOST_STATE), paths.logs()] {
            make_directory(&directory)?;
        }
        namespaces::make_switch(paths)?;
        for node in self.spec.nodes() {
            make_directory(&paths.host_state(node))?;
            namespaces::make_host(paths, node)?;
        }
        links::make(paths, &self.spec)?;
        cgroups::make(paths, &self.spec)?;
        if self.spec.start_daemons {
            self.start_controller()?;
            for node in self.spec.host_nodes() {
                daemons::start(paths, &self.spec, node)?;
            }
        }
        self.wait_until(ready)
    }

    /// Opens a lab that is up.
    pub fn open(name: &LabName) -> Result<Self, LabError> {
        let paths = LabPaths::new(name.clone());
        let record: LabRecord = record::read(&paths.record())?;
        if record.version != RECORD_VERSION {
            return Err(RecordError::Version { path: paths.record(), found: record.version }.into());
        }
        Ok(Self { spec: record.spec, paths })
    }

    /// Unmakes the lab. Collects what goes wrong and goes on.
    pub fn down(&self) -> Result<(), DownError> {
        down::down(&self.paths)
    }

    /// Unmakes whatever there is of a lab: killed, half made, half removed, or not there at all.
    pub fn down_by_name(name: &LabName) -> Result<(), DownError> {
        down::down(&LabPaths::new(name.clone()))
    }

    /// Everything that exists of a lab, one line each. Empty after `down`.
    pub fn leftovers(name: &LabName) -> Vec<String> {
        down::leftovers(&LabPaths::new(name.clone()))
    }

    pub fn spec(&self) -> &LabSpec {
        &self.spec
    }

    pub fn paths(&self) -> &LabPaths {
        &self.paths
    }

    /// A command that runs `argv` on a host, in its namespaces and its cgroup. Standard streams,
    /// environment and exit code are the program's own.
    pub fn exec<S: AsRef<OsStr>>(&self, node: Node, argv: &[S]) -> Result<Command, LabError> {
        self.check_node(node)?;
        if argv.is_empty() {
            return Err(LabError::NoCommand(node));
        }
        let argv: Vec<String> = argv.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
        Ok(daemons::command_on(&self.paths, node, &self.paths.exec_cgroup(node), false, &argv)?)
    }

    /// Replaces this process by `argv` on a host: what `godwit lab exec` does. Returns only the
    /// reason why that was not possible.
    pub fn exec_in_host<S: AsRef<OsStr>>(&self, node: Node, argv: &[S]) -> Result<io::Error, LabError> {
        Ok(daemons::replace_with(self.exec(node, argv)?))
    }

    /// Runs `work` on a thread inside a host's network namespace: the sockets it opens are the host's.
    pub fn visit<T: Send>(&self, node: Node, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        namespaces::visit(&self.paths.net_namespace(node), work)
    }

    /// The process id of a host's agent (or of `ctl`'s controller) if it runs.
    pub fn daemon_pid(&self, node: Node) -> Option<u32> {
        daemons::running(&self.paths, node)
    }

    pub fn agent_pid(&self, host: u32) -> Option<u32> {
        self.daemon_pid(Node::Host(host))
    }

    pub fn controller_pid(&self) -> Option<u32> {
        self.daemon_pid(Node::Controller)
    }

    /// `kill -9` of a daemon and nothing else; returns when it has ended.
    pub fn kill_daemon(&self, node: Node) -> Result<(), DaemonError> {
        let pid = self.daemon_pid(node).ok_or_else(|| DaemonError::None { node: node.to_string() })?;
        let wrong = |source| DaemonError::Kill { node: node.to_string(), pid, source };
        let Some(process) = Process::open(pid).map_err(wrong)? else { return Ok(()) };
        if self.daemon_pid(node) != Some(pid) {
            return Ok(());
        }
        process.kill().map_err(wrong)?;
        if process.wait_end(Duration::from_millis(KILL_TIMEOUT_MS)) {
            daemons::reap(&self.paths, node);
            Ok(())
        } else {
            Err(wrong(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("still there {KILL_TIMEOUT_MS} ms after SIGKILL"),
            )))
        }
    }

    pub fn kill_agent(&self, host: u32) -> Result<(), DaemonError> {
        self.kill_daemon(Node::Host(host))
    }

    pub fn kill_controller(&self) -> Result<(), DaemonError> {
        self.kill_daemon(Node::Controller)
    }

    /// Starts an agent that was killed, with the same command line.
    pub fn start_agent(&self, host: u32) -> Result<u32, DaemonError> {
        daemons::start(&self.paths, &self.spec, Node::Host(host))
    }

    /// Kills the agent if it runs and starts it.
    pub fn restart_agent(&self, host: u32) -> Result<u32, DaemonError> {
        if self.agent_pid(host).is_some() {
            self.kill_agent(host)?;
        }
        self.start_agent(host)
    }

    /// Starts the controller and returns when its socket accepts and the join token is there.
    pub fn start_controller(&self) -> Result<u32, DaemonError> {
        let pid = daemons::start(&self.paths, &self.spec, Node::Controller)?;
        let socket = self.paths.api_socket();
        self.await_file(&socket, || UnixStream::connect(&socket).is_ok())?;
        let token = self.paths.join_token();
        self.await_file(&token, || fs::metadata(&token).is_ok_and(|m| m.len() > 0))?;
        Ok(pid)
    }

    /// Kills the controller if it runs and starts it.
    pub fn restart_controller(&self) -> Result<u32, DaemonError> {
        if self.controller_pid().is_some() {
            self.kill_controller()?;
        }
        self.start_controller()
    }

    /// Takes a host off the switch. Its own end keeps its carrier.
    pub fn cut_link(&self, node: Node) -> Result<(), LinkError> {
        links::cut(&self.paths, node)
    }

    /// Puts a host back on the switch.
    pub fn restore_link(&self, node: Node) -> Result<(), LinkError> {
        links::restore(&self.paths, node)
    }

    /// Changes the rate of a host's link in both directions; None lifts the limit.
    pub fn set_link_rate(&self, node: Node, rate: Option<BitsPerSecond>) -> Result<(), LinkError> {
        links::set_rate(&self.paths, node, rate)
    }

    /// The end of a daemon's log, on one line, for error messages.
    pub fn log_tail(&self, node: Node) -> String {
        daemons::log_tail(&self.paths, node)
    }

    fn check_node(&self, node: Node) -> Result<(), LabError> {
        if self.spec.nodes().any(|n| n == node) {
            Ok(())
        } else {
            Err(LabError::NoHost { lab: self.spec.name.clone(), node })
        }
    }

    /// Waits for something the controller makes, or for the controller's end.
    fn await_file(&self, awaited: &Path, there: impl Fn() -> bool) -> Result<(), DaemonError> {
        let node = Node::Controller;
        let deadline = Instant::now() + Duration::from_millis(READY_TIMEOUT_MS);
        while !there() {
            if self.pause_unless_ended(node) {
                return Err(daemons::ended(&self.paths, node));
            }
            if Instant::now() >= deadline {
                return Err(DaemonError::NotReady {
                    awaited: awaited.to_owned(),
                    timeout_ms: READY_TIMEOUT_MS,
                    log: self.paths.log(node),
                    tail: self.log_tail(node),
                });
            }
        }
        Ok(())
    }

    /// Waits one poll interval, less if the daemon ends. True: it has ended.
    fn pause_unless_ended(&self, node: Node) -> bool {
        let process = self.daemon_pid(node).and_then(|pid| Process::open(pid).ok().flatten());
        process.is_none_or(|p| p.wait_end(Duration::from_millis(READY_POLL_MS)))
    }

    fn wait_until(&self, mut ready: impl FnMut(&Lab) -> Result<(), String>) -> Result<(), UpError> {
        let deadline = Instant::now() + Duration::from_millis(READY_TIMEOUT_MS);
        loop {
            let missing = match ready(self) {
                Ok(()) => break,
                Err(missing) => missing,
            };
            if Instant::now() >= deadline {
                return Err(UpError::NotReady { timeout_ms: READY_TIMEOUT_MS, missing });
            }
            self.check_daemons(Duration::from_millis(READY_POLL_MS))?;
        }
        self.check_daemons(Duration::from_millis(READY_POLL_MS))
    }

    /// Fails if a daemon has ended; takes `pause` in all.
    fn check_daemons(&self, pause: Duration) -> Result<(), UpError> {
        if !self.spec.start_daemons {
            std::thread::sleep(pause);
            return Ok(());
        }
        for node in std::iter::once(Node::Controller).chain(self.spec.host_nodes()) {
            if self.daemon_pid(node).is_none() {
                return Err(daemons::ended(&self.paths, node).into());
            }
        }
        if self.pause_unless_ended(Node::Controller) {
            return Err(daemons::ended(&self.paths, Node::Controller).into());
        }
        Ok(())
    }
}

/// True if a lab of this name was removed only in part, or the machine was started again.
fn remains_of_earlier(paths: &LabPaths) -> bool {
    paths.state().symlink_metadata().is_ok() || !cgroups::directories(paths).is_empty()
}

fn make_directory(path: &Path) -> Result<(), UpError> {
    fs::create_dir_all(path).map_err(|source| UpError::Directory { path: path.to_owned(), source })
}

fn mount_tmpfs(path: &Path) -> Result<(), UpError> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let wrong = |source: rustix::io::Errno| UpError::Tmpfs { path: path.to_owned(), source: source.into() };
    mount("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0755,size=64m"))
        .map_err(wrong)?;
    // A mount namespace can be pinned only where that cannot spread to other mount namespaces.
    mount_change(path, MountPropagationFlags::PRIVATE).map_err(wrong)
}
