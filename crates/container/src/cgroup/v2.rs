//! Version 2: one directory with all controllers (kernel documentation, admin-guide/cgroup-v2).

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    Cgroup, CgroupError, FREEZE_TIMEOUT_MS, Result, Usage, read, read_key, read_number, write,
};
use crate::spec::Resources;

const CPU_PERIOD_USEC: u64 = 100_000;
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
            other => other.map_err(|source| CgroupError::Io {
                action: "create",
                path: here.clone(),
                source,
            })?,
        }
    }
    Ok(())
}

/// Only what is available and not on yet: writing an absent controller fails as a whole.
fn enable_controllers(dir: &Path) -> Result<()> {
    let available = read(&dir.join("cgroup.controllers"))?;
    let file = dir.join("cgroup.subtree_control");
    let enabled = read(&file)?;
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    for name in CONTROLLERS {
        if has(&available, name) && !has(&enabled, name) {
            write(&file, &format!("+{name}"))?;
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
    let quota = resources.cpu_millis.map(|millis| {
        // The kernel refuses less than 1 ms.
        format!("{} {CPU_PERIOD_USEC}", (millis * CPU_PERIOD_USEC / 1000).max(1_000))
    });
    set_limit(cgroup, "cpu", "cpu.max", quota)?;
    set_limit(cgroup, "pids", "pids.max", resources.pids_max.map(|max| max.to_string()))
}

/// A `memory.max` below use makes the kernel kill; so reclaim first, and refuse what will not fit.
fn set_memory(cgroup: &Cgroup, limit_bytes: Option<u64>) -> Result<()> {
    let dir = dir(cgroup)?;
    if let Some(limit_bytes) = limit_bytes
        && let Ok(used_bytes) = read_number(&dir.join("memory.current"))
        && used_bytes > limit_bytes
    {
        // Fails with EAGAIN when less could be reclaimed; the second look decides.
        let _ = write(&dir.join("memory.reclaim"), &(used_bytes - limit_bytes).to_string());
        let used_bytes = read_number(&dir.join("memory.current"))?;
        if used_bytes > limit_bytes {
            let path = cgroup.path.clone();
            return Err(CgroupError::LimitBelowUse { path, limit_bytes, used_bytes });
        }
    }
    set_limit(cgroup, "memory", "memory.max", limit_bytes.map(|bytes| bytes.to_string()))?;
    let swap = dir.join("memory.swap.max");
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
    let dir = dir(cgroup)?;
    write(&dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let wanted = if frozen { "frozen" } else { "thawed" };
    wait_for(cgroup, &dir.join("cgroup.events"), "frozen", frozen, wanted)
}

pub fn kill(cgroup: &Cgroup) -> Result<()> {
    write(&dir(cgroup)?.join("cgroup.kill"), "1")
}

/// `cgroup.events` reports each change as an exceptional condition to poll(2).
fn wait_for(cgroup: &Cgroup, path: &Path, key: &str, value: bool, wanted: &'static str) -> Result<()> {
    let failed = |source| CgroupError::Io { action: "read", path: path.to_owned(), source };
    let deadline = Instant::now() + Duration::from_millis(FREEZE_TIMEOUT_MS);
    let mut file = File::open(path).map_err(failed)?;
    loop {
        let mut text = String::new();
        file.rewind().map_err(failed)?;
        file.read_to_string(&mut text).map_err(failed)?;
        let line = format!("{key} {}", u8::from(value));
        if text.lines().any(|found| found == line) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let path = cgroup.path.clone();
            return Err(CgroupError::Timeout { path, wanted, timeout_ms: FREEZE_TIMEOUT_MS });
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
        for file in ["memory.max", "cpu.max", "pids.max", "memory.swap.max", "memory.reclaim"] {
            std::fs::write(own.join(file), "").unwrap();
        }
        std::fs::write(own.join("memory.current"), "4096").unwrap();
        make(&cgroup).unwrap();
        assert_eq!(read(&root.join("godwit/cgroup.subtree_control")).unwrap(), "+pids");
        let limits = Resources {
            memory_bytes: Some(1 << 20),
            cpu_millis: Some(1500),
            pids_max: None,
        };
        set(&cgroup, &limits).unwrap();
        assert_eq!(read(&own.join("memory.max")).unwrap(), "1048576");
        assert_eq!(read(&own.join("memory.swap.max")).unwrap(), "0");
        assert_eq!(read(&own.join("cpu.max")).unwrap(), "150000 100000");
        assert_eq!(read(&own.join("pids.max")).unwrap(), "max");
        let small = Resources { memory_bytes: Some(1024), ..limits };
        let refused = set(&cgroup, &small).unwrap_err();
        assert!(matches!(refused, CgroupError::LimitBelowUse { used_bytes: 4096, .. }));
        assert_eq!(read(&own.join("memory.max")).unwrap(), "1048576", "the old limit is kept");
        std::fs::remove_dir_all(&root).unwrap();
    }
}
