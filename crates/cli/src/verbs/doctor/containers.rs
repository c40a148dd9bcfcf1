//! What containers are made of: user namespaces, overlays, the system call filter; and kernel settings a move needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use godwit_container::{RootFs, remove_dir_all_no_xdev};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use super::check::{Check, Requirement, Ways, chain, need};

/// The first id of the container whose root file system is tried.
const ID_BASE: u32 = 100_000;

pub fn checks(ways: &Ways, state_dir: &Path, is_root: bool) -> Vec<Check> {
    let users = need("user namespaces", "containers whose root is nobody on the host");
    let overlay = need("overlayfs with idmapped layers", "root file systems");
    let mut all = if is_root {
        vec![user_namespaces(users), idmapped_overlay(overlay, state_dir)]
    } else {
        [users, overlay].map(|need| need.not_checked("needs root")).into()
    };
    all.push(seccomp());
    all.push(sysctl(ways, need("fs.pipe-user-pages-soft = 0", "CRIU's many pipes"), "fs.pipe-user-pages-soft", "0"));
    let lazily = need("vm.unprivileged_userfaultfd = 1", "filling memory after the restore");
    all.push(sysctl(ways, lazily, "vm.unprivileged_userfaultfd", "1"));
    all.push(pressure());
    all
}

/// By unshare(1): this process has to stay in the machine's own.
fn user_namespaces(need: Requirement) -> Check {
    let way_out = "sysctl -w user.max_user_namespaces=65536, and a kernel with CONFIG_USER_NS";
    match Command::new("unshare").args(["--user", "--map-root-user", "true"]).output() {
        Ok(output) if output.status.success() => need.ok("made one"),
        Ok(output) => need.missing(String::from_utf8_lossy(&output.stderr).trim().to_owned(), way_out),
        Err(error) => need.missing(format!("unshare: {error}"), "the package util-linux"),
    }
}

/// Mounts one as containers get it, where the agent will keep them: the file system there decides.
fn idmapped_overlay(need: Requirement, state_dir: &Path) -> Check {
    let way_out = format!("Linux 5.19, and ext4, xfs or btrfs at {}", state_dir.display());
    let Some(existing) = state_dir.ancestors().find(|path| path.is_dir()) else {
        return need.not_checked(format!("no directory {}", state_dir.display()));
    };
    let base = existing.join(format!(".godwit-doctor-{}", std::process::id()));
    let tried = mount_one(&base);
    let removed = remove_dir_all_no_xdev(&base).map_err(|error| chain(&error));
    match tried.and(removed) {
        Ok(()) => need.ok(format!("mounted one below {}", existing.display())),
        Err(what) => need.missing(what, way_out),
    }
}

fn mount_one(base: &Path) -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("no mount namespace of our own: {error}"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| format!("mounts cannot be made private: {error}"))?;
    let layer: PathBuf = base.join("layer");
    let root = RootFs { layers: vec![layer.clone()], dir: base.join("container") };
    for directory in [base, &layer, &root.dir] {
        fs::create_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    }
    let mounted = root.mount(ID_BASE).map(drop);
    // Also after a failure: the base is removed next, and never through a mount.
    let unmounted = root.unmount();
    mounted.and(unmounted).map_err(|error| chain(&error))
}

fn seccomp() -> Check {
    let need = need("seccomp filter", "denying system calls to containers");
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.split_whitespace().any(|action| action == "errno") => need.ok("there"),
        _ => need.missing("not there", "a kernel with CONFIG_SECCOMP_FILTER"),
    }
}

fn sysctl(ways: &Ways, need: Requirement, name: &str, wanted: &str) -> Check {
    match fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))) {
        Ok(value) if value.trim() == wanted => need.ok(wanted),
        Ok(value) => need.missing(value.trim().to_owned(), ways.or(format!("sysctl -w {name}={wanted}"))),
        // A kernel that does not know the setting does not have the limit.
        Err(_) => need.ok("this kernel has no such limit"),
    }
}

fn pressure() -> Check {
    let need = need("pressure (PSI)", "nothing yet; it tells of overload");
    match fs::read_to_string("/proc/pressure/memory") {
        Ok(_) => need.ok("on"),
        Err(_) => need.ok("off; psi=1 on the kernel's command line turns it on"),
    }
}
