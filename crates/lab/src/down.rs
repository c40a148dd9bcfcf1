//! Unmaking a lab, and proving that nothing is left of it.
//!
//! Everything is found by name. Each step collects its errors and the next one goes on; the order
//! is what each step needs from the one before: processes, mounts, cgroups, files.

use std::collections::BTreeSet;
use std::fs;

use crate::cgroups;
use crate::daemons;
use crate::mounts;
use crate::paths::LabPaths;
use crate::processes;
use crate::remove::remove_tree;
use crate::spec::{MAX_HOSTS, Node};

/// How often processes, mounts and cgroups are gone through before what is left is reported.
const MAX_PASSES: usize = 3;

/// What of a lab could not be unmade.
#[derive(Debug, thiserror::Error)]
#[error("lab {name} is not all gone: {}. Run `godwit lab down` again when the cause is gone", .problems.join("; "))]
pub struct DownError {
    pub name: String,
    pub problems: Vec<String>,
}

/// Unmakes the lab, whatever state it is in; one that does not exist is unmade already.
pub(crate) fn down(paths: &LabPaths) -> Result<(), DownError> {
    let mut problems = Vec::new();
    // Whatever was being started while the first pass went on is in its cgroup by the next.
    for _ in 0..MAX_PASSES {
        problems = processes::kill_all(paths);
        // While the records of the daemons can still be read.
        for node in [Node::Controller].into_iter().chain((1..=MAX_HOSTS).map(Node::Host)) {
            daemons::reap(paths, node);
        }
        problems.extend(mounts::unmount_below(&[paths.run(), paths.state()], &[]));
        problems.extend(cgroups::remove(paths));
        if problems.is_empty() {
            break;
        }
    }
    problems.extend(put_back_grace_periods(paths));
    // Copies of the lab's mounts that other mount namespaces hold go with the files and
    // directories they are mounted on (the kernel detaches them there on unlink and rmdir).
    problems.extend(remove_tree(&paths.run()));
    problems.extend(remove_tree(&paths.state()));
    if problems.is_empty() { Ok(()) } else { Err(DownError { name: paths.name().to_string(), problems }) }
}

/// What an agent that was killed in the middle of a move has set for the whole machine, and noted in its directory: no
/// agent of this lab comes after it to put it back.
fn put_back_grace_periods(paths: &LabPaths) -> Option<String> {
    let marks = (1..=MAX_HOSTS).map(|host| paths.host_state(Node::Host(host)).join("agent/rcu-expedited"));
    let left: Vec<_> = marks.filter(|mark| mark.exists()).collect();
    if left.is_empty() {
        return None;
    }
    fs::write("/sys/kernel/rcu_expedited", "0").err().map(|e| format!("/sys/kernel/rcu_expedited stays at 1: {e}"))
}

/// Everything of the lab that exists: processes, mounts in any mount namespace that a process
/// has, cgroups, links, files. Empty after a complete `down`.
pub(crate) fn leftovers(paths: &LabPaths) -> Vec<String> {
    let mut left = Vec::new();
    for pid in processes::find(paths) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        left.push(format!("process {pid} {}", command.trim()));
    }
    left.extend(mounts_left(paths));
    left.extend(cgroups::directories(paths).iter().map(|(_, d)| format!("cgroup {}", d.display())));
    for directory in [paths.run(), paths.state()] {
        if directory.symlink_metadata().is_ok() {
            left.push(format!("directory {}", directory.display()));
        }
    }
    left
}

/// Mounts of the lab, a pinned namespace being one, per mount namespace.
fn mounts_left(paths: &LabPaths) -> Vec<String> {
    let (run, state) = (paths.run(), paths.state());
    let own = fs::read_link("/proc/self/ns/mnt").unwrap_or_default();
    let mut seen = BTreeSet::new();
    let mut left = Vec::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()) {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if !seen.insert(namespace.clone()) {
            continue;
        }
        let place = if namespace == own { String::new() } else { format!(" in the mount namespace of process {pid}") };
        for mount in mounts::parse(&fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default()) {
            let ours =
                mount.target.starts_with(&run) || mount.target.starts_with(&state) || mount.root.starts_with(&state);
            if ours {
                left.push(format!("mount {} ({}){place}", mount.target.display(), mount.root.display()));
            }
        }
    }
    left
}
