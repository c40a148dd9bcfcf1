//! `godwit doctor`: what a host needs, whether this server has it, and how to get it.
//!
//! Where it can be tried, it is tried: an overlay is mounted, links and rules are made, a cgroup is frozen. The tries
//! happen in a mount and a network namespace of this process's own, so they end with it. One file per group of checks.

mod cgroups;
mod check;
mod containers;
mod criu;
mod machine;
mod network;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use self::check::{Check, State, Ways};
use super::DONE;
use crate::human;
use crate::printer::Printer;
use crate::table::table;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Where the agent would keep containers, volumes and images
    #[arg(long, default_value = "/var/lib/godwit/agent", value_name = "DIRECTORY")]
    state_dir: PathBuf,
}

#[derive(Serialize)]
struct Diagnosis {
    /// Nothing that is needed is missing.
    ok: bool,
    checks: Vec<Check>,
}

/// To be called while this is the only thread: namespaces belong to threads. Exit code 1: something needed is missing.
pub fn run(printer: &Printer, args: &DoctorArgs) -> Result<u8> {
    let ways = Ways::of_this_machine();
    let is_root = rustix::process::geteuid().is_root();
    let mut checks = machine::checks(&args.state_dir, is_root);
    // Before the namespaces change: CRIU looks at the machine's own.
    checks.extend(criu::checks(&ways, is_root));
    checks.extend(cgroups::checks(is_root));
    checks.extend(containers::checks(&ways, &args.state_dir, is_root));
    checks.extend(network::checks(&ways, is_root));

    let lacking = checks.iter().filter(|check| check.lacks()).count();
    let diagnosis = Diagnosis { ok: lacking == 0, checks };
    printer.value(&diagnosis, |diagnosis| show(printer, &diagnosis.checks))?;
    match lacking {
        0 => printer.say("this server can be a host"),
        n => printer.say(format_args!("this server cannot be a host: {} missing", human::count(n, "requirement"))),
    }
    Ok(if diagnosis.ok { DONE } else { 1 })
}

fn show(printer: &Printer, checks: &[Check]) -> String {
    let rows = checks.iter().map(|check| {
        let way_out = check.way_out.as_deref().filter(|_| check.state != State::Ok);
        let text = |text: &str| text.to_owned();
        vec![
            text(check.what),
            text(check.purpose),
            text(check.state.as_str()),
            check.found.clone(),
            human::or_dash(way_out),
        ]
    });
    table(printer, &["WHAT", "NEEDED FOR", "STATE", "FOUND", "HOW TO GET IT"], rows)
}
