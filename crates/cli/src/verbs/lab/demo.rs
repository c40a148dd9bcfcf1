//! `godwit lab demo`: three hosts, three programs under load, nine moves, and what their clients saw of them.
//!
//! Each program is moved around the hosts while a client works with it from a fourth machine, all the time on the same
//! connections, through a port of one host that stays. Clients measure themselves ([`godwit_lab::workload`], pgbench).

mod acts;
mod clients;
mod inside;
mod moves;
mod pgbench;
mod report;
mod stage;

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use godwit_lab::{Lab, LabName, Node};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::report::Report;
use self::stage::Stage;
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;
use crate::verbs::DONE;

/// What the demonstration's lab is called where nothing else is said.
const DEFAULT_NAME: &str = "demo";
const HOSTS: u32 = 3;

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The lab's name; a lab of this name that an earlier demonstration left is removed first
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: LabName,
    /// Write what was measured to this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Leave the lab as it is in the end
    #[arg(long)]
    keep: bool,
    /// The directory that `./dev images` fills
    #[arg(long, value_name = "DIRECTORY", default_value = ".images")]
    images: PathBuf,
}

/// Exit code 0 only if no client lost a byte, a connection or an answer, and nothing is left of the lab.
pub fn run(printer: &Printer, args: &DemoArgs) -> Result<u8> {
    let stage = Stage::check(&args.images)?;
    let runtime =
        Builder::new_current_thread().enable_all().build().context("cannot start: the system refuses epoll")?;
    let mut report = Report::new(HOSTS);
    let worked = with_lab(printer, args, &runtime, &stage, &mut report);
    runtime.shutdown_background();

    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write the report to {}", path.display()))?;
    }
    printer.value(&report, |report| report.table(printer))?;
    worked?;
    let problems = report.problems();
    if problems.is_empty() {
        printer.say("no client lost a byte, an answer or its connection");
        return Ok(DONE);
    }
    Err(Failure::new(format!("not as it should be: {}", problems.join("; "))).into())
}

/// From nothing to nothing, unless the lab is to be kept.
fn with_lab(printer: &Printer, args: &DemoArgs, runtime: &Runtime, stage: &Stage, report: &mut Report) -> Result<()> {
    // From here on Ctrl-C does not end this process but what it does.
    let mut interrupt = runtime.block_on(async { Interrupt::new() })?;
    let lab = stage::make_lab(printer, &args.name, runtime)?;
    let played = runtime.block_on(async {
        tokio::select! {
            biased;
            () = interrupt.any() => None,
            played = acts::play(printer, &lab, stage, report) => Some(played),
        }
    });
    if let Some(Err(_)) = &played {
        tell_logs(printer, &lab);
    }
    let worked = played.unwrap_or_else(|| Err(Failure::new("interrupted").into()));
    if args.keep {
        printer.say(what_to_try(&args.name));
        return worked;
    }
    printer.say(format_args!("removing lab {}", args.name));
    let removed = lab.down();
    report.leftovers = Lab::leftovers(&args.name);
    worked?;
    Ok(removed?)
}

fn tell_logs(printer: &Printer, lab: &Lab) {
    for node in [Node::Controller].into_iter().chain(lab.spec().host_nodes()) {
        printer.labelled(&format!("log of {node}"), lab.log_tail(node).replace(" | ", "\n    "));
    }
}

fn what_to_try(name: &LabName) -> String {
    format!(
        "the lab is still up. Try, for example:\n  \
         godwit --lab {name} ps --watch\n  \
         godwit --lab {name} migrate shop/cache --to h2\n  \
         godwit --lab {name} exec -it shop/db -- psql shop\n  \
         godwit --lab {name} events --follow\n  \
         godwit lab exec client --name {name} -- redis-cli -h {} info server\n  \
         godwit lab down --name {name}",
        stage::ENTRANCE.address()
    )
}

/// Signals that ask the demonstration to end.
struct Interrupt([Signal; 3]);

impl Interrupt {
    fn new() -> Result<Self> {
        let open = |kind: SignalKind| signal(kind).context("cannot wait for signals");
        Ok(Self([open(SignalKind::interrupt())?, open(SignalKind::terminate())?, open(SignalKind::hangup())?]))
    }

    async fn any(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}

/// Waits for `work` no longer than `limit`; the error says what was waited for.
async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result.with_context(|| format!("{what} failed")),
        Err(_) => Err(Failure::new(format!("waited for {what} for {} in vain", human::span(limit))).into()),
    }
}
