//! A lab's cgroup subtree: in each version 1 hierarchy, or once under the version 2 root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::mounts::{self, Mount};
use crate::paths::{CGROUP_PREFIX, LabPaths};
use crate::spec::{LabSpec, Node};

/// The version 1 controllers in whose hierarchies a lab has a subtree.
const V1_CONTROLLERS: [&str; 8] = ["memory", "cpu", "cpuacct", "cpuset", "pids", "freezer", "blkio", "devices"];
/// Period over which a CPU limit is counted: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// Cgroups nested deeper than this are not looked into.
const MAX_DEPTH: usize = 64;

/// A cgroup that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup hierarchy is mounted: mount cgroup2 at /sys/fs/cgroup")]
    None,
    #[error("cannot read the mount table")]
    Mounts(#[source] io::Error),
    #[error("cannot make cgroup {}", .path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot write {value:?} to {}", .path.display())]
    Write { path: PathBuf, value: String, source: io::Error },
}

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub root: PathBuf,
    /// Version 1: the controllers. Version 2: none listed.
    pub controllers: Vec<String>,
    pub version: u8,
}

/// The hierarchies in use on this machine: those of version 1 that carry a known controller, or
/// the one of version 2 if there are none.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>, CgroupError> {
    select(&mounts::own().map_err(CgroupError::Mounts)?)
}

fn select(table: &[Mount]) -> Result<Vec<Hierarchy>, CgroupError> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for mount in table.iter().filter(|m| m.filesystem == "cgroup") {
        let controllers: Vec<String> =
            mount.super_options.split(',').filter(|o| V1_CONTROLLERS.contains(o)).map(str::to_owned).collect();
        if !controllers.is_empty() && found.iter().all(|h| h.controllers != controllers) {
            found.push(Hierarchy { root: mount.target.clone(), controllers, version: 1 });
        }
    }
    if found.is_empty() {
        let mount = table.iter().find(|m| m.filesystem == "cgroup2").ok_or(CgroupError::None)?;
        found.push(Hierarchy { root: mount.target.clone(), controllers: Vec::new(), version: 2 });
    }
    Ok(found)
}

impl Hierarchy {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|c| c == controller)
    }

    /// `path` as [`LabPaths`] gives it, with a leading slash, in this hierarchy.
    pub fn directory(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

/// Makes the lab's cgroups with the hosts' limits.
pub(crate) fn make(paths: &LabPaths, spec: &LabSpec) -> Result<(), CgroupError> {
    for hierarchy in hierarchies()? {
        enable_below(&hierarchy, &hierarchy.root)?;
        make_one(&hierarchy, &paths.cgroup())?;
        for node in spec.nodes() {
            make_one(&hierarchy, &paths.host_cgroup(node))?;
            if matches!(node, Node::Host(_)) {
                limit(&hierarchy, &hierarchy.directory(&paths.host_cgroup(node)), spec)?;
            }
            // Processes are in leaves only, as version 2 demands.
            make_leaf(&hierarchy, &paths.daemon_cgroup(node))?;
            make_leaf(&hierarchy, &paths.exec_cgroup(node))?;
            make_one(&hierarchy, &paths.containers_cgroup(node))?;
        }
    }
    Ok(())
}

fn make_leaf(hierarchy: &Hierarchy, path: &str) -> Result<PathBuf, CgroupError> {
    let directory = hierarchy.directory(path);
    match fs::create_dir(&directory) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(CgroupError::Make { path: directory, source }),
    }
    if hierarchy.has("cpuset")
        && let Some(parent) = directory.parent()
    {
        // A new cpuset is empty and takes no process; below a lab its children inherit by themselves.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let inherited = fs::read_to_string(parent.join(file))
                .map_err(|source| CgroupError::Make { path: directory.clone(), source })?;
            write(&directory.join(file), inherited.trim())?;
        }
        write(&directory.join("cgroup.clone_children"), "1")?;
    }
    Ok(directory)
}

/// An inner cgroup: its children can be limited.
fn make_one(hierarchy: &Hierarchy, path: &str) -> Result<(), CgroupError> {
    let directory = make_leaf(hierarchy, path)?;
    enable_below(hierarchy, &directory)
}

/// Version 2: hands every controller that is there on to the children of `directory`.
fn enable_below(hierarchy: &Hierarchy, directory: &Path) -> Result<(), CgroupError> {
    if hierarchy.version != 2 {
        return Ok(());
    }
    let available = fs::read_to_string(directory.join("cgroup.controllers"))
        .map_err(|source| CgroupError::Make { path: directory.to_owned(), source })?;
    for controller in available.split_whitespace() {
        let result = write(&directory.join("cgroup.subtree_control"), &format!("+{controller}"));
        // A controller that others keep from us at the root is missed only if a limit needs it.
        if let Err(error) = result {
            tracing::debug!(%controller, ?error, "controller not handed on");
        }
    }
    Ok(())
}

fn limit(hierarchy: &Hierarchy, directory: &Path, spec: &LabSpec) -> Result<(), CgroupError> {
    let quota = spec.cpus_milli.map(|milli| u64::from(milli) * CPU_PERIOD_US / 1000);
    if hierarchy.version == 2 {
        if let Some(bytes) = spec.memory_bytes {
            write(&directory.join("memory.max"), &bytes.to_string())?;
        }
        if let Some(quota) = quota {
            write(&directory.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))?;
        }
        return Ok(());
    }
    if hierarchy.has("memory") {
        if fs::read_to_string(directory.join("memory.use_hierarchy")).is_ok_and(|v| v.trim() == "0") {
            write(&directory.join("memory.use_hierarchy"), "1")?;
        }
        if let Some(bytes) = spec.memory_bytes {
            write(&directory.join("memory.limit_in_bytes"), &bytes.to_string())?;
        }
    }
    if hierarchy.has("cpu")
        && let Some(quota) = quota
    {
        write(&directory.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
        write(&directory.join("cpu.cfs_quota_us"), &quota.to_string())?;
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// The `cgroup.procs` files through which a process joins `path` in every hierarchy.
pub(crate) fn join_files(path: &str) -> Result<Vec<PathBuf>, CgroupError> {
    Ok(hierarchies()?.iter().map(|h| h.directory(path).join("cgroup.procs")).collect())
}

/// Every cgroup of the lab, parents before children.
pub(crate) fn directories(paths: &LabPaths) -> Vec<(Hierarchy, PathBuf)> {
    let mut all = Vec::new();
    for hierarchy in hierarchies().unwrap_or_default() {
        let top = hierarchy.directory(&paths.cgroup());
        if top.is_dir() {
            collect(&hierarchy, top, 0, &mut all);
        }
    }
    all
}

fn collect(hierarchy: &Hierarchy, directory: PathBuf, depth: usize, all: &mut Vec<(Hierarchy, PathBuf)>) {
    let children: Vec<PathBuf> = fs::read_dir(&directory)
        .map(|entries| {
            entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
        })
        .unwrap_or_default();
    all.push((hierarchy.clone(), directory));
    if depth < MAX_DEPTH {
        for child in children {
            collect(hierarchy, child, depth + 1, all);
        }
    }
}

/// Processes in the lab's cgroups, in any hierarchy.
pub(crate) fn processes(paths: &LabPaths) -> Vec<u32> {
    let mut pids: Vec<u32> = directories(paths)
        .iter()
        .flat_map(|(_, directory)| {
            fs::read_to_string(directory.join("cgroup.procs"))
                .unwrap_or_default()
                .lines()
                .filter_map(|l| l.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Stops the whole lab, so that nothing forks while it is being killed. A machine without a
/// freezer is no problem: killing goes in rounds.
pub(crate) fn freeze(paths: &LabPaths) {
    for hierarchy in hierarchies().unwrap_or_default() {
        let top = hierarchy.directory(&paths.cgroup());
        let _ = match hierarchy.version {
            2 => fs::write(top.join("cgroup.freeze"), "1"),
            _ if hierarchy.has("freezer") => fs::write(top.join("freezer.state"), "FROZEN"),
            _ => continue,
        };
    }
}

/// Lets everything in the lab run, also what an agent or CRIU had frozen: in version 1 only then
/// does a process notice that it was killed.
pub(crate) fn thaw(paths: &LabPaths) {
    for (hierarchy, directory) in directories(paths) {
        let _ = match hierarchy.version {
            2 => fs::write(directory.join("cgroup.freeze"), "0"),
            _ if hierarchy.has("freezer") => fs::write(directory.join("freezer.state"), "THAWED"),
            _ => continue,
        };
    }
}

/// Removes the lab's cgroups, children first. Returns what is left.
pub(crate) fn remove(paths: &LabPaths) -> Vec<String> {
    let mut problems = Vec::new();
    for (_, directory) in directories(paths).iter().rev() {
        match fs::remove_dir(directory) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(error) => problems.push(format!("cannot remove cgroup {}: {error}", directory.display())),
        }
    }
    problems
}

/// Names of all labs that have a cgroup.
pub(crate) fn lab_names() -> Vec<String> {
    hierarchies()
        .unwrap_or_default()
        .iter()
        .filter_map(|h| fs::read_dir(&h.root).ok())
        .flat_map(|entries| entries.flatten())
        .filter_map(|e| e.file_name().to_str()?.strip_prefix(CGROUP_PREFIX).map(str::to_owned))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn version_1_with_controllers_comes_before_an_empty_version_2() {
        let v1 = b"1 0 0:1 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                   2 0 0:2 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                   3 0 0:3 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = select(&mounts::parse(v1)).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].controllers, ["cpu", "cpuacct"]);
        assert_eq!(found[0].directory("/a/b"), Path::new("/sys/fs/cgroup/cpu,cpuacct/a/b"));

        let v2 = b"3 0 0:3 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(select(&mounts::parse(v2)).unwrap()[0].version, 2);
        assert!(select(&[]).is_err());
    }
}
