//! A lab of a test: made with the binary, used through the binary, unmade and checked.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use godwit_lab::{Lab, LabName, Node};
use serde_json::Value;

pub const GODWIT: &str = env!("CARGO_BIN_EXE_godwit");
/// Longest wait for a state that follows from what was asked for, in seconds.
const STATE_TIMEOUT_S: u64 = 60;
/// Time between two looks where the API has no stream for it, in milliseconds.
const LOOK_EVERY_MS: u64 = 50;

pub struct World {
    pub lab: Lab,
    pub name: LabName,
    directory: tempfile::TempDir,
    checked: bool,
}

impl World {
    /// A lab with this many hosts; `None` (and a line that says so) where this process is not root.
    pub fn up(tag: &str, hosts: u32, options: &[&str]) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let name = LabName::new(format!("t-{tag}-{}", std::process::id())).unwrap();
        let hosts = hosts.to_string();
        let mut args = vec!["lab", "up", "--name", name.as_str(), "--hosts", &hosts];
        args.extend(options);
        let output = godwit(&args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let lab = Lab::open(&name).unwrap();
        Some(Self { lab, name, directory: tempfile::tempdir().unwrap(), checked: false })
    }

    pub fn godwit(&self, args: &[&str]) -> Command {
        let mut command = Command::new(GODWIT);
        command.args(["--lab", self.name.as_str()]).args(args).stdin(Stdio::null());
        command
    }

    /// Standard output of a run that has to succeed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.godwit(args).output().unwrap();
        if !output.status.success() {
            panic!("{args:?}: {}\n{}", text(&output), self.logs());
        }
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let args = [&["--output", "json"], args].concat();
        let out = self.ok(&args);
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out}"))
    }

    /// Standard error of a run that has to fail with this exit code.
    #[track_caller]
    pub fn refused(&self, code: i32, args: &[&str]) -> String {
        let output = self.godwit(args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Writes a manifest, with `IMAGES` and `WORKLOAD` filled in, and applies it.
    #[track_caller]
    pub fn apply(&self, manifest: &str) {
        let path = self.manifest(manifest);
        self.ok(&["env", "apply", "-f", path.to_str().unwrap()]);
    }

    pub fn manifest(&self, manifest: &str) -> PathBuf {
        let text = manifest.replace("${IMAGES}", images().to_str().unwrap());
        let text = if text.contains("${WORKLOAD}") {
            text.replace("${WORKLOAD}", self.workload().to_str().unwrap())
        } else {
            text
        };
        let path = self.directory.path().join("compose.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// An image of the workload that checks itself, made once for this world.
    fn workload(&self) -> PathBuf {
        let path = self.directory.path().join("workload");
        if !path.exists() {
            let output = godwit(&["workload", "image", "--out", path.to_str().unwrap()]).output().unwrap();
            assert!(output.status.success(), "{}", text(&output));
        }
        path
    }

    /// What `ps` says of one container.
    pub fn container(&self, name: &str) -> Option<Value> {
        let all = self.json(&["ps"]);
        all.as_array().unwrap().iter().find(|c| c["name"] == name).cloned()
    }

    pub fn host_of(&self, name: &str) -> String {
        self.container(name).unwrap()["host"].as_str().unwrap().to_owned()
    }

    /// Waits until a container's view is as wished.
    #[track_caller]
    pub fn wait(&self, name: &str, what: &str, wished: impl Fn(&Value) -> bool) -> Value {
        self.wait_within(name, what, Duration::from_secs(STATE_TIMEOUT_S), wished)
    }

    #[track_caller]
    pub fn wait_within(&self, name: &str, what: &str, limit: Duration, wished: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        self.until(limit, || {
            last = self.container(name).unwrap_or(Value::Null);
            wished(&last).then(|| last.clone())
        })
        .unwrap_or_else(|| panic!("{name} is not {what} within {limit:?}: {last:#}\n{}", self.logs()))
    }

    #[track_caller]
    pub fn wait_running(&self, name: &str) -> Value {
        self.wait(name, "running", |c| c["state"] == "running")
    }

    #[track_caller]
    pub fn wait_healthy(&self, name: &str) -> Value {
        self.wait(name, "healthy", |c| c["state"] == "running" && c["health"] == "healthy")
    }

    /// Looks until there is something, or the time is over.
    pub fn until<T>(&self, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(LOOK_EVERY_MS));
        }
    }

    /// A client on the lab's client node, running once it says `connected`.
    #[track_caller]
    pub fn client(&self, args: &[&str]) -> Client {
        let argv: Vec<&str> = [GODWIT, "workload"].iter().chain(args).copied().collect();
        let mut command = self.lab.exec(Node::Client, &argv).unwrap();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut first = String::new();
        errors.read_line(&mut first).unwrap();
        assert_eq!(first.trim(), "connected", "{}", self.logs());
        let rest = std::thread::spawn(move || {
            let mut rest = String::new();
            let _ = errors.read_to_string(&mut rest);
            rest
        });
        Client { child, stdin, rest: Some(rest) }
    }

    /// Runs a program on the lab's client node to its end.
    #[track_caller]
    pub fn on_client(&self, argv: &[&str]) -> Output {
        self.lab.exec(Node::Client, argv).unwrap().stdin(Stdio::null()).output().unwrap()
    }

    /// Address of a host, on which published ports answer.
    pub fn host_address(&self, number: u32) -> std::net::Ipv4Addr {
        Node::Host(number).address()
    }

    /// Moves and returns the move's JSON.
    #[track_caller]
    pub fn migrate(&self, name: &str, to: &str) -> Value {
        self.json(&["migrate", name, "--to", to])
    }

    /// The ends of all daemons' logs.
    pub fn logs(&self) -> String {
        let nodes = std::iter::once(Node::Controller).chain(self.lab.spec().host_nodes());
        nodes.map(|node| format!("--- {node}: {}\n", self.lab.log_tail(node).replace(" | ", "\n"))).collect()
    }

    /// Whoever comes to this point on this node stands still.
    pub fn hold(&self, node: Node, point: &str) {
        let holds = self.lab.paths().holds(node);
        let _ = std::fs::remove_file(godwit_hold::reached_file(&holds, point));
        std::fs::write(holds.join(point), "").unwrap();
    }

    pub fn is_held(&self, node: Node, point: &str) -> bool {
        godwit_hold::reached_file(&self.lab.paths().holds(node), point).exists()
    }

    /// Ends a hold; one that has ended already is fine.
    pub fn let_go(&self, node: Node, point: &str) {
        let _ = std::fs::remove_file(self.lab.paths().holds(node).join(point));
    }

    /// Keeps the daemons' logs where the build's output is.
    pub fn keep_logs(&self) {
        keep_logs(&self.name, self.lab.paths().state().join("log").as_path());
    }

    /// Takes the lab down; nothing may be left of it.
    #[track_caller]
    pub fn down(mut self) {
        self.checked = true;
        Lab::down_by_name(&self.name).unwrap();
        assert_eq!(Lab::leftovers(&self.name), Vec::<String>::new());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.checked {
            return;
        }
        if std::thread::panicking() {
            self.keep_logs();
        }
        if let Err(error) = Lab::down_by_name(&self.name) {
            eprintln!("{error}");
        }
    }
}

/// Logs of a failed test, kept where the build's output is.
fn keep_logs(name: &LabName, logs: &Path) {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab-logs").join(name.as_str());
    let _ = std::fs::create_dir_all(&kept);
    for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
        let _ = std::fs::copy(entry.path(), kept.join(entry.file_name()));
    }
    eprintln!("logs of the lab's daemons are in {}", kept.display());
}

/// A running client; dropped, it is killed.
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    rest: Option<JoinHandle<String>>,
}

impl Client {
    /// Ends it, whatever became of its connections.
    pub fn end(mut self) {
        drop(self.stdin.take());
        self.child.wait().unwrap();
    }

    /// Ends it and returns its report; it has to have found everything right.
    #[track_caller]
    pub fn finish(mut self) -> Value {
        drop(self.stdin.take());
        let mut report = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        let status = self.child.wait().unwrap();
        let said = self.rest.take().unwrap().join().unwrap();
        let report: Value = serde_json::from_str(&report).unwrap_or_else(|e| panic!("{e}: {report} {said}"));
        assert!(status.success(), "{report:#}\n{said}");
        assert_eq!((report["errors"].as_u64(), report["reconnects"].as_u64()), (Some(0), Some(0)), "{report:#}");
        report
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn godwit(args: &[&str]) -> Command {
    let mut command = Command::new(GODWIT);
    command.args(args).stdin(Stdio::null());
    command
}

/// Where `./dev images` puts images of real programs.
pub fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.images").canonicalize().expect("./dev images has been run")
}

pub fn text(output: &Output) -> String {
    format!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
