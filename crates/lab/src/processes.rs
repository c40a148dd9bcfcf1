//! The processes of a lab: finding them by cgroup and namespace, ending them, waiting for their end.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};

use crate::cgroups;
use crate::mounts;
use crate::paths::{HOST_STATE, LabPaths};

/// Longest wait for one batch of killed processes to end. Freeing gigabytes of memory takes a while.
const END_TIMEOUT_MS: u64 = 10_000;
/// Rounds of finding and killing. One is enough unless something outside a frozen cgroup forks.
const MAX_ROUNDS: usize = 20;
/// Processes killed and waited for at once, so that their file descriptors stay below the usual limit of 1024.
const BATCH: usize = 256;

/// A process held by a file descriptor, so that a later one with the same pid is never meant.
pub(crate) struct Process {
    pub pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// None if it has ended.
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self { pid, fd })),
            Err(Errno::SRCH | Errno::INVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended. False: it still runs after `timeout`.
    pub fn wait_end(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) if Instant::now() < deadline => {}
                Err(_) => return false,
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), tv_nsec: duration.subsec_nanos().into() }
}

/// Field 22 of `/proc/PID/stat`, in clock ticks since boot. None if there is no such process or it
/// has ended and only waits to be reaped.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    state_and_start(pid).filter(|(state, _)| !matches!(state, 'Z' | 'X')).map(|(_, start)| start)
}

/// Reaps a process that has ended if it is a child of this one. Only for processes that this crate
/// has started: taking away others' children would make their `wait` fail.
pub(crate) fn reap(pid: u32, start: u64) {
    if state_and_start(pid) == Some(('Z', start))
        && let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
    {
        // Someone else's child cannot be reaped here, which is no failure.
        let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
}

fn state_and_start(pid: u32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a program name in parentheses that may hold spaces and parentheses.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.chars().next()?;
    // The state was field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The inode numbers of the namespaces that the lab has pinned.
fn pinned_namespaces(paths: &LabPaths) -> BTreeSet<String> {
    let pins = paths.pins();
    let mut names: BTreeSet<String> = mounts::own()
        .unwrap_or_default()
        .iter()
        .filter(|m| m.filesystem == "nsfs" && m.target.starts_with(&pins))
        .map(|m| m.root.to_string_lossy().into_owned())
        .collect();
    // The machine's own namespaces are never a lab's, whatever a mount table says.
    for machine in ["/proc/self/ns/net", "/proc/self/ns/mnt", "/proc/1/ns/net", "/proc/1/ns/mnt"] {
        if let Ok(name) = fs::read_link(machine) {
            names.remove(name.to_string_lossy().as_ref());
        }
    }
    names
}

/// True if a mount table is that of a host of this lab: only there is a state directory of the
/// lab bound to `/var/lib/godwit`.
fn is_lab_table(paths: &LabPaths, text: &[u8]) -> bool {
    let end = format!("godwit-lab/{}", paths.name());
    mounts::parse(text)
        .iter()
        .any(|m| m.target.as_os_str() == HOST_STATE && m.root.parent().is_some_and(|p| p.ends_with(&end)))
}

/// Every running process of the lab: in its cgroups, in its namespaces, or in a mount namespace
/// made from a lab host's.
pub(crate) fn find(paths: &LabPaths) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = cgroups::processes(paths).into_iter().collect();
    let pinned = pinned_namespaces(paths);
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let namespace =
            |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok().map(|n| n.to_string_lossy().into_owned());
        let inside = ["net", "mnt"].iter().filter_map(|kind| namespace(kind)).any(|name| pinned.contains(&name))
            || fs::read(format!("/proc/{pid}/mountinfo")).is_ok_and(|text| is_lab_table(paths, &text));
        if inside {
            found.insert(pid);
        }
    }
    found.retain(|&pid| pid > 1 && pid != std::process::id() && start_ticks(pid).is_some());
    found
}

/// Kills every process of the lab and waits for their end. Returns what still runs.
pub(crate) fn kill_all(paths: &LabPaths) -> Vec<String> {
    let mut problems = Vec::new();
    for _ in 0..MAX_ROUNDS {
        problems.clear();
        cgroups::freeze(paths);
        let pids: Vec<u32> = find(paths).into_iter().collect();
        let mut killed = Vec::new();
        for &pid in pids.iter().take(BATCH) {
            match Process::open(pid) {
                // Found again after it was opened: the descriptor means the process that was found.
                Ok(Some(process)) if start_ticks(pid).is_some() => match process.kill() {
                    Ok(()) => killed.push(process),
                    Err(error) => problems.push(format!("cannot kill process {pid}: {error}")),
                },
                Ok(_) => {}
                Err(error) => problems.push(format!("cannot open process {pid}: {error}")),
            }
        }
        cgroups::thaw(paths);
        let deadline = Instant::now() + Duration::from_millis(END_TIMEOUT_MS);
        for process in &killed {
            if !process.wait_end(deadline.saturating_duration_since(Instant::now())) {
                problems.push(format!("process {} does not end after SIGKILL", process.pid));
            }
        }
        if pids.is_empty() || (killed.is_empty() && !problems.is_empty()) {
            break;
        }
    }
    problems
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::spec::LabName;

    #[test]
    fn a_process_is_told_from_a_later_one() {
        let own = std::process::id();
        assert_eq!(start_ticks(own), start_ticks(own));
        assert!(start_ticks(own).is_some());
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let process = Process::open(child.id()).unwrap().unwrap();
        assert!(!process.wait_end(Duration::from_millis(1)));
        process.kill().unwrap();
        assert!(process.wait_end(Duration::from_secs(5)));
        assert!(start_ticks(child.id()).is_none());
        let _ = child.wait();
    }

    #[test]
    fn only_a_host_of_this_lab_has_a_lab_table() {
        let paths = LabPaths::new(LabName::new("a").unwrap());
        let table = |line: &str| is_lab_table(&paths, line.as_bytes());
        assert!(table("1 0 8:1 /var/lib/godwit-lab/a/h1 /var/lib/godwit rw - ext4 /dev/x rw"));
        assert!(!table("1 0 8:1 /var/lib/godwit-lab/a-b/h1 /var/lib/godwit rw - ext4 /dev/x rw"));
        // A mount namespace copied from the machine's sees the lab's tmpfs but is not a lab host.
        assert!(!table("1 0 0:9 / /run/godwit-lab/a rw - tmpfs tmpfs rw"));
    }
}
