//! Making the namespaces of a lab host, pinning them, and visiting them.
//!
//! Namespaces belong to threads, so each is made (or entered) on a thread of its own which ends
//! afterwards. What a lab host sees differs from the machine in these places only:
//!
//! | path | in the lab host |
//! |---|---|
//! | `/run` | fresh tmpfs, so daemons use their default paths below `/run/godwit` |
//! | `/run/godwit-lab/NAME` | the lab's own tmpfs (API socket); other labs are not there |
//! | `/var/lib/godwit` | the host's own state directory |
//! | `/sys` | a sysfs of the host's network namespace, with everything that was mounted below it |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change, mount_move,
    unmount,
};

use crate::mounts;
use crate::paths::{HOST_STATE, LabPaths, RUN_ROOT, STATE_ROOT};
use crate::spec::Node;

/// Memory that files below a host's `/run` may take: an agent keeps there what an arriving container remembers.
const HOST_RUN_TMPFS: &std::ffi::CStr = c"mode=0755,size=50%";
/// Where the machine's `/sys` waits while the host's is put in its place.
const OLD_SYS: &str = "/run/.old-sys";

/// Namespaces that could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("cannot make namespaces for {what}: this needs root and a kernel with network and mount namespaces")]
    Make { what: String, source: io::Error },
    #[error("cannot {step} for {what}")]
    SetUp { what: String, step: String, source: io::Error },
    #[error("cannot pin a namespace at {}", .path.display())]
    Pin { path: PathBuf, source: io::Error },
    #[error("cannot enter the namespace {}: is the lab up?", .path.display())]
    Enter { path: PathBuf, source: io::Error },
    #[error("the thread that was to work inside {what} ended early")]
    Thread { what: String },
}

/// Makes and pins the network namespace that holds the switch.
pub(crate) fn make_switch(paths: &LabPaths) -> Result<(), NamespaceError> {
    make("the switch", CloneFlags::CLONE_NEWNET, || Ok(()), &[("net", paths.switch_namespace())])
}

/// Makes and pins a host's network and mount namespaces. Its state directory must exist.
pub(crate) fn make_host(paths: &LabPaths, node: Node) -> Result<(), NamespaceError> {
    make(
        &node.to_string(),
        CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS,
        || set_up_mounts(paths, node),
        &[("net", paths.net_namespace(node)), ("mnt", paths.mount_namespace(node))],
    )
}

fn make(
    what: &str,
    flags: CloneFlags,
    set_up: impl FnOnce() -> Result<(), NamespaceError> + Send,
    pins: &[(&str, PathBuf)],
) -> Result<(), NamespaceError> {
    let lost = || NamespaceError::Thread { what: what.to_owned() };
    std::thread::scope(|scope| {
        let (made, wait_made) = mpsc::channel();
        let (pinned, wait_pinned) = mpsc::channel::<()>();
        scope.spawn(move || {
            let result = unshare(flags)
                .map_err(|e| NamespaceError::Make { what: what.to_owned(), source: e.into() })
                .and_then(|()| set_up())
                .map(|()| rustix::thread::gettid());
            // The receiver is the scope's own thread and outlives this one.
            let _ = made.send(result);
            // The namespaces live as long as this thread until they are pinned.
            let _ = wait_pinned.recv();
        });
        let thread = wait_made.recv().map_err(|_| lost())??;
        for (kind, path) in pins {
            let wrong = |source| NamespaceError::Pin { path: path.clone(), source };
            fs::File::create(path).map_err(wrong)?;
            mount_bind(format!("/proc/self/task/{thread}/ns/{kind}"), path.as_path()).map_err(|e| wrong(e.into()))?;
        }
        drop(pinned);
        Ok(())
    })
}

/// Runs in the new mount namespace, which is a copy of the machine's.
fn set_up_mounts(paths: &LabPaths, node: Node) -> Result<(), NamespaceError> {
    let what = node.to_string();
    let step = |step: &'static str| {
        let what = what.clone();
        move |source: io::Error| NamespaceError::SetUp { what, step: step.to_owned(), source }
    };
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| step("keep mounts private")(e.into()))?;

    // Copies of other labs' mounts, of this lab's pins and of a real agent's would live as long as this host.
    let foreign = [RUN_ROOT, STATE_ROOT, HOST_STATE, "/run/godwit"].map(PathBuf::from);
    if let Some(problem) = mounts::unmount_below(&foreign, &[paths.run()]).into_iter().next() {
        return Err(step("leave out what is not its own")(io::Error::other(problem)));
    }

    // The new /run is put together inside the lab's tmpfs and moved into place.
    let run = paths.run().join(format!("{node}.run"));
    let inner = run.join(paths.run().strip_prefix("/run").unwrap_or(Path::new("godwit-lab")));
    let make_run = || -> io::Result<()> {
        fs::create_dir(&run)?;
        mount("tmpfs", &run, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, HOST_RUN_TMPFS)?;
        fs::create_dir(run.join("godwit"))?;
        fs::create_dir(run.join("lock"))?;
        fs::create_dir_all(&inner)?;
        mount_bind(paths.run(), &inner)?;
        mount_move(&run, "/run")?;
        Ok(())
    };
    make_run().map_err(step("make its /run"))?;
    mount_bind(paths.host_state(node), HOST_STATE)
        .map_err(|e| step("bind its state directory to /var/lib/godwit")(e.into()))?;
    replace_sysfs().map_err(step("mount its /sys"))
}

/// A sysfs shows the network namespace of whoever mounted it.
fn replace_sysfs() -> io::Result<()> {
    let old = Path::new(OLD_SYS);
    fs::create_dir(old)?;
    mount_bind_recursive("/sys", old)?;
    mount("sysfs", "/sys", "sysfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)?;
    let table = mounts::own()?;
    let top = table.iter().rev().find(|m| m.target == old).map(|m| m.id);
    for below in table.iter().filter(|m| Some(m.parent) == top) {
        let Ok(relative) = below.target.strip_prefix(old) else { continue };
        let target = Path::new("/sys").join(relative);
        if target.is_dir() {
            mount_move(&below.target, &target)?;
        }
    }
    unmount(old, UnmountFlags::DETACH)?;
    fs::remove_dir(old)
}

/// Runs `work` on a thread inside the pinned network namespace `net`: sockets it opens and programs
/// it starts belong there. Files are those of the machine.
pub(crate) fn visit<T: Send>(net: &Path, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
    let enter = |source: io::Error| NamespaceError::Enter { path: net.to_owned(), source };
    let file = fs::File::open(net).map_err(enter)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || setns(file, CloneFlags::CLONE_NEWNET).map(|()| work()));
        match thread.join() {
            Ok(result) => result.map_err(|e| enter(e.into())),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
