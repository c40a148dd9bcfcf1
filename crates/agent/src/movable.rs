//! Can this container be moved, and if not, why not: sentences for a person.
//!
//! What CRIU cannot carry is either kept out by the container's contract (seccomp, sysctls: programs fall back) or found
//! here. The specification alone decides most; what processes hold is looked up in their `/proc/PID/fd`.

use std::collections::BTreeSet;
use std::path::Path;

use godwit_model::container::{ContainerSpec, Movable};

/// Open files looked at in one container, at the most; beyond it the answer is from what was seen.
const MAX_FDS: usize = 200_000;

/// Reasons that lie in the specification and in this host.
pub fn by_specification(spec: &ContainerSpec, criu: bool, exec_sessions: u32) -> Movable {
    let mut because = Vec::new();
    for path in &spec.host_paths {
        because.push(format!(
            "{} is a path of this host ({}), which stays here; use a named volume instead",
            path.target, path.source
        ));
    }
    if !criu {
        because.push("this host has no usable CRIU; run `godwit doctor` on it".to_owned());
    }
    if exec_sessions > 0 {
        let s = if exec_sessions == 1 { "session is" } else { "sessions are" };
        because.push(format!("{exec_sessions} exec {s} open; end it first"));
    }
    Movable { because }
}

/// Reasons that lie in what the processes hold right now.
pub fn by_open_files(pids: &[u32]) -> Movable {
    let mut because = BTreeSet::new();
    let mut looked = 0;
    for pid in pids {
        let Ok(list) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for item in list.flatten() {
            looked += 1;
            if looked > MAX_FDS {
                break;
            }
            if let Ok(target) = std::fs::read_link(item.path())
                && let Some(what) = cannot_carry(&target)
            {
                because.insert(format!("process {} (pid {pid} on the host) holds {what}", command(*pid)));
            }
        }
    }
    Movable { because: because.into_iter().collect() }
}

fn cannot_carry(target: &Path) -> Option<&'static str> {
    let text = target.to_str()?;
    const KINDS: [(&str, &str); 6] = [
        ("anon_inode:[io_uring]", "an io_uring, which CRIU cannot carry"),
        ("anon_inode:[userfaultfd]", "a userfaultfd, which CRIU cannot carry"),
        ("anon_inode:[perf_event]", "a perf event, which CRIU cannot carry"),
        ("anon_inode:bpf-prog", "a BPF program, which CRIU cannot carry"),
        ("anon_inode:[fanotify]", "an fanotify group, which CRIU cannot carry here"),
        ("/dev/fuse", "a FUSE device, which CRIU cannot carry"),
    ];
    KINDS.iter().find(|(prefix, _)| text.starts_with(prefix)).map(|(_, what)| *what)
}

fn command(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".to_owned(), |s| s.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_open_files_can_be_carried() {
        assert!(by_open_files(&[std::process::id()]).yes());
        assert!(cannot_carry(Path::new("anon_inode:[io_uring]")).is_some());
        assert!(cannot_carry(Path::new("anon_inode:[eventpoll]")).is_none());
    }
}
