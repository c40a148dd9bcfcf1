//! Version 1: one directory per controller.

use std::time::{Duration, Instant};

use super::{
    CPU_PERIOD_USEC, Cgroup, CgroupError, CpuQuota, FREEZE_TIMEOUT_MS, Result, Usage, pause, read, read_key,
    read_number, write,
};
use crate::spec::Resources;

/// "No limit" of the memory and cpu controllers.
const UNLIMITED: &str = "-1";
/// Polls after which a freeze that hangs is thawed and tried again: a process that was being
/// moved in or was forking can keep a version 1 cgroup at FREEZING for good.
const POLLS_PER_ATTEMPT: u32 = 50;
const POLL_INTERVAL_USEC: u64 = 200;

/// Device rules: everything closed, then what every program expects. The directory of devices
/// holds no others; this is the second lock.
const DEVICES: [&str; 8] = [
    "c 1:3 rwm",   // null
    "c 1:5 rwm",   // zero
    "c 1:7 rwm",   // full
    "c 1:8 rwm",   // random
    "c 1:9 rwm",   // urandom
    "c 5:0 rwm",   // tty
    "c 5:2 rwm",   // ptmx
    "c 136:* rwm", // pts/*
];

pub fn make(cgroup: &Cgroup) -> Result<()> {
    for path in cgroup.directories() {
        std::fs::create_dir_all(&path).map_err(|source| CgroupError::Io { action: "create", path, source })?;
    }
    Ok(())
}

pub fn allow_standard_devices(cgroup: &Cgroup) -> Result<()> {
    let dir = cgroup.controller("devices")?;
    write(&dir.join("devices.deny"), "a")?;
    for device in DEVICES {
        write(&dir.join("devices.allow"), device)?;
    }
    Ok(())
}

pub fn set(cgroup: &Cgroup, resources: &Resources) -> Result<()> {
    set_memory(cgroup, resources.memory_bytes)?;
    set_cpu(cgroup, resources.cpu_millis.map(|millis| CpuQuota::of(millis, CPU_PERIOD_USEC)))?;
    let pids = resources.pids_max.map_or("max".to_owned(), |max| max.to_string());
    write(&cgroup.controller("pids")?.join("pids.max"), &pids)
}

pub fn set_cpu(cgroup: &Cgroup, limit: Option<CpuQuota>) -> Result<()> {
    let cpu = cgroup.controller("cpu")?;
    let quota = cpu.join("cpu.cfs_quota_us");
    let period = limit.map_or(CPU_PERIOD_USEC, |l| l.period_usec);
    // Between the two writes the quota must not look like more of the period than the parent has.
    write(&quota, UNLIMITED)?;
    write(&cpu.join("cpu.cfs_period_us"), &period.to_string())?;
    match limit {
        Some(limit) => write(&quota, &limit.quota_usec.to_string()),
        None => Ok(()),
    }
}

fn set_memory(cgroup: &Cgroup, limit_bytes: Option<u64>) -> Result<()> {
    let dir = cgroup.controller("memory")?;
    let limit = limit_bytes.map_or(UNLIMITED.to_owned(), |bytes| bytes.to_string());
    let with_swap = dir.join("memory.memsw.limit_in_bytes");
    // Memory plus swap may never be less than memory: it goes up first and comes down last.
    let swap_counted = with_swap.exists();
    if swap_counted {
        let _ = write(&with_swap, &limit);
    }
    match write(&dir.join("memory.limit_in_bytes"), &limit) {
        Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
            return Err(CgroupError::LimitBelowUse {
                path: cgroup.path.clone(),
                limit_bytes: limit_bytes.unwrap_or(u64::MAX),
                used_bytes: read_number(&dir.join("memory.usage_in_bytes"))?,
            });
        }
        other => other?,
    }
    if swap_counted { write(&with_swap, &limit) } else { Ok(()) }
}

pub fn is_frozen(cgroup: &Cgroup) -> Result<bool> {
    Ok(read(&cgroup.controller("freezer")?.join("freezer.state"))? == "FROZEN")
}

/// Reading the state makes the kernel look again, so it is polled.
pub fn freeze(cgroup: &Cgroup, timeout: Duration) -> Result<()> {
    let state = cgroup.controller("freezer")?.join("freezer.state");
    let deadline = Instant::now() + timeout;
    let mut polls = 0;
    write(&state, "FROZEN")?;
    while read(&state)? != "FROZEN" {
        if Instant::now() >= deadline {
            write(&state, "THAWED")?;
            return Err(CgroupError::Timeout {
                path: cgroup.path.clone(),
                wanted: "frozen",
                timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            });
        }
        polls += 1;
        if polls % POLLS_PER_ATTEMPT == 0 {
            write(&state, "THAWED")?;
        }
        write(&state, "FROZEN")?;
        pause(Duration::from_micros(POLL_INTERVAL_USEC));
    }
    Ok(())
}

pub fn thaw(cgroup: &Cgroup) -> Result<()> {
    let state = cgroup.controller("freezer")?.join("freezer.state");
    let deadline = Instant::now() + Duration::from_millis(FREEZE_TIMEOUT_MS);
    write(&state, "THAWED")?;
    while read(&state)? != "THAWED" {
        if Instant::now() >= deadline {
            return Err(CgroupError::Timeout {
                path: cgroup.path.clone(),
                wanted: "thawed",
                timeout_ms: FREEZE_TIMEOUT_MS,
            });
        }
        pause(Duration::from_micros(POLL_INTERVAL_USEC));
    }
    Ok(())
}

pub fn usage(cgroup: &Cgroup) -> Result<Usage> {
    let memory = cgroup.controller("memory")?;
    let memory_bytes = read_number(&memory.join("memory.usage_in_bytes"))?;
    let idle_file_bytes = read_key(&memory.join("memory.stat"), "total_inactive_file")?;
    Ok(Usage {
        memory_bytes,
        working_set_bytes: memory_bytes.saturating_sub(idle_file_bytes),
        memory_peak_bytes: read_number(&memory.join("memory.max_usage_in_bytes"))?,
        cpu_usec: read_number(&cgroup.controller("cpuacct")?.join("cpuacct.usage"))? / 1000,
        oom_kills: read_key(&memory.join("memory.oom_control"), "oom_kill")?,
        pids: read_number(&cgroup.controller("pids")?.join("pids.current"))?,
    })
}
