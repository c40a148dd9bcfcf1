//! `godwit migrate`: asks for a move, shows how it goes on, and what it cost.

mod progress;

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use godwit_api::client::{Client, ClientError, Lines};
use godwit_api::types::{MigrateRequest, MovePlan};
use godwit_model::migration::{Compression, CopyMode, Move, MoveOptions, Outcome};
use godwit_model::units::BitRate;
use godwit_model::{HostName, MoveId};
use tokio::time::Instant;

use self::progress::Progress;
use super::DONE;
use super::moves::cost;
use crate::failure::Failure;
use crate::printer::Printer;
use crate::{human, names};

/// How long a controller may be away while a move is watched, in milliseconds. The move itself goes on or is taken
/// back without anyone watching.
const AWAY_TIMEOUT_MS: u64 = 60_000;
/// Time between two attempts to reach it again, in milliseconds.
const RETRY_INTERVAL_MS: u64 = 500;

#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// For example shop/db-1, or shop/db where there is only one
    container: String,
    /// The host to move it to; without it the scheduler picks one
    #[arg(long, value_name = "HOST")]
    to: Option<HostName>,
    /// How memory is copied: in rounds while the container runs (pre-copy), once and the rest when it runs on the other
    /// host (post-copy: if a host or the link dies meanwhile, the container starts anew), while it stands still
    /// (stop-and-copy), or pre-copy where the host can and as much post-copy as --max-downtime needs (auto)
    #[arg(long, value_name = "MODE", default_value = "auto")]
    mode: CopyMode,
    /// Give the move up if the container is expected to stand still for longer, in milliseconds
    #[arg(long, value_name = "MS")]
    max_downtime: Option<u64>,
    /// Give the move up unless the container has come to stand still by then, for example 90s or 10m
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    deadline: Option<Duration>,
    /// Send no faster than this while the container runs, for example 500mbit
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<BitRate>,
    /// Compress memory on its way: where the link is slower than compressing (auto), always or never
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    compress: Compression,
    /// Send memory on so many connections; by default as many as the source's processors can keep busy
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    connections: Option<u32>,
    /// Never slow the container down; by default one that writes faster than that can be sent gets less CPU time until
    /// it moves
    #[arg(long)]
    never_slow: bool,
    /// Say where it would go, or why it would not; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not wait for the end; `godwit move show` tells how it goes on
    #[arg(short, long, conflicts_with = "dry_run")]
    detach: bool,
}

pub async fn run(client: &Client, printer: &Printer, args: MigrateArgs) -> Result<u8> {
    let name = names::container(client, &args.container).await?;
    let options = MoveOptions {
        mode: args.mode,
        max_downtime_ms: args.max_downtime,
        deadline_ms: args.deadline.map(|d| d.as_millis() as u64),
        bandwidth: args.bandwidth,
        compression: args.compress,
        connections: args.connections,
        never_slow: args.never_slow,
    };
    let request = MigrateRequest { to: args.to, options };
    if args.dry_run {
        let plan = client.plan_move(&name, &request).await?;
        let text =
            |p: &MovePlan| format!("{} would go from {} to {}: {}", p.container, p.from, p.to, p.reasons.join("; "));
        printer.value(&plan, text)?;
        return Ok(DONE);
    }
    let begun = client.migrate(&name, &request).await?;
    if args.detach {
        printer.value(&begun, |m| m.id.to_string())?;
        printer.say(format_args!("{} is on its way from {} to {}", begun.name, begun.from, begun.to));
        return Ok(DONE);
    }
    let ended = watch(client, printer, begun).await?;
    match &ended.outcome {
        Outcome::Failed { phase, reason } => {
            if printer.is_json() {
                printer.json(&ended)?;
            }
            let message = format!("{} was not moved to {}: {phase}: {reason}", ended.name, ended.to);
            Err(Failure::new(message).hint(format!("it runs on, on {}", ended.from)).into())
        }
        _ => {
            printer.say(format_args!("{} moved from {} to {}", ended.name, ended.from, ended.to));
            printer.value(&ended, |m| m.summary.as_ref().map(|s| cost(printer, s)).unwrap_or_default())?;
            Ok(DONE)
        }
    }
}

/// Follows a move to its end. Ctrl-C asks the controller to give it up; a second one stops watching.
async fn watch(client: &Client, printer: &Printer, begun: Move) -> Result<Move> {
    let mut progress = Progress::new(printer, &begun);
    let mut latest = begun;
    let mut interrupted = false;
    let mut watcher = Watcher::new(client, latest.id.clone());
    while !latest.outcome.over() {
        tokio::select! {
            next = watcher.next() => {
                latest = next?;
                progress.show(&latest);
            }
            _ = tokio::signal::ctrl_c() => {
                if interrupted {
                    let hint = format!("it goes on; `godwit move show {}` tells how", latest.id);
                    return Err(Failure::new("not watched any longer").hint(hint).into());
                }
                interrupted = true;
                match client.cancel_move(&latest.id).await {
                    Ok(_) => progress.say("cancelling; Ctrl-C again to stop watching"),
                    Err(error) => progress.say(&format!("cannot be cancelled: {error}")),
                }
            }
        }
    }
    progress.finish();
    Ok(latest)
}

/// The stream of a move, opened again where the controller was away.
struct Watcher<'a> {
    client: &'a Client,
    id: MoveId,
    lines: Option<Lines<Move>>,
    away_since: Option<Instant>,
}

impl<'a> Watcher<'a> {
    fn new(client: &'a Client, id: MoveId) -> Self {
        Self { client, id, lines: None, away_since: None }
    }

    /// The move after its next change. Cancel safe.
    async fn next(&mut self) -> Result<Move, ClientError> {
        loop {
            let error = match &mut self.lines {
                None => match self.client.watch_move(&self.id).await {
                    Ok(lines) => {
                        self.lines = Some(lines);
                        continue;
                    }
                    Err(error) => error,
                },
                Some(lines) => match lines.next().await {
                    Some(Ok(one)) => {
                        self.away_since = None;
                        return Ok(one);
                    }
                    Some(Err(error)) => error,
                    None => ClientError::Protocol { what: "the controller stopped telling of the move".to_owned() },
                },
            };
            // Also a stream that ends early is asked for again: a controller that is told to stop ends it like that.
            let ended_early = self.lines.take().is_some();
            let since = *self.away_since.get_or_insert_with(Instant::now);
            let too_long = since.elapsed() >= Duration::from_millis(AWAY_TIMEOUT_MS);
            if too_long || !(ended_early || error.is_transient()) {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(RETRY_INTERVAL_MS)).await;
        }
    }
}
