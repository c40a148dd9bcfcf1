//! What a dump and a restore need to know, in our words, and their translation.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use crate::proto::{
    CGROUPS_SOFT, CgroupRootEntry, InheritFd, NETWORK_LOCK_SKIP, Opts, PageServerInfo, Request, request_type,
};

/// `CLONE_NEWNET`: the network namespace is restored empty, its interface is moved in by us.
const CLONE_NEWNET: u32 = 0x4000_0000;
/// Deleted-but-open files up to this size travel inside the images, in bytes.
const GHOST_LIMIT_BYTES: u32 = 1 << 30;
/// CRIU gives up when it cannot stop all processes in this time, in seconds.
const STOP_TIMEOUT_S: u32 = 10;
/// Warnings and errors; information and debugging cost time within the downtime.
const LOG_LEVEL: i32 = 2;

fn log_level() -> i32 {
    std::env::var("GODWIT_CRIU_LOG_LEVEL").ok().and_then(|v| v.parse().ok()).unwrap_or(LOG_LEVEL)
}

/// Where CRIU reads or writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    pub images: PathBuf,
    /// For the log, temporary mounts and the cache of what the kernel can do; on a tmpfs.
    pub work: PathBuf,
}

/// The same, opened: CRIU looks them up in the calling process, by number.
pub(crate) struct OpenDirectories {
    images: OwnedFd,
    work: OwnedFd,
}

impl Directories {
    pub(crate) fn open(&self) -> std::io::Result<OpenDirectories> {
        Ok(OpenDirectories { images: File::open(&self.images)?.into(), work: File::open(&self.work)?.into() })
    }
}

/// A mount inside the container whose content comes from outside: a volume, a device node, a masked file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalMount {
    /// Where it is in the container, absolute. Also its name in the images.
    pub target: String,
    /// What it is on this host (only used by a restore).
    pub source: PathBuf,
}

/// Standard output or error: a pipe whose reading end is the keeper's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StdioPipe {
    /// The pipe's inode on the host where it was dumped.
    pub inode: u64,
    /// The number under which the session was given the new writing end (see [`crate::PassedFd`]).
    pub fd: RawFd,
}

/// Where restored processes go in one cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupRoot {
    /// Name of the hierarchy's controllers; `None` for all (cgroup v2).
    pub controller: Option<String>,
    /// Path inside the hierarchy, starting with `/`.
    pub path: String,
}

/// A dump that leaves the processes where they are: the cgroup stays frozen, we decide what becomes of it.
#[derive(Debug)]
pub struct DumpOptions {
    pub pid: i32,
    pub directories: Directories,
    /// Directory of the container's freezer (v1) or cgroup (v2).
    pub freeze_cgroup: PathBuf,
    pub external_mounts: Vec<ExternalMount>,
    /// The root file system as the host sees it.
    pub root: PathBuf,
    /// A connected socket that takes the pages; `None` writes them to the images directory.
    pub page_server_fd: Option<RawFd>,
}

#[derive(Debug)]
pub struct RestoreOptions {
    pub directories: Directories,
    pub root: PathBuf,
    pub external_mounts: Vec<ExternalMount>,
    pub stdio: Vec<StdioPipe>,
    pub cgroups: Vec<CgroupRoot>,
    /// Memory that is not in the images is filled in by whoever listens on `lazy-pages.socket` in the work directory.
    pub lazy_pages: bool,
}

#[derive(Debug)]
pub struct PageServerOptions {
    pub directories: Directories,
    /// A connected socket from which the pages come.
    pub socket_fd: RawFd,
}

fn common(directories: &OpenDirectories, log_file: &str) -> Opts {
    Opts {
        images_dir_fd: directories.images.as_raw_fd(),
        work_dir_fd: Some(directories.work.as_raw_fd()),
        log_level: Some(log_level()),
        log_file: Some(log_file.to_owned()),
        ..Opts::default()
    }
}

/// What source and destination must agree on.
fn process_tree(opts: Opts) -> Opts {
    Opts {
        tcp_established: Some(true),
        tcp_skip_in_flight: Some(true),
        file_locks: Some(true),
        link_remap: Some(true),
        ghost_limit: Some(GHOST_LIMIT_BYTES),
        manage_cgroups: Some(true),
        manage_cgroups_mode: Some(CGROUPS_SOFT),
        network_lock: Some(NETWORK_LOCK_SKIP),
        empty_ns: Some(CLONE_NEWNET),
        ext_masters: Some(true),
        ext_sharing: Some(true),
        notify_scripts: Some(true),
        ..opts
    }
}

impl DumpOptions {
    pub(crate) fn request(&self, directories: &OpenDirectories) -> Request {
        let mut opts = process_tree(common(directories, "dump.log"));
        opts.pid = Some(self.pid);
        opts.leave_running = Some(true);
        opts.freeze_cgroup = Some(self.freeze_cgroup.display().to_string());
        opts.timeout = Some(STOP_TIMEOUT_S);
        opts.root = Some(self.root.display().to_string());
        opts.external = self.external_mounts.iter().map(|m| format!("mnt[{}]:{}", m.target, m.target)).collect();
        opts.ps = self.page_server_fd.map(|fd| PageServerInfo { fd: Some(fd), ..PageServerInfo::default() });
        Request { kind: request_type::DUMP, opts: Some(opts), ..Request::default() }
    }
}

impl RestoreOptions {
    pub(crate) fn request(&self, directories: &OpenDirectories) -> Request {
        let mut opts = process_tree(common(directories, "restore.log"));
        opts.root = Some(self.root.display().to_string());
        opts.rst_sibling = Some(true);
        opts.lazy_pages = self.lazy_pages.then_some(true);
        opts.external =
            self.external_mounts.iter().map(|m| format!("mnt[{}]:{}", m.target, m.source.display())).collect();
        opts.inherit_fd =
            self.stdio.iter().map(|p| InheritFd { key: format!("pipe:[{}]", p.inode), fd: p.fd }).collect();
        opts.cg_root =
            self.cgroups.iter().map(|c| CgroupRootEntry { ctrl: c.controller.clone(), path: c.path.clone() }).collect();
        Request { kind: request_type::RESTORE, opts: Some(opts), ..Request::default() }
    }
}

impl PageServerOptions {
    pub(crate) fn request(&self, directories: &OpenDirectories) -> Request {
        let mut opts = common(directories, "page-server.log");
        opts.ps = Some(PageServerInfo { fd: Some(self.socket_fd), ..PageServerInfo::default() });
        Request { kind: request_type::PAGE_SERVER_CHLD, opts: Some(opts), ..Request::default() }
    }
}
