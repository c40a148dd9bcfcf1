//! Control groups, version 1 or 2, by making one.

use godwit_container::Cgroup;
use godwit_container::cgroup::{Hierarchies, Version};

use super::check::{Check, Requirement, chain, need};

/// What a container's limits, and its standing still in a move, are made of.
const NEEDED: [&str; 4] = ["memory", "cpu", "pids", "freezer"];

pub fn checks(is_root: bool) -> Vec<Check> {
    let all = need("cgroup memory, cpu, pids, freezer", "limits, standing still in a move");
    let tried = need("cgroup of our own", "limits, standing still in a move");
    let hierarchies = match Hierarchies::detect() {
        Ok(hierarchies) => hierarchies,
        Err(error) => {
            let way_out = "mount -t cgroup2 none /sys/fs/cgroup";
            return vec![all.missing(chain(&error), way_out), tried.not_checked("needs cgroups")];
        }
    };
    vec![controllers(all, &hierarchies), if is_root { attempt(tried) } else { tried.not_checked("needs root") }]
}

fn controllers(need: Requirement, hierarchies: &Hierarchies) -> Check {
    let version = match hierarchies.version() {
        Version::V1 => 1,
        Version::V2 => 2,
    };
    let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !has(hierarchies, name)).collect();
    if missing.is_empty() {
        return need.ok(format!("version {version}, all"));
    }
    let way_out = match version {
        1 => "a kernel with them, not switched off by cgroup_disable= on its command line",
        _ => "no version 1 hierarchy that holds them, none of cgroup_disable= on the kernel's command line",
    };
    need.missing(format!("version {version} without {}", missing.join(", ")), way_out)
}

fn has(hierarchies: &Hierarchies, name: &str) -> bool {
    match hierarchies {
        Hierarchies::V1(controllers) => controllers.contains_key(name),
        // Each cgroup of version 2 can be frozen.
        Hierarchies::V2(_) if name == "freezer" => true,
        Hierarchies::V2(root) => std::fs::read_to_string(root.join("cgroup.controllers"))
            .is_ok_and(|text| text.split_whitespace().any(|one| one == name)),
    }
}

/// Makes an empty cgroup, freezes and thaws it, removes it.
fn attempt(need: Requirement) -> Check {
    let work = || {
        let cgroup = Cgroup::ensure(&format!("/godwit-doctor-{}", std::process::id()))?;
        let used = cgroup.freeze().and_then(|()| cgroup.thaw());
        // Also after a failure: nothing of a look stays behind.
        let deleted = cgroup.delete();
        used.and(deleted)
    };
    match work() {
        Ok(()) => need.ok("made, frozen, thawed, removed"),
        Err(error) => need.missing(chain(&error), "a /sys/fs/cgroup that may be written: not inside another container"),
    }
}
