//! CRIU, and what it says of the kernel.

use std::io::Read;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use godwit_criu::{Criu, FindError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::check::{Check, Requirement, Ways, chain, need};

/// Names the CRIU to use, before all others.
const VARIABLE: &str = "GODWIT_CRIU";
/// Longest time for one look by CRIU, which takes tens of milliseconds.
const CRIU_TIMEOUT: Duration = Duration::from_secs(20);
/// How much of what CRIU says is kept, in bytes.
const MAX_TALK_BYTES: u64 = 64 << 10;

pub fn checks(ways: &Ways, is_root: bool) -> Vec<Check> {
    let version = need("CRIU >= 4.1", "dump and restore");
    let elsewhere = "the package criu of Debian 13 or newer, or GODWIT_CRIU=/path/to/criu";
    match Criu::find() {
        Ok(criu) => {
            let found = format!("{} at {}", criu.version, criu.path.display());
            let mut all = vec![version.ok(found)];
            all.extend(of_kernel(&criu.path, ways, is_root));
            all
        }
        Err(FindError::TooOld { path, found, .. }) => {
            let found = format!("{found} at {}", path.display());
            vec![version.too_old(found, way_out(ways, elsewhere)), works().not_checked("needs a CRIU")]
        }
        Err(error) => {
            vec![version.missing(chain(&error), way_out(ways, elsewhere)), works().not_checked("needs a CRIU")]
        }
    }
}

/// The variable comes before everything else, also where it names the wrong program.
fn way_out(ways: &Ways, elsewhere: &str) -> String {
    match std::env::var_os(VARIABLE) {
        Some(_) => format!("unset {VARIABLE}, or let it name a newer one"),
        None => ways.or(elsewhere),
    }
}

fn works() -> Requirement {
    need("criu check", "dump and restore on this kernel")
}

fn of_kernel(criu: &Path, ways: &Ways, is_root: bool) -> Vec<Check> {
    let scan = need("PAGEMAP_SCAN", "finding written pages");
    let fill = need("userfaultfd", "filling memory after the restore");
    if !is_root {
        return [works(), scan, fill].map(|need| need.not_checked("needs root")).into();
    }
    let newer = "a newer kernel";
    let whole = match run(criu, &["check"]) {
        Ok(()) => works().ok("looks good"),
        Err(what) => works().missing(what, ways.or("a newer CRIU or kernel")),
    };
    let feature = |need: Requirement, names: &[&str]| {
        let arguments: Vec<&str> = ["check"].into_iter().chain(names.iter().flat_map(|n| ["--feature", n])).collect();
        match run(criu, &arguments) {
            Ok(()) => need.ok("there"),
            Err(what) => need.warning(what, newer),
        }
    };
    vec![whole, feature(scan, &["pagemap_scan"]), feature(fill, &["uffd", "uffd-noncoop"])]
}

/// Runs CRIU; its last words on failure.
fn run(criu: &Path, arguments: &[&str]) -> Result<(), String> {
    let (status, talk) = ended(criu, arguments).map_err(|error| error.to_string())?;
    if status.success() {
        return Ok(());
    }
    let last = talk.lines().rev().find(|line| !line.trim().is_empty());
    Err(last.map_or_else(|| format!("{status}"), |line| line.trim().to_owned()))
}

fn ended(criu: &Path, arguments: &[&str]) -> std::io::Result<(ExitStatus, String)> {
    let (reader, writer) = std::io::pipe()?;
    let mut child =
        Command::new(criu).args(arguments).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).spawn()?;
    let timeout = Timespec { tv_sec: CRIU_TIMEOUT.as_secs().cast_signed(), tv_nsec: 0 };
    let in_time = match Pid::from_raw(child.id().cast_signed()) {
        Some(pid) => {
            let end = pidfd_open(pid, PidfdFlags::empty())?;
            poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&timeout))? > 0
        }
        None => true,
    };
    if !in_time {
        child.kill()?;
        child.wait()?;
        return Err(std::io::Error::other(format!("no answer within {} s", CRIU_TIMEOUT.as_secs())));
    }
    let status = child.wait()?;
    let mut talk = Vec::new();
    reader.take(MAX_TALK_BYTES).read_to_end(&mut talk)?;
    Ok((status, String::from_utf8_lossy(&talk).into_owned()))
}
