//! The container's view of files: its root, kernel file systems, devices, masks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
    unmount,
};

use super::{InitError, identity};
use crate::mounts::Detached;
use crate::spec::{EtcFile, LaunchSpec, Tmpfs};
use crate::sys::{MountAttributes, mount_setattr};

/// Size of `/dev/shm`; charged to the container's memory anyway.
const SHM_SIZE: &str = "50%";

/// Settings of the container's network namespace. MPTCP cannot be carried, so it is off and
/// programs fall back to TCP; without NET_RAW and with any user, ports and echo requests are
/// harmless in a namespace of one's own. To be applied again where a namespace is made anew.
pub const NETWORK_SETTINGS: [(&str, &str); 3] = [
    ("net/mptcp/enabled", "0"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 65535"),
];

/// Builds the root from the mounted root file system and the detached mounts of the keeper,
/// and makes it the process' root. Afterwards nothing of the host can be reached by path.
pub fn build(spec: &LaunchSpec, mounts: Vec<Detached>) -> Result<(), InitError> {
    // Nothing done here may show on the host, and nothing of the host later here.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(InitError::at("separate the mounts from the host's"))?;
    let root = open_tree(CWD, &spec.rootfs, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .map_err(InitError::at(format!("take the root file system {}", spec.rootfs.display())))?;
    // No set-user-id is needed under no_new_privs, and device nodes of an image are not to work.
    let no_devices = MountAttributes { set: libc::MOUNT_ATTR_NODEV, clear: 0 };
    mount_setattr(root.as_fd(), no_devices, None).map_err(InitError::at("close the root's devices"))?;
    let root_path = &spec.rootfs;
    move_mount(&root, "", CWD, root_path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(InitError::at("mount the root file system"))?;
    // While the process is root outside the path is reachable; from here on it is root inside.
    rustix::process::fchdir(&root).map_err(InitError::at("enter the root file system"))?;
    identity::become_root_inside()?;

    // The kernel lets a user namespace mount these only while the host's are in sight.
    let quiet =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc = new_filesystem("proc", &[], quiet)?;
    let sys = new_filesystem("sysfs", &[], quiet | MountAttrFlags::MOUNT_ATTR_RDONLY)?;

    rustix::process::pivot_root(".", ".").map_err(InitError::at("change the root"))?;
    // Both roots are on top of each other at "."; the old one is the upper.
    unmount(".", UnmountFlags::DETACH).map_err(InitError::at("let go of the host's root"))?;
    rustix::process::chdir("/").map_err(InitError::at("enter the new root"))?;

    attach_at_real_directory(&proc, "/proc")?;
    attach_at_real_directory(&sys, "/sys")?;
    for Detached { target, tree } in mounts {
        if target == "/dev" {
            attach_at_real_directory(&tree, "/dev")?;
            attach_device_filesystems()?;
        } else {
            attach_creating(&tree, &target)?;
        }
    }
    for tmpfs in &spec.tmpfs {
        attach_tmpfs(tmpfs)?;
    }
    apply_network_settings();
    for path in &spec.masks.read_only {
        make_read_only(path)?;
    }
    for file in &spec.etc_files {
        write_etc_file(file)?;
    }
    if spec.read_only_rootfs {
        set_attributes("/", libc::MOUNT_ATTR_RDONLY)?;
    }
    Ok(())
}

fn new_filesystem(kind: &str, options: &[(&str, &str)], flags: MountAttrFlags) -> Result<OwnedFd, InitError> {
    let failed = || InitError::at(format!("make {kind}"));
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed())?;
    for (key, value) in options {
        match *value {
            "" => fsconfig_set_flag(&context, *key),
            value => fsconfig_set_string(&context, *key, value),
        }
        .map_err(InitError::at(format!("set {key} of {kind}")))?;
    }
    fsconfig_create(&context).map_err(failed())?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(failed())
}

/// Attaches at a path that the image must not redirect.
fn attach_at_real_directory(mount: &OwnedFd, target: &str) -> Result<(), InitError> {
    match std::fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            return Err(InitError::Step {
                action: format!("mount {target}"),
                source: io::Error::other("the image has something else than a directory there"),
            });
        }
        Err(_) => make_directories(target)?,
    }
    attach(mount, target)
}

/// Attaches at a directory or file, made like the source if absent. Paths resolve inside.
fn attach_creating(mount: &OwnedFd, target: &str) -> Result<(), InitError> {
    if !Path::new(target).exists() {
        let source = rustix::fs::fstat(mount).map_err(InitError::at(format!("look at the source of {target}")))?;
        if rustix::fs::FileType::from_raw_mode(source.st_mode).is_dir() {
            make_directories(target)?;
        } else {
            if let Some(parent) = Path::new(target).parent() {
                make_directories(&parent.to_string_lossy())?;
            }
            std::fs::File::create(target).map_err(InitError::at(format!("make {target}")))?;
        }
    }
    attach(mount, target)
}

fn attach(mount: &OwnedFd, target: &str) -> Result<(), InitError> {
    move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(InitError::at(format!("mount {target}")))
}

fn make_directories(path: &str) -> Result<(), InitError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(InitError::at(format!("make directory {path}")))
}

/// Terminals of the container's own and POSIX shared memory.
fn attach_device_filesystems() -> Result<(), InitError> {
    let terminals = [("mode", "0620"), ("ptmxmode", "0666"), ("gid", "5")];
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let pts = new_filesystem("devpts", &terminals, quiet)?;
    attach_at_real_directory(&pts, "/dev/pts")?;
    let options = [("mode", "1777"), ("size", SHM_SIZE)];
    let shm = new_filesystem("tmpfs", &options, quiet | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    attach_at_real_directory(&shm, "/dev/shm")
}

fn attach_tmpfs(tmpfs: &Tmpfs) -> Result<(), InitError> {
    let (mode, size) = (format!("{:o}", tmpfs.mode & 0o7777), tmpfs.size_bytes.to_string());
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = new_filesystem("tmpfs", &[("mode", &mode), ("size", &size)], flags)?;
    attach_creating(&mount, &tmpfs.target)
}

/// A part of a file system as a read-only mount of its own.
fn make_read_only(path: &str) -> Result<(), InitError> {
    if !Path::new(path).exists() {
        return Ok(());
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags).map_err(InitError::at(format!("take {path}")))?;
    let attributes = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
    mount_setattr(tree.as_fd(), attributes, None).map_err(InitError::at(format!("make {path} read-only")))?;
    attach(&tree, path)
}

fn set_attributes(path: &str, set: u64) -> Result<(), InitError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mount = rustix::fs::open(path, flags, Mode::empty()).map_err(InitError::at(format!("open {path}")))?;
    mount_setattr(mount.as_fd(), MountAttributes { set, clear: 0 }, None)
        .map_err(InitError::at(format!("set attributes of {path}")))
}

/// A kernel without a setting has nothing to switch off.
fn apply_network_settings() {
    for (name, value) in NETWORK_SETTINGS {
        let _ = std::fs::write(format!("/proc/sys/{name}"), value);
    }
}

/// By rename, so that a link of that name in the image is replaced and not followed.
fn write_etc_file(file: &EtcFile) -> Result<(), InitError> {
    use std::io::Write;
    let path = format!("/etc/{}", file.name);
    let temporary = format!("/etc/.{}.new", file.name);
    let failed = || InitError::at(format!("write {path}"));
    make_directories("/etc")?;
    let _ = std::fs::remove_file(&temporary);
    let mut out =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary).map_err(failed())?;
    out.write_all(file.content.as_bytes()).map_err(failed())?;
    std::fs::rename(&temporary, &path).map_err(failed())
}
