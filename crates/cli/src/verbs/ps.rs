//! `godwit ps`.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use godwit_api::client::Client;
use godwit_api::types::ContainerView;
use godwit_model::EnvName;
use godwit_model::container::Health;

use super::DONE;
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;
use crate::table::table;

/// How often `--watch` asks, in milliseconds: the API tells of events, not of each changed number.
const WATCH_INTERVAL_MS: u64 = 1_000;
/// ANSI: cursor to the top left corner, and everything after it erased.
const HOME_AND_ERASE: &str = "\x1b[H\x1b[J";

#[derive(Debug, Args)]
pub struct PsArgs {
    /// Only this environment's
    env: Option<EnvName>,
    /// Show it again each second, until Ctrl-C
    #[arg(short, long)]
    watch: bool,
}

pub async fn run(client: &Client, printer: &Printer, args: PsArgs) -> Result<u8> {
    if args.watch && (printer.is_json() || !printer.stdout_is_terminal()) {
        return Err(Failure::new("--watch draws on a terminal")
            .hint("`godwit events --follow --output json` is for programs")
            .into());
    }
    loop {
        let containers = client.containers(args.env.as_ref()).await?;
        if args.watch {
            printer.data_bytes(HOME_AND_ERASE.as_bytes())?;
        }
        printer.value(&containers, |containers| list(printer, containers))?;
        if containers.is_empty() {
            printer.say("no containers; `godwit env apply -f FILE` makes some");
        }
        if !args.watch {
            return Ok(DONE);
        }
        tokio::select! {
            _ = tokio::time::sleep(Duration::from_millis(WATCH_INTERVAL_MS)) => {}
            _ = tokio::signal::ctrl_c() => return Ok(DONE),
        }
    }
}

/// The table, and below it a line for each container there is something to say about.
pub fn list(printer: &Printer, containers: &[ContainerView]) -> String {
    let head = ["CONTAINER", "HOST", "STATE", "ADDRESS", "MEMORY", "UP", "MOVABLE"];
    let rows = containers.iter().map(|c| {
        let status = c.status.as_ref();
        let up = status.filter(|s| s.pid.is_some()).and_then(|s| s.started_at_ms);
        vec![
            c.name.to_string(),
            human::or_dash(c.host.as_ref()),
            state(c),
            c.address.to_string(),
            human::or_dash(status.and_then(|s| s.memory)),
            human::or_dash(up.map(human::since)),
            human::or_dash(status.map(|s| if s.movable.yes() { "yes" } else { "no" })),
        ]
    });
    let mut text = table(printer, &head, rows);
    let notes: Vec<String> = containers.iter().flat_map(notes).collect();
    if !notes.is_empty() {
        text.push_str("\n\n");
        text.push_str(&notes.join("\n"));
    }
    text
}

/// What the controller calls it, and the health where one is checked: `running (healthy)`.
pub fn state(container: &ContainerView) -> String {
    match container.health {
        Some(Health::Starting) => format!("{} (starting)", container.state),
        Some(Health::Healthy) => format!("{} (healthy)", container.state),
        Some(Health::Unhealthy) => format!("{} (unhealthy)", container.state),
        None => container.state.clone(),
    }
}

/// What it shall have and does not have yet, and why not.
pub fn growth(container: &ContainerView) -> Option<String> {
    let growth = container.growth.as_ref()?;
    let (memory, cpu) = (growth.resources.reserved_memory, growth.resources.reserved_cpu);
    let what = format!("shall have {memory} and {cpu} CPUs reserved");
    Some(match (&growth.refused, &growth.host) {
        (Some(because), _) => format!("{what}, and there is no way: {because}"),
        (None, Some(host)) => format!("{what}; room is being made on {host}"),
        (None, None) => what,
    })
}

fn notes(container: &ContainerView) -> Vec<String> {
    let name = &container.name;
    let mut notes: Vec<String> = container.message.iter().map(|message| format!("{name}: {message}")).collect();
    notes.extend(growth(container).map(|text| format!("{name}: {text}")));
    if let Some(status) = &container.status {
        let ended = status.exit.as_ref().filter(|_| status.pid.is_none());
        notes.extend(ended.map(|exit| {
            let why = if exit.oom_killed { ", out of memory" } else { "" };
            format!("{name}: ended with exit code {}{why}, {} ago", exit.code, human::since(exit.finished_at_ms))
        }));
        if status.restarts > 0 {
            notes.push(format!("{name}: restarted {}", human::count(status.restarts as usize, "time")));
        }
        notes.extend(status.movable.because.iter().map(|because| format!("{name}: not movable: {because}")));
    }
    notes
}
