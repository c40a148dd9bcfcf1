//! Version 2: one directory with all controllers (kernel documentation, admin-guide/cgroup-v2).

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    CPU_PERIOD_USEC, Cgroup, CgroupError, CpuQuota, DELETE_TIMEOUT_MS, FREEZE_TIMEOUT_MS, Result, Usage, gone, read,
    read_key, read_number, write,
};
use crate::spec::Resources;

/// Controllers switched on for the cgroups below each ancestor.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "pids", "io"];

fn dir(cgroup: &Cgroup) -> Result<std::path::PathBuf> {
    cgroup.controller("unified")
}

/// Makes the directories from the top down, handing the controllers on at each level.
pub fn make(cgroup: &Cgroup) -> Result<()> {
    let root = cgroup.hierarchies.roots().into_iter().next().ok_or(CgroupError::NotMounted)?;
    let mut here = root.clone();
    for part in cgroup.path.trim_start_matches('/').split('/') {
        enable_controllers(&here)?;
        here.push(part);
        match std::fs::create_dir(&here) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|source| CgroupError::Io { action: "create", path: here.clone(), source })?,
        }
    }
    Ok(())
}

/// Only what is available and not on yet: writing an absent controller fails as a whole.
/// A cgroup below the root hands controllers on only while it has no processes of its own.
fn enable_controllers(dir: &Path) -> Result<()> {
    let available = read(&dir.join("cgroup.controllers"))?;
    let file = dir.join("cgroup.subtree_control");
    let enabled = read(&file)?;
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    for name in CONTROLLERS {
        if has(&available, name) && !has(&enabled, name) {
            match write(&file, &format!("+{name}")) {
                Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
                    return Err(CgroupError::InternalProcesses { path: dir.to_owned() });
                }
                other => other?,
            }
        }
    }
    Ok(())
}

/// A limit whose controller is not there is an error; "no limit" then needs no file.
fn set_limit(cgroup: &Cgroup, controller: &'static str, file: &str, value: Option<String>) -> Result<()> {
    let path = dir(cgroup)?.join(file);
    match (path.exists(), value) {
        (true, value) => write(&path, value.as_deref().unwrap_or("max")),
        (false, None) => Ok(()),
        (false, Some(_)) => Err(CgroupError::NoController { controller }),
    }
}

pub fn set(cgroup: &Cgroup, resources: &Resources) -> Result<()> {
    set_memory(cgroup, resources.memory_bytes)?;
    set_cpu(cgroup, resources.cpu_millis.map(|millis| CpuQuota::of(millis, CPU_PERIOD_USEC)))?;
    set_limit(cgroup, "pids", "pids.max", resources.pids_max.map(|max| max.to_string()))
}

pub fn set_cpu(cgroup: &Cgroup, limit: Option<CpuQuota>) -> Result<()> {
    let quota = limit.map(|l| format!("{} {}", l.quota_usec, l.period_usec));
    set_limit(cgroup, "cpu", "cpu.max", quota)
}

/// A `memory.max` below use makes the kernel kill. `memory.high` makes it reclaim and slows down
/// who takes more meanwhile, so what is in use then either fits or the old limit stays.
fn set_memory(cgroup: &Cgroup, limit_bytes: Option<u64>) -> Result<()> {
    let dir = dir(cgroup)?;
    let (high, swap) = (dir.join("memory.high"), dir.join("memory.swap.max"));
    let used = || read_number(&dir.join("memory.current"));
    let limit = limit_bytes.map(|bytes| bytes.to_string());
    if let Some(limit) = &limit
        && used().is_ok_and(|bytes| Some(bytes) > limit_bytes)
    {
        write(&high, limit)?;
    }
    let set = match (limit_bytes, used()) {
        (Some(limit_bytes), Ok(used_bytes)) if used_bytes > limit_bytes => {
            Err(CgroupError::LimitBelowUse { path: cgroup.path.clone(), limit_bytes, used_bytes })
        }
        // Without the controller nothing is counted.
        _ => set_limit(cgroup, "memory", "memory.max", limit),
    };
    // Also after an earlier caller that was killed in between.
    if high.exists() {
        write(&high, "max")?;
    }
    set?;
    if swap.exists() {
        write(&swap, if limit_bytes.is_some() { "0" } else { "max" })?;
    }
    Ok(())
}

/// A yes/no line of `cgroup.events`.
pub fn event(cgroup: &Cgroup, key: &str) -> Result<bool> {
    Ok(read_key(&dir(cgroup)?.join("cgroup.events"), key)? == 1)
}

pub fn freeze(cgroup: &Cgroup, frozen: bool) -> Result<()> {
    write_freeze(cgroup, frozen)?;
    let wanted = if frozen { "frozen" } else { "thawed" };
    let done = wait_for(cgroup, "frozen", frozen, wanted, FREEZE_TIMEOUT_MS);
    // Or it would stand still later, when nobody expects it.
    if frozen && done.is_err() {
        write_freeze(cgroup, false)?;
    }
    done
}

/// Without waiting for the kernel to have done it.
fn write_freeze(cgroup: &Cgroup, frozen: bool) -> Result<()> {
    write(&dir(cgroup)?.join("cgroup.freeze"), if frozen { "1" } else { "0" })
}

/// Kills everything, new children included, also frozen: version 2 lets frozen processes die.
/// Whoever comes next into the cgroup is not to freeze, hence the second write.
pub fn kill(cgroup: &Cgroup) -> Result<()> {
    write(&dir(cgroup)?.join("cgroup.kill"), "1")?;
    unless_gone(write_freeze(cgroup, false))
}

/// A cgroup that somebody else has deleted by now is as good as empty.
fn unless_gone(result: Result<()>) -> Result<()> {
    match result {
        Err(CgroupError::Io { source, .. }) if gone(&source) => Ok(()),
        other => other,
    }
}

/// Waits until no process is left here and below; then the kernel lets the directories go.
pub fn wait_empty(cgroup: &Cgroup) -> Result<()> {
    unless_gone(wait_for(cgroup, "populated", false, "empty", DELETE_TIMEOUT_MS))
}

/// `cgroup.events` reports each change as an exceptional condition to poll(2).
fn wait_for(cgroup: &Cgroup, key: &str, value: bool, wanted: &'static str, timeout_ms: u64) -> Result<()> {
    let path = dir(cgroup)?.join("cgroup.events");
    let failed = |source| CgroupError::Io { action: "read", path: path.clone(), source };
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    let mut file = File::open(&path).map_err(failed)?;
    let line = format!("{key} {}", u8::from(value));
    loop {
        let mut text = String::new();
        file.rewind().map_err(failed)?;
        file.read_to_string(&mut text).map_err(failed)?;
        if text.lines().any(|found| found == line) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CgroupError::Timeout { path: cgroup.path.clone(), wanted, timeout_ms });
        }
        let mut fds = [PollFd::new(&file, PollFlags::PRI)];
        let timeout = Timespec::try_from(left).ok();
        let _ = rustix::io::retry_on_intr(|| poll(&mut fds, timeout.as_ref()));
    }
}

pub fn usage(cgroup: &Cgroup) -> Result<Usage> {
    let dir = dir(cgroup)?;
    let memory_bytes = read_number(&dir.join("memory.current"))?;
    let idle_file_bytes = read_key(&dir.join("memory.stat"), "inactive_file")?;
    Ok(Usage {
        memory_bytes,
        working_set_bytes: memory_bytes.saturating_sub(idle_file_bytes),
        // Linux 5.19 and later.
        memory_peak_bytes: read_number(&dir.join("memory.peak")).unwrap_or(memory_bytes),
        cpu_usec: read_key(&dir.join("cpu.stat"), "usage_usec")?,
        oom_kills: read_key(&dir.join("memory.events"), "oom_kill")?,
        pids: read_number(&dir.join("pids.current"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{Hierarchies, join};

    /// Plain files stand in for the kernel's, to see which are written with what.
    #[test]
    fn limits_are_written_in_the_kernels_words() {
        let root = std::env::temp_dir().join(format!("godwit-cgroup-{}", std::process::id()));
        std::fs::create_dir_all(root.join("godwit/h1/0123456789ab")).unwrap();
        for level in ["", "godwit", "godwit/h1"] {
            std::fs::write(root.join(level).join("cgroup.controllers"), "cpu memory pids").unwrap();
            std::fs::write(root.join(level).join("cgroup.subtree_control"), "memory cpu").unwrap();
        }
        let cgroup = Cgroup::open_in("/godwit/h1/0123456789ab", Hierarchies::v2_at(&root)).unwrap();
        let own = join(&root, cgroup.path());
        for file in ["memory.max", "cpu.max", "pids.max", "memory.swap.max", "memory.high"] {
            std::fs::write(own.join(file), "").unwrap();
        }
        std::fs::write(own.join("memory.current"), "4096").unwrap();
        make(&cgroup).unwrap();
        assert_eq!(read(&root.join("godwit/cgroup.subtree_control")).unwrap(), "+pids");
        let limits = Resources { memory_bytes: Some(1 << 20), cpu_millis: Some(1500), pids_max: None };
        set(&cgroup, &limits).unwrap();
        assert_eq!(read(&own.join("memory.max")).unwrap(), "1048576");
        assert_eq!(read(&own.join("memory.swap.max")).unwrap(), "0");
        assert_eq!(read(&own.join("cpu.max")).unwrap(), "150000 100000");
        assert_eq!(read(&own.join("pids.max")).unwrap(), "max");
        let small = Resources { memory_bytes: Some(1024), ..limits };
        let refused = set(&cgroup, &small).unwrap_err();
        assert!(matches!(refused, CgroupError::LimitBelowUse { used_bytes: 4096, .. }));
        assert_eq!(read(&own.join("memory.max")).unwrap(), "1048576", "the old limit is kept");
        assert_eq!(read(&own.join("memory.high")).unwrap(), "max", "nobody is slowed down for good");
        std::fs::remove_dir_all(&root).unwrap();
    }
}
