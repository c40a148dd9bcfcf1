//! `godwit host evacuate`: says how a host would be emptied, asks for it, and tells how it goes.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use godwit_api::client::{Client, ClientError, Lines};
use godwit_api::types::{EvacuateRequest, HostView};
use godwit_model::HostName;
use godwit_model::event::{Event, EventKind};
use godwit_model::host::HostState;
use godwit_plan::{EvacuateOptions, EvacuationPlan, How};
use tokio::time::Instant;

use super::DONE;
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;
use crate::table::table;

/// How long a controller may be away while an evacuation is watched, in milliseconds. It goes on without anyone watching.
const AWAY_TIMEOUT_MS: u64 = 60_000;
/// Time between two attempts to reach it again, in milliseconds.
const RETRY_INTERVAL_MS: u64 = 500;

/// How a host is to be emptied.
#[derive(Debug, Args)]
pub struct HowArgs {
    /// Only to these hosts, for example h2,h3; without it to any
    #[arg(long, value_name = "HOSTS", value_delimiter = ',')]
    to: Vec<HostName>,
    /// The most moves at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    parallel: u32,
    /// When the host should be empty, for example 10m: the plan says whether that is to be expected
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    deadline: Option<Duration>,
    /// Stop what cannot move live, if it has no volumes, and start it elsewhere
    #[arg(long)]
    allow_restart: bool,
}

impl From<HowArgs> for EvacuateOptions {
    fn from(args: HowArgs) -> Self {
        Self {
            to: args.to,
            parallel: args.parallel,
            allow_restart: args.allow_restart,
            deadline_ms: args.deadline.map(|d| d.as_millis() as u64),
        }
    }
}

#[derive(Debug, Args)]
pub struct EvacuateArgs {
    /// As `godwit host list` shows it
    host: HostName,
    #[command(flatten)]
    how: HowArgs,
    /// Say how it would go, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not wait for the end; `godwit host show` tells how it goes on
    #[arg(short, long, conflicts_with = "dry_run")]
    detach: bool,
}

pub async fn run(client: &Client, printer: &Printer, args: EvacuateArgs) -> Result<u8> {
    let options = args.how.into();
    let answer = client.evacuate(&args.host, &EvacuateRequest { options, dry_run: args.dry_run }).await?;
    let plan = answer.plan;
    if args.dry_run {
        printer.value(&plan, |plan| steps(printer, plan))?;
        printer.say(summary(&plan));
        return Ok(DONE);
    }
    printer.say(summary(&plan));
    for stay in &plan.stays {
        printer.say(format_args!("{} has no way out yet: {}", stay.container, stay.reasons.join("; ")));
    }
    if args.detach {
        return Ok(DONE);
    }
    watch(client, printer, &args.host, &plan, answer.since).await?;
    let view = client.hosts().await?.into_iter().find(|host| host.name == args.host);
    let Some(view) = view else { return Err(Failure::new(format!("{} is gone", args.host)).into()) };
    if printer.is_json() {
        printer.json(&view)?;
    }
    match view.state {
        HostState::Evacuated => {
            printer.say(format_args!("{} has no container any more and may be switched off", view.name));
            Ok(DONE)
        }
        HostState::EvacuationFailed => {
            let stays = view.evacuation.map(|e| e.stays).unwrap_or_default();
            let named: Vec<String> = stays.iter().map(|(name, why)| format!("{name}: {}", why.join("; "))).collect();
            let text = format!("{} is not empty: {}", view.name, named.join(" | "));
            let hint = "mend it and evacuate again, or `godwit host activate` opens the host";
            Err(Failure::new(text).hint(hint).into())
        }
        HostState::Failed => {
            Err(Failure::new(format!("{} was lost meanwhile; what it had starts elsewhere", view.name)).into())
        }
        state => {
            Err(Failure::new(format!("{} is {} now: somebody ended the evacuation", view.name, state.as_str())).into())
        }
    }
}

/// One line on how a host is emptied.
pub fn told(host: &HostView) -> String {
    let Some(evacuation) = &host.evacuation else { return human::NOTHING.to_owned() };
    let mut text = format!("{} of {} left", evacuation.left, evacuation.total);
    for (name, why) in &evacuation.stays {
        text.push_str(&format!("; {name} stays: {}", why.join(", ")));
    }
    text
}

fn summary(plan: &EvacuationPlan) -> String {
    let estimate = human::span(Duration::from_millis(plan.estimated_ms));
    let mut text =
        format!("{}: {}, {}, about {estimate}", plan.host, human::count(plan.steps.len(), "step"), plan.bytes,);
    if plan.keeps_deadline == Some(false) {
        text.push_str(", which is later than the deadline");
    }
    if !plan.stays.is_empty() {
        text.push_str(&format!("; {} would stay", plan.stays.len()));
    }
    text
}

fn steps(printer: &Printer, plan: &EvacuationPlan) -> String {
    let head = ["STEP", "CONTAINER", "FROM", "TO", "HOW", "AFTER", "SIZE", "WHY"];
    let moves = plan.steps.iter().enumerate().map(|(at, step)| {
        let after: Vec<String> = step.after.iter().map(|first| (first + 1).to_string()).collect();
        vec![
            (at + 1).to_string(),
            step.container.to_string(),
            step.from.to_string(),
            step.to.to_string(),
            if step.how == How::Live { "live" } else { "restart" }.to_owned(),
            if after.is_empty() { human::NOTHING.to_owned() } else { after.join(",") },
            step.bytes.to_string(),
            step.reasons.join("; "),
        ]
    });
    let nothing = || human::NOTHING.to_owned();
    let stays = plan.stays.iter().map(|stay| {
        let (name, from) = (stay.container.to_string(), plan.host.to_string());
        vec![nothing(), name, from, nothing(), "stays".to_owned(), nothing(), nothing(), stay.reasons.join("; ")]
    });
    table(printer, &head, moves.chain(stays))
}

/// Tells what happens until the evacuation is over, also across a restart of the controller.
async fn watch(client: &Client, printer: &Printer, host: &HostName, plan: &EvacuationPlan, since: u64) -> Result<()> {
    let total = plan.steps.len();
    let (mut since, mut done) = (since, 0);
    let mut lines: Option<Lines<Event>> = None;
    let mut last_heard = Instant::now();
    loop {
        let event = match &mut lines {
            Some(lines) => lines.next().await,
            None => {
                match client.events(Some(since), true).await {
                    Ok(new) => lines = Some(new),
                    Err(error) => wait_for_controller(error, last_heard).await?,
                }
                continue;
            }
        };
        let Some(Ok(event)) = event else {
            lines = None;
            if ended(client, host).await.unwrap_or(false) {
                return Ok(());
            }
            // Until a controller that ends all streams has ended.
            tokio::time::sleep(Duration::from_millis(RETRY_INTERVAL_MS)).await;
            continue;
        };
        (since, last_heard) = (event.number, Instant::now());
        let of_plan = |event: &Event| {
            event.container.as_ref().is_some_and(|name| plan.steps.iter().any(|step| step.container == *name))
        };
        match event.kind {
            EventKind::MoveDone if of_plan(&event) => {
                done += 1;
                printer.say(format_args!("{} ({done} of {total})", event.message));
            }
            EventKind::MoveFailed | EventKind::ContainerStopped if of_plan(&event) => printer.say(&event.message),
            EventKind::HostEvacuated
            | EventKind::HostEvacuationFailed
            | EventKind::HostActivated
            | EventKind::HostCordoned
            | EventKind::HostFailed
                if event.host.as_ref() == Some(host) =>
            {
                return Ok(());
            }
            _ => {}
        }
    }
}

async fn ended(client: &Client, host: &HostName) -> Result<bool, ClientError> {
    let hosts = client.hosts().await?;
    Ok(hosts
        .iter()
        .find(|h| h.name == *host)
        .is_none_or(|h| !matches!(h.state, HostState::Evacuating | HostState::Suspect)))
}

/// Pauses before the next attempt, or ends with the error when that has gone on for too long.
async fn wait_for_controller(error: ClientError, last_heard: Instant) -> Result<()> {
    if last_heard.elapsed() > Duration::from_millis(AWAY_TIMEOUT_MS) {
        return Err(error.into());
    }
    tokio::time::sleep(Duration::from_millis(RETRY_INTERVAL_MS)).await;
    Ok(())
}
