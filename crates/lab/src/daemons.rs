//! What runs on lab hosts: the command lines of controller and agents, in one place, and how a
//! command gets onto a host.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cgroups::{self, CgroupError};
use crate::paths::LabPaths;
use crate::processes;
use crate::record::{self, DaemonRecord, RecordError};
use crate::spec::{LabSpec, Node};

/// Where the controller listens for agents.
pub(crate) const CONTROLLER_PORT: u16 = 7717;
/// How much of a daemon's log goes into an error message, from its end.
const LOG_TAIL_BYTES: usize = 2_000;
/// Longest wait for a new process to join its cgroups. It goes on without if the machine is that slow.
const JOIN_TIMEOUT_S: i64 = 10;

/// A daemon that could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("cannot start the daemon of {node}")]
    Start { node: String, source: io::Error },
    #[error("the daemon of {node} ended; its log {} says: {tail}", .log.display())]
    Ended { node: String, log: PathBuf, tail: String },
    #[error("{} did not appear within {timeout_ms} ms; the log {} says: {tail}", .awaited.display(), .log.display())]
    NotReady { awaited: PathBuf, timeout_ms: u64, log: PathBuf, tail: String },
    #[error("{node} has no daemon: it was killed or never started")]
    None { node: String },
    #[error("{node} has a daemon already, process {pid}")]
    Running { node: String, pid: u32 },
    #[error("the daemon of {node}, process {pid}, cannot be killed")]
    Kill { node: String, pid: u32, source: io::Error },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// The arguments of `godwit` on a node, without the program's name. None for the client.
pub(crate) fn arguments(paths: &LabPaths, spec: &LabSpec, node: Node) -> Option<Vec<String>> {
    let controller = format!("{}:{CONTROLLER_PORT}", Node::Controller.address());
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let (fixed, added): (Vec<(&str, String)>, &[String]) = match node {
        Node::Client => return None,
        Node::Controller => (
            vec![
                ("--state-dir", "/var/lib/godwit/controller".to_owned()),
                ("--api-socket", text(paths.api_socket())),
                ("--listen", controller),
            ],
            &spec.controller_args,
        ),
        Node::Host(number) => {
            let mut fixed = vec![
                ("--controller", controller),
                ("--name", node.to_string()),
                ("--tunnel-address", node.address().to_string()),
                ("--state-dir", "/var/lib/godwit/agent".to_owned()),
                ("--cgroup-parent", paths.containers_cgroup(node)),
                ("--join-token-file", text(paths.join_token())),
            ];
            fixed.extend(spec.zone(number).map(|zone| ("--label", format!("zone={zone}"))));
            (fixed, &spec.agent_args)
        }
    };
    let verb = if node == Node::Controller { "controller" } else { "agent" };
    let mut all = vec![verb.to_owned()];
    all.extend(fixed.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    all.extend_from_slice(added);
    Some(all)
}

/// A command that runs `argv` on a host: in its cgroup, network and mount namespace.
///
/// The shell joins the cgroups before anything else runs, nsenter(1) then changes the namespaces;
/// both end in `exec`, so the process started is the program itself. A daemon gets a session of its
/// own and loses its standard input once it is in the cgroups.
pub(crate) fn command_on(
    paths: &LabPaths,
    node: Node,
    cgroup: &str,
    daemon: bool,
    argv: &[String],
) -> Result<Command, CgroupError> {
    const JOIN: &str = r#"while [ "$1" != -- ]; do echo 0 >"$1" || exit 125; shift; done; shift; "#;
    let script = format!("{JOIN}{}", if daemon { r#"exec setsid "$@" </dev/null"# } else { r#"exec "$@""# });
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script, "join"]).args(cgroups::join_files(cgroup)?).arg("--");
    command
        .arg("nsenter")
        .arg(format!("--net={}", paths.net_namespace(node).display()))
        .arg(format!("--mount={}", paths.mount_namespace(node).display()))
        .arg("--")
        .args(argv);
    Ok(command)
}

/// Starts the daemon of a node, detached: it survives whoever started it.
pub(crate) fn start(paths: &LabPaths, spec: &LabSpec, node: Node) -> Result<u32, DaemonError> {
    let none = || DaemonError::None { node: node.to_string() };
    let wrong = |source| DaemonError::Start { node: node.to_string(), source };
    if let Some(pid) = running(paths, node) {
        return Err(DaemonError::Running { node: node.to_string(), pid });
    }
    reap(paths, node);
    let mut argv = vec![spec.binary.to_string_lossy().into_owned()];
    argv.extend(arguments(paths, spec, node).ok_or_else(none)?);
    let log = fs::File::options().create(true).append(true).open(paths.log(node)).map_err(wrong)?;
    let mut command = command_on(paths, node, &paths.daemon_cgroup(node), true, &argv)?;
    if spec.hold_points {
        let holds = paths.holds(node);
        fs::create_dir_all(&holds).map_err(wrong)?;
        command.env(godwit_hold::VARIABLE, holds);
    }
    // The other end of this pipe closes when the daemon is where `down` finds it, or has ended.
    let (joined, joining) = io::pipe().map_err(wrong)?;
    // In a group of its own setsid(1) would have to fork, and the pid would be another.
    let child = command
        .current_dir("/")
        .stdin(joining)
        .stdout(log.try_clone().map_err(wrong)?)
        .stderr(log)
        .spawn()
        .map_err(wrong)?;
    drop(command);
    let pid = child.id();
    let timeout = Timespec { tv_sec: JOIN_TIMEOUT_S, tv_nsec: 0 };
    poll(&mut [PollFd::new(&joined, PollFlags::IN)], Some(&timeout)).map_err(|e| wrong(e.into()))?;
    let start_ticks = processes::start_ticks(pid).ok_or_else(|| ended(paths, node))?;
    record::write(&paths.daemon(node), &DaemonRecord { pid, start_ticks })?;
    Ok(pid)
}

/// Starts `command` so that this process is replaced by it. Returns only on failure.
pub(crate) fn replace_with(mut command: Command) -> io::Error {
    command.exec()
}

/// The pid of a node's daemon if it runs.
pub(crate) fn running(paths: &LabPaths, node: Node) -> Option<u32> {
    let record: DaemonRecord = record::read(&paths.daemon(node)).ok()?;
    (processes::start_ticks(record.pid) == Some(record.start_ticks)).then_some(record.pid)
}

/// Reaps a node's daemon that has ended, if this process had started it.
pub(crate) fn reap(paths: &LabPaths, node: Node) {
    if let Ok(record) = record::read::<DaemonRecord>(&paths.daemon(node)) {
        processes::reap(record.pid, record.start_ticks);
    }
}

/// The error for a daemon that has ended by itself.
pub(crate) fn ended(paths: &LabPaths, node: Node) -> DaemonError {
    DaemonError::Ended { node: node.to_string(), log: paths.log(node), tail: log_tail(paths, node) }
}

/// The end of a daemon's log, on one line.
pub(crate) fn log_tail(paths: &LabPaths, node: Node) -> String {
    let text = fs::read(paths.log(node)).unwrap_or_default();
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL_BYTES)..]).trim().replace('\n', " | ");
    if tail.is_empty() { "(nothing)".to_owned() } else { tail }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::spec::LabName;

    #[test]
    fn command_lines() {
        let name = LabName::new("demo").unwrap();
        let paths = LabPaths::new(name.clone());
        let mut spec = LabSpec::new(name, 2, "/usr/bin/godwit");
        spec.agent_args = vec!["--criu".into(), "/opt/criu".into()];
        assert_eq!(arguments(&paths, &spec, Node::Client), None);
        assert_eq!(
            arguments(&paths, &spec, Node::Controller).unwrap().join(" "),
            "controller --state-dir /var/lib/godwit/controller --api-socket /run/godwit-lab/demo/api.sock --listen 192.168.77.2:7717"
        );
        assert_eq!(
            arguments(&paths, &spec, Node::Host(2)).unwrap().join(" "),
            "agent --controller 192.168.77.2:7717 --name h2 --tunnel-address 192.168.77.12 --state-dir /var/lib/godwit/agent \
             --cgroup-parent /godwit-lab-demo/h2/containers \
             --join-token-file /var/lib/godwit-lab/demo/ctl/controller/join-token --criu /opt/criu"
        );
        (spec.hosts, spec.zones) = (3, Some(2));
        let labels = [1, 2, 3].map(|n| {
            let argv = arguments(&paths, &spec, Node::Host(n)).unwrap();
            argv[argv.iter().position(|a| a == "--label").unwrap() + 1].clone()
        });
        assert_eq!(labels, ["zone=z1", "zone=z2", "zone=z1"]);
    }
}
