//! What processes are: their namespaces, and whether something holds them that CRIU cannot work with.

use super::{Reasons, command};

/// Kinds of namespaces of which one per container is carried, that of its first process.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Adds what the processes are that CRIU cannot carry; `init` is the container's first one.
pub fn look(init: u32, pids: &[u32], reasons: &mut Reasons) {
    let own = NAMESPACES.map(|kind| namespace(init, kind));
    for pid in pids {
        let other = |(kind, own): (&&str, &Option<_>)| {
            // Asked only of what is there: a process that has ended has none.
            let now = namespace(*pid, kind);
            (own.is_some() && now.is_some() && now != *own).then(|| (*kind).to_owned())
        };
        let kinds: Vec<String> = NAMESPACES.iter().zip(&own).filter_map(other).collect();
        if !kinds.is_empty() {
            let kinds = kinds.join(" and a ");
            reasons.process(*pid, &format!("has a {kinds} namespace of its own, which CRIU cannot carry"));
        }
        if let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status"))
            && let Some(what) = by_status(&status)
        {
            reasons.process(*pid, &what);
        }
    }
}

fn namespace(pid: u32, kind: &str) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// By what the kernel says in `/proc/PID/status`.
fn by_status(status: &str) -> Option<String> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()
    };
    let number = |name: &str| field(name).and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    let tracer = number("TracerPid");
    if tracer != 0 {
        let who = command(tracer);
        return Some(format!("is traced by {who} (pid {tracer} on the host), so that CRIU cannot look into it"));
    }
    let dead = field("State").is_some_and(|state| state == "Z" || state == "X");
    (dead && number("Threads") > 1)
        .then(|| "goes on in threads whose first one has ended, which CRIU cannot carry".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(init: u32, pids: &[u32]) -> Vec<String> {
        let mut reasons = Reasons::default();
        look(init, pids, &mut reasons);
        reasons.sentences()
    }

    #[test]
    fn a_nested_namespace_is_seen() {
        let own = std::process::id();
        assert_eq!(found(own, &[own]), Vec::<String>::new());
        let mut child = match std::process::Command::new("unshare").args(["--uts", "sleep", "60"]).spawn() {
            Ok(child) => child,
            // Not a machine with util-linux.
            Err(_) => return,
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let seen = loop {
            let found = found(own, &[own, child.id()]);
            let ended = child.try_wait().unwrap().is_some();
            if !found.is_empty() || ended || std::time::Instant::now() > deadline {
                break (found, ended);
            }
            std::thread::yield_now();
        };
        let _ = child.kill();
        let _ = child.wait();
        // Without the right to make one it has ended at once.
        assert!(seen.1 || seen.0[0].contains("uts namespace"), "{seen:?}");
    }

    /// What the kernel wrote of real processes (6.18), cut.
    #[test]
    fn a_process_that_is_traced_or_has_lost_its_first_thread_is_seen() {
        let running = "Name:\tx\nState:\tS (sleeping)\nTracerPid:\t0\nThreads:\t3\n";
        assert_eq!(by_status(running), None);
        let zombie = "Name:\tx\nState:\tZ (zombie)\nTracerPid:\t0\nThreads:\t1\n";
        assert_eq!(by_status(zombie), None, "one that waits for its parent is carried");
        let headless = "Name:\tx\nState:\tZ (zombie)\nTracerPid:\t0\nThreads:\t2\n";
        assert!(by_status(headless).unwrap().contains("first one has ended"));
        let traced = "Name:\tx\nState:\tt (tracing stop)\nTracerPid:\t1\nThreads:\t1\n";
        assert!(by_status(traced).unwrap().contains("is traced by"));
    }
}
