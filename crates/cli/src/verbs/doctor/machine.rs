//! Who we are, kernel, processor, disk, clock.

use std::path::Path;
use std::time::{Duration, SystemTime};

use godwit_memory::Means;
use godwit_model::Bytes;

use super::check::{Check, chain, need};
use crate::human;

/// Idmapped layers below an overlay came with it.
const KERNEL_NEEDED: (u32, u32) = (5, 19);
/// Less free space than this does not hold the images of one small application.
const DISK_NEEDED: Bytes = Bytes::mib(1 << 10);
const DISK_RECOMMENDED: Bytes = Bytes::mib(10 << 10);
/// A clock this much behind this program's own file is wrong: files may come from a machine slightly ahead.
const CLOCK_TOLERANCE: Duration = Duration::from_hours(24);

pub fn checks(state_dir: &Path, is_root: bool) -> Vec<Check> {
    vec![
        root(is_root),
        kernel(),
        written_pages(is_root),
        mapping_flags(is_root),
        architecture(),
        disk(state_dir),
        clock(),
    ]
}

fn root(is_root: bool) -> Check {
    let need = need("root", "namespaces, mounts, links");
    let uid = rustix::process::geteuid().as_raw();
    if is_root { need.ok("root") } else { need.missing(format!("user {uid}"), "sudo godwit doctor") }
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn kernel_version() -> Option<(u32, u32)> {
    let release = release();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel() -> Check {
    let need = need("kernel >= 5.19", "idmapped image layers");
    match kernel_version() {
        Some(version) if version >= KERNEL_NEEDED => need.ok(release()),
        _ => need.too_old(release(), "the distribution's newer kernel, then a reboot"),
    }
}

/// Tried as a move would: the version of a kernel does not say how it was configured.
fn written_pages(is_root: bool) -> Check {
    let need = need("written pages", "memory copied while a container runs");
    if !is_root {
        return need.not_checked("needs root");
    }
    match godwit_memory::check_tracking() {
        Ok(means @ Means::Protection) => need.ok(means.to_string()),
        Ok(means @ Means::SoftDirty) => need.warning(
            format!("{means} only"),
            "Linux 6.7 or newer, which tells them by PAGEMAP_SCAN; until then a container that is copied stands still for \
             some ms per GiB in each round",
        ),
        Err(error) => need.warning(
            chain(&error),
            "Linux 6.7 or newer with CONFIG_USERFAULTFD, or CONFIG_MEM_SOFT_DIRTY; without either memory is copied while the \
             container stands still, or follows after the hand-over (--mode post-copy, or --max-downtime)",
        ),
    }
}

/// Tried as an agent does when it starts.
fn mapping_flags(is_root: bool) -> Check {
    let need = need("mappings' flags", "downtime that does not grow with memory");
    if !is_root {
        return need.not_checked("needs root");
    }
    match godwit_memory::MappingFlags::learn() {
        Ok(_) => need.ok("BPF iterator task_vma"),
        Err(error) => need.warning(
            chain(&error),
            "a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF that lets root use them; without it a container \
             stands still some 15 ms longer per GiB",
        ),
    }
}

fn architecture() -> Check {
    let need = need("architecture", "system calls known to the filter");
    match std::env::consts::ARCH {
        known @ ("x86_64" | "aarch64") => need.ok(known),
        other => need.missing(other, "x86_64 or aarch64"),
    }
}

fn disk(state_dir: &Path) -> Check {
    let need = need("disk space", "images, files, volumes");
    // Of a directory that is still to be made, the one it will be made in.
    let Some(existing) = state_dir.ancestors().find(|path| path.is_dir()) else {
        return need.missing(format!("no directory {}", state_dir.display()), "another --state-dir");
    };
    let free = rustix::fs::statvfs(existing).map(|s| Bytes(s.f_bavail.saturating_mul(s.f_frsize)));
    let way_out = format!("room below {}, or another --state-dir", existing.display());
    match free {
        Ok(free) if free >= DISK_RECOMMENDED => need.ok(format!("{free} free")),
        Ok(free) if free >= DISK_NEEDED => need.warning(format!("{free} free"), way_out),
        Ok(free) => need.missing(format!("{free} free"), way_out),
        Err(error) => need.missing(format!("{}: {error}", existing.display()), way_out),
    }
}

fn clock() -> Check {
    let need = need("clock", "certificates, times in logs");
    let now = human::date_time(human::now_ms());
    let built = std::env::current_exe().and_then(std::fs::metadata).and_then(|file| file.modified());
    match built {
        Ok(built) if SystemTime::now() + CLOCK_TOLERANCE < built => {
            need.missing(format!("{now}, before this program was built"), "set the clock, for example by chrony")
        }
        _ => need.ok(now),
    }
}
