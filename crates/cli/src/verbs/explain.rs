//! `godwit explain`: what is known of one container, and why it is as it is.

use std::collections::VecDeque;

use anyhow::Result;
use clap::Args;
use godwit_api::client::{Client, ClientError};
use godwit_api::types::{ContainerView, HostView, PlacementView};
use godwit_model::event::{Event, EventKind};
use godwit_model::migration::{Move, Outcome};
use serde::Serialize;

use super::{DONE, events, moves, ps};
use crate::human;
use crate::names;
use crate::printer::Printer;
use crate::table::pairs;

/// Moves and events told of, the newest.
const LAST_MOVES: usize = 5;
const LAST_EVENTS: usize = 10;
/// HTTP's own number.
const NOT_FOUND: u16 = 404;

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// For example shop/db-1, or shop/db where there is only one
    container: String,
}

/// What JSON has: the API's own values, put together.
#[derive(Serialize)]
struct Explanation {
    container: ContainerView,
    /// The host it is on; `null` while it is nowhere.
    host: Option<HostView>,
    /// Its last moves, the newest last.
    moves: Vec<Move>,
    /// Its last events, the newest last.
    events: VecDeque<Event>,
    /// The last event that says why it is where it is.
    placed: Option<Event>,
    /// Every host as a place for it now; `null` while it is being removed.
    placement: Option<PlacementView>,
}

pub async fn run(client: &Client, printer: &Printer, args: ExplainArgs) -> Result<u8> {
    let name = names::container(client, &args.container).await?;
    let container = client.container(&name).await?;
    let host = client.hosts().await?.into_iter().find(|host| Some(&host.name) == container.host.as_ref());
    let mut moves: Vec<Move> = client.moves().await?.into_iter().filter(|one| one.container == container.id).collect();
    moves.drain(..moves.len().saturating_sub(LAST_MOVES));
    let mut all = client.events(None, false).await?;
    let (mut events, mut placed) = (VecDeque::new(), None);
    while let Some(event) = all.next().await {
        let event = event?;
        if event.container.as_ref() != Some(&container.name) {
            continue;
        }
        if matches!(event.kind, EventKind::ContainerPlaced | EventKind::ContainerNotPlaced | EventKind::MoveDone) {
            placed = Some(event.clone());
        }
        if events.len() == LAST_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
    }
    let placement = match client.placement(&name).await {
        Ok(placement) => Some(placement),
        Err(ClientError::Api { status, .. }) if status.as_u16() == NOT_FOUND => None,
        Err(error) => return Err(error.into()),
    };
    let explanation = Explanation { container, host, moves, events, placed, placement };
    printer.value(&explanation, |explanation| show(printer, explanation))?;
    Ok(DONE)
}

fn show(printer: &Printer, explanation: &Explanation) -> String {
    let mut sections = vec![pairs(printer, rows(explanation))];
    let mut section = |head: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            sections.push(format!("{}\n{}", printer.bold(head), lines.join("\n")));
        }
    };
    section("HOSTS", explanation.placement.as_ref().map(hosts).unwrap_or_default());
    section("LAST MOVES", explanation.moves.iter().map(one_move).collect());
    section("LAST EVENTS", explanation.events.iter().map(events::line).collect());
    sections.join("\n\n")
}

fn rows(explanation: &Explanation) -> Vec<(String, String)> {
    let container = &explanation.container;
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
    row("container", container.name.to_string());
    row("image", container.image.clone());
    row("host", whereabouts(explanation));
    if let Some(event) = &explanation.placed {
        row("because", format!("{} ({})", event.message, human::date_time(event.at_ms)));
    }
    let up = container.status.as_ref().filter(|s| s.pid.is_some()).and_then(|s| s.started_at_ms);
    let up = up.map(|at| format!(", for {}", human::since(at))).unwrap_or_default();
    row("state", format!("{}{up}", ps::state(container)));
    if let Some(message) = &container.message {
        row("", message.clone());
    }
    if let Some(growth) = ps::growth(container) {
        row("grows", growth);
    }
    if let Some(status) = &container.status {
        row("restarts", status.restarts.to_string());
        if let Some(exit) = &status.exit {
            let memory = if exit.oom_killed { ", out of memory" } else { "" };
            row("last exit", format!("code {}{memory}, {} ago", exit.code, human::since(exit.finished_at_ms)));
        }
        row("memory", human::or_dash(status.memory));
        // What placement knows beside what the host tells: its machine, and who must be near it.
        let planned = explanation.placement.as_ref().filter(|p| p.here.is_some()).map(|p| &p.hosts.unmovable);
        match planned.unwrap_or(&status.movable.because).split_first() {
            None => row("movable", "yes".to_owned()),
            Some((first, more)) => {
                row("movable", format!("no, because {first}"));
                more.iter().for_each(|reason| row("", format!("and because {reason}")));
            }
        }
    }
    if let Some(host) = &explanation.host {
        row("written pages", host.facts.written_pages.to_string());
    }
    rows
}

/// A line for each host: its own first, then those that could take it, the best first, then the others.
fn hosts(placement: &PlacementView) -> Vec<String> {
    let mut lines = Vec::new();
    if let (Some(home), Some(here)) = (&placement.hosts.home, &placement.here) {
        lines.push(format!("{home}: it is here: {}", here.score));
        lines.extend(here.broken.iter().map(|rule| format!("{home}: a rule does not hold here: {rule}")));
    }
    let fitting = placement.hosts.fitting.iter().enumerate();
    lines.extend(fitting.map(|(at, one)| format!("{}: fits, choice {}: {}", one.host, at + 1, one.score)));
    let is_home = |host| placement.here.is_some() && placement.hosts.home.as_ref() == Some(host);
    let out = placement.hosts.out.iter().filter(|one| !is_home(&one.host));
    lines.extend(out.map(|one| format!("{}: out: {}", one.host, one.reasons.join(", "))));
    lines
}

fn whereabouts(explanation: &Explanation) -> String {
    let container = &explanation.container;
    let generation = format!("generation {}", container.generation);
    match (&container.host, &explanation.host) {
        (None, _) => "none yet".to_owned(),
        (Some(name), Some(host)) if !host.connected => format!("{name}, which does not answer; {generation}"),
        (Some(name), _) => format!("{name}, {generation}"),
    }
}

/// `id  3 h ago  h1 → h2: downtime 87.3 ms (freeze 2.1 ms, …)`.
fn one_move(one: &Move) -> String {
    let what = match (&one.outcome, &one.summary) {
        (Outcome::Failed { phase, reason }, _) => format!("failed in {phase}: {reason}"),
        (_, Some(summary)) => {
            let parts = summary.downtime_parts.iter();
            let parts: Vec<String> =
                parts.map(|(part, ms)| format!("{} {}", part.as_str(), human::millis(*ms))).collect();
            let copied = match &summary.stood_still {
                None => String::new(),
                Some(why) if summary.late_bytes > 0 => format!("; memory was not copied before the hand-over: {why}"),
                Some(why) => format!("; memory was copied while it stood still: {why}"),
            };
            format!("downtime {} ({}){copied}", human::millis(summary.downtime_ms), parts.join(", "))
        }
        _ => moves::state(one),
    };
    let why = one.cause.as_ref().map(|cause| format!(" ({})", cause.told(&one.name))).unwrap_or_default();
    format!("{}  {} ago  {} → {}{why}: {what}", one.id, human::since(one.requested_at_ms), one.from, one.to)
}
