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
    because.extend(by_sessions(exec_sessions));
    Movable { because }
}

/// Commands of others in the container end where it was: a reason as long as there are any.
pub fn by_sessions(exec_sessions: u32) -> Option<String> {
    match exec_sessions {
        0 => None,
        1 => Some("1 exec session is open; end it first".to_owned()),
        many => Some(format!("{many} exec sessions are open; end them first")),
    }
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

/// Kinds of namespaces of which CRIU carries one per container, that of its first process.
const SINGLE_NAMESPACES: [&str; 6] = ["cgroup", "ipc", "pid", "time", "user", "uts"];

/// Reasons that lie in namespaces the container's processes have made for themselves; `init` is its first process.
pub fn by_namespaces(init: u32, pids: &[u32]) -> Movable {
    let of = |pid: u32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    let own = SINGLE_NAMESPACES.map(|kind| of(init, kind));
    let mut because = Vec::new();
    for pid in pids {
        let other = |(kind, own): (&&str, &Option<_>)| {
            let now = of(*pid, kind);
            (own.is_some() && now.is_some() && now != *own).then(|| (*kind).to_owned())
        };
        let kinds: Vec<String> = SINGLE_NAMESPACES.iter().zip(&own).filter_map(other).collect();
        if !kinds.is_empty() {
            because.push(format!(
                "process {} (pid {pid} on the host) has a {} namespace of its own, which CRIU cannot carry",
                command(*pid),
                kinds.join(" and a ")
            ));
        }
    }
    Movable { because }
}

/// Who has a file open with O_DIRECT, or may have one. A device that was given a page to write to before the page was
/// protected can write to it after it was read, which no page table tells.
pub fn direct_io(pids: &[u32]) -> Option<String> {
    let mut looked = 0;
    for pid in pids {
        let list = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(list) => list,
            // It has ended.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Some(format!("what process {} has open cannot be seen: {error}", command(*pid))),
        };
        for item in list.flatten() {
            looked += 1;
            if looked > MAX_FDS {
                return Some(format!("more than {MAX_FDS} files are open, too many to look for O_DIRECT"));
            }
            let Some(file) = std::fs::read_link(item.path()).ok().filter(|target| target.is_absolute()) else {
                continue;
            };
            let info = format!("/proc/{pid}/fdinfo/{}", item.file_name().to_string_lossy());
            if std::fs::read_to_string(info).is_ok_and(|info| is_direct(&info)) {
                let who = command(*pid);
                return Some(format!("process {who} has {} open past the page cache (O_DIRECT)", file.display()));
            }
        }
    }
    None
}

fn is_direct(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| rustix::fs::OFlags::from_bits_retain(flags).contains(rustix::fs::OFlags::DIRECT))
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
    fn a_nested_namespace_is_seen() {
        let own = std::process::id();
        assert!(by_namespaces(own, &[own]).yes());
        let mut child = match std::process::Command::new("unshare").args(["--uts", "sleep", "60"]).spawn() {
            Ok(child) => child,
            // Not a machine with util-linux.
            Err(_) => return,
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let seen = loop {
            let movable = by_namespaces(own, &[own, child.id()]);
            let ended = child.try_wait().unwrap().is_some();
            if !movable.yes() || ended || std::time::Instant::now() > deadline {
                break (movable, ended);
            }
            std::thread::yield_now();
        };
        let _ = child.kill();
        let _ = child.wait();
        // Without the right to make one it has ended at once.
        assert!(seen.1 || seen.0.because[0].contains("uts namespace"), "{seen:?}");
    }

    #[test]
    fn a_file_past_the_page_cache_is_seen() {
        let pid = std::process::id();
        let ordinary = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(direct_io(&[pid]), None);
        // Not every file system takes the flag.
        let direct = rustix::fs::open("/proc/self/exe", rustix::fs::OFlags::DIRECT, rustix::fs::Mode::empty());
        if let Ok(_direct) = direct {
            assert!(direct_io(&[pid]).unwrap().contains("O_DIRECT"));
        }
        drop(ordinary);
    }

    #[test]
    fn our_own_open_files_can_be_carried() {
        assert!(by_open_files(&[std::process::id()]).yes());
        assert!(cannot_carry(Path::new("anon_inode:[io_uring]")).is_some());
        assert!(cannot_carry(Path::new("anon_inode:[eventpoll]")).is_none());
    }
}
