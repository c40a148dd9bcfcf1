//! What this host is and has, read from the kernel's own files (proc(5)).

use std::path::Path;

use godwit_api::link::PROTOCOL;
use godwit_api::types::ErrorBody;
use godwit_criu::Criu;
use godwit_memory::Means;
use godwit_model::host::{HostFacts, ToldBy, WrittenPages};
use godwit_model::{Bytes, MilliCpu};

use crate::config::AgentConfig;

/// Base speed where the kernel does not say one, in MHz.
const UNKNOWN_MHZ: u32 = 2_500;

/// Reads the facts anew. `certificate_sha256`: of what this agent shows to other agents.
pub fn read(config: &AgentConfig, criu: Option<&Criu>, certificate_sha256: String) -> HostFacts {
    tracing::debug!(protocol = PROTOCOL, "reading the host's facts");
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == name))?;
        line.split_once(':').map(|(_, v)| v.trim().to_owned())
    };
    let mut cpu_features: Vec<String> = field("flags")
        .or_else(|| field("Features"))
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    cpu_features.sort_unstable();
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get()) as u32 * 1000;
    HostFacts {
        name: config.name.clone(),
        godwit_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: read_trimmed("/proc/sys/kernel/osrelease"),
        architecture: std::env::consts::ARCH.to_owned(),
        criu: criu.map(|c| c.version.to_string()),
        cpu_features,
        cpu_model: field("model name").unwrap_or_else(|| "unknown".to_owned()),
        cpus: MilliCpu(limits::cpu_millis(&config.cgroup_parent).map_or(cpus, |limit| limit.min(cpus))),
        cpu_mhz: field("cpu MHz").and_then(|v| v.parse::<f64>().ok()).map_or(UNKNOWN_MHZ, |mhz| mhz as u32),
        memory: memory(&meminfo, &config.cgroup_parent),
        disk_free: disk_free(&config.state_dir),
        tunnel_address: config.tunnel_address,
        migration_address: config.migration_address(),
        certificate_sha256,
        written_pages: match godwit_memory::check_tracking() {
            Ok(Means::Protection) => WrittenPages::Tracked { by: ToldBy::Protection },
            Ok(Means::SoftDirty) => WrittenPages::Tracked { by: ToldBy::SoftDirty },
            Err(error) => WrittenPages::Untold { because: ErrorBody::from_chain(&error).one_line() },
        },
        labels: config.labels.clone(),
    }
}

fn read_trimmed(path: &str) -> String {
    std::fs::read_to_string(path).map(|s| s.trim().to_owned()).unwrap_or_default()
}

fn memory(meminfo: &str, cgroup: &str) -> Bytes {
    let kib = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    let total = kib.unwrap_or(0) << 10;
    Bytes(limits::memory_bytes(cgroup).map_or(total, |limit| limit.min(total)))
}

/// Memory that containers below `cgroup` could take right now: what the kernel calls available, within every limit on
/// the way to the root (their caches count as free: the kernel drops them first).
pub fn free_memory(cgroup: &str) -> Bytes {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field =
        |name: &str| meminfo.lines().find_map(|l| l.strip_prefix(name)?.trim().split(' ').next()?.parse::<u64>().ok());
    let available = field("MemAvailable:").unwrap_or(0) << 10;
    Bytes(limits::free_bytes(cgroup).map_or(available, |left| left.min(available)))
}

fn disk_free(dir: &Path) -> Bytes {
    Bytes(rustix::fs::statvfs(dir).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize)))
}

/// A host may itself be limited by a cgroup (a lab host, a container host inside a larger one): the smallest limit on
/// the way from our parent cgroup to the root is what there is.
mod limits {
    use std::path::{Path, PathBuf};

    pub fn memory_bytes(cgroup: &str) -> Option<u64> {
        let v1 = smallest("/sys/fs/cgroup/memory", cgroup, |dir| number(&dir.join("memory.limit_in_bytes")));
        let v2 = smallest("/sys/fs/cgroup", cgroup, |dir| number(&dir.join("memory.max")));
        v1.into_iter().chain(v2).min()
    }

    /// What is left below the tightest limit, file caches counted as free.
    pub fn free_bytes(cgroup: &str) -> Option<u64> {
        let left = |limit: &str, usage: &str, dir: &Path| {
            let limit = number(&dir.join(limit))?;
            let caches = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let caches = ["total_inactive_file ", "total_active_file ", "inactive_file ", "active_file "]
                .iter()
                .filter_map(|name| caches.lines().find_map(|l| l.strip_prefix(name)?.parse::<u64>().ok()));
            // Version 1 has both a cgroup's own and its subtree's; the larger pair is the subtree's.
            let caches: Vec<u64> = caches.collect();
            let caches = caches.chunks(2).map(|pair| pair.iter().sum::<u64>()).max().unwrap_or(0);
            let used = number(&dir.join(usage))?.saturating_sub(caches);
            Some(limit.saturating_sub(used))
        };
        let v1 =
            smallest("/sys/fs/cgroup/memory", cgroup, |d| left("memory.limit_in_bytes", "memory.usage_in_bytes", d));
        let v2 = smallest("/sys/fs/cgroup", cgroup, |d| left("memory.max", "memory.current", d));
        v1.into_iter().chain(v2).min()
    }

    pub fn cpu_millis(cgroup: &str) -> Option<u32> {
        let v1 = smallest("/sys/fs/cgroup/cpu", cgroup, |dir| {
            let quota = number(&dir.join("cpu.cfs_quota_us"))?;
            Some(quota * 1000 / number(&dir.join("cpu.cfs_period_us"))?.max(1))
        });
        let v2 = smallest("/sys/fs/cgroup", cgroup, |dir| {
            let text = std::fs::read_to_string(dir.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            Some(quota.parse::<u64>().ok()? * 1000 / period.parse::<u64>().ok()?.max(1))
        });
        v1.into_iter().chain(v2).min().and_then(|m| u32::try_from(m).ok())
    }

    /// `None` for `max`, `-1` and absent files: no limit.
    fn number(path: &Path) -> Option<u64> {
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    fn smallest(root: &str, cgroup: &str, read: impl Fn(&Path) -> Option<u64>) -> Option<u64> {
        let full: PathBuf = Path::new(root).join(cgroup.trim_start_matches('/'));
        full.ancestors().take_while(|dir| dir.starts_with(root)).filter_map(read).min()
    }
}
