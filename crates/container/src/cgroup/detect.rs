//! Which cgroup hierarchies this host has, read from the list of mounts (proc(5), mountinfo).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::CgroupError;

/// Version 1 controllers a container is put under, where present.
const V1_USED: [&str; 6] = ["freezer", "memory", "cpu", "cpuacct", "pids", "devices"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// The mounted hierarchies in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchies {
    /// Mount point by controller name.
    V1(BTreeMap<String, PathBuf>),
    /// Mount point of the one hierarchy.
    V2(PathBuf),
}

impl Hierarchies {
    /// Looks at this process' mounts.
    pub fn detect() -> Result<Hierarchies, CgroupError> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(|source| CgroupError::Mounts { source })?;
        Hierarchies::parse(&text).ok_or(CgroupError::NotMounted)
    }

    /// Takes the text of `/proc/PID/mountinfo`. Version 1 when its memory or freezer controller
    /// is mounted, else version 2.
    pub fn parse(mountinfo: &str) -> Option<Hierarchies> {
        let mut v1 = BTreeMap::new();
        let mut v2 = None;
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let Some(mount_point) = before.split(' ').nth(4) else { continue };
            let mut fields = after.split(' ');
            let (kind, options) = (fields.next(), fields.nth(1).unwrap_or(""));
            match kind {
                Some("cgroup") => {
                    for name in options.split(',').filter(|name| V1_USED.contains(name)) {
                        // The first mount wins: later ones are bind mounts of it.
                        v1.entry(name.to_owned()).or_insert_with(|| PathBuf::from(mount_point));
                    }
                }
                Some("cgroup2") if v2.is_none() => v2 = Some(PathBuf::from(mount_point)),
                _ => {}
            }
        }
        if v1.contains_key("memory") || v1.contains_key("freezer") {
            return Some(Hierarchies::V1(v1));
        }
        v2.map(Hierarchies::V2)
    }

    pub fn version(&self) -> Version {
        match self {
            Hierarchies::V1(_) => Version::V1,
            Hierarchies::V2(_) => Version::V2,
        }
    }

    /// Mount points, each once.
    pub fn roots(&self) -> Vec<PathBuf> {
        match self {
            Hierarchies::V1(controllers) => {
                let mut roots: Vec<PathBuf> = controllers.values().cloned().collect();
                roots.sort();
                roots.dedup();
                roots
            }
            Hierarchies::V2(root) => vec![root.clone()],
        }
    }

    /// Mount point that has the controller.
    pub fn controller(&self, name: &str) -> Option<PathBuf> {
        match self {
            Hierarchies::V1(controllers) => controllers.get(name).cloned(),
            Hierarchies::V2(root) => Some(root.clone()),
        }
    }

    /// A version 2 hierarchy rooted somewhere else.
    pub fn v2_at(root: &Path) -> Hierarchies {
        Hierarchies::V2(root.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_is_version_1_and_unified_is_version_2() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
             35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = Hierarchies::parse(hybrid).unwrap();
        assert_eq!(found.version(), Version::V1);
        assert_eq!(found.controller("cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(found.roots().len(), 2);

        let unified = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = Hierarchies::parse(unified).unwrap();
        assert_eq!(found, Hierarchies::V2("/sys/fs/cgroup".into()));
        assert_eq!(Hierarchies::parse("22 27 0:21 / /proc rw - proc proc rw\n"), None);
    }
}
