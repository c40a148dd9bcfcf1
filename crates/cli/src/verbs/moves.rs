//! `godwit move list|show|cancel`.

use anyhow::Result;
use clap::Subcommand;
use godwit_api::client::Client;
use godwit_model::migration::{DowntimePart, Move, Outcome, Summary};
use godwit_model::{Bytes, MoveId};

use super::DONE;
use crate::human;
use crate::printer::Printer;
use crate::table::{pairs, table};

#[derive(Debug, Subcommand)]
pub enum MoveVerb {
    /// List moves, the newest last
    #[command(visible_alias = "ls")]
    List,
    /// Show a move
    Show {
        /// As `godwit move list` shows it
        id: MoveId,
    },
    /// Give a move up; the container runs on where it is
    Cancel {
        /// As `godwit move list` shows it
        id: MoveId,
    },
}

pub async fn run(client: &Client, printer: &Printer, verb: MoveVerb) -> Result<u8> {
    match verb {
        MoveVerb::List => {
            let moves = client.moves().await?;
            printer.value(&moves, |moves| list(printer, moves))?;
            if moves.is_empty() {
                printer.say("nothing has been moved yet");
            }
        }
        MoveVerb::Show { id } => printer.value(&client.r#move(&id).await?, |m| show(printer, m))?,
        MoveVerb::Cancel { id } => {
            let one = client.cancel_move(&id).await?;
            if printer.is_json() {
                printer.json(&one)?;
            } else {
                printer.say(format_args!("the move of {} to {} is given up", one.name, one.to));
            }
        }
    }
    Ok(DONE)
}

fn list(printer: &Printer, moves: &[Move]) -> String {
    let head = ["MOVE", "CONTAINER", "FROM", "TO", "STATE", "TOTAL", "DOWNTIME", "SENT", "AGE"];
    let rows = moves.iter().map(|m| {
        let summary = m.summary.as_ref();
        vec![
            m.id.to_string(),
            m.name.to_string(),
            m.from.to_string(),
            m.to.to_string(),
            state(m),
            human::or_dash(summary.map(|s| human::millis(s.total_ms))),
            human::or_dash(summary.map(|s| human::millis(s.downtime_ms))),
            Bytes(summary.map_or(m.progress.bytes_sent, |s| s.bytes_sent)).to_string(),
            human::since(m.requested_at_ms),
        ]
    });
    table(printer, &head, rows)
}

pub fn state(one: &Move) -> String {
    match &one.outcome {
        Outcome::Moving | Outcome::HandedOver => one.phase.to_string(),
        Outcome::Done => "done".to_owned(),
        Outcome::Failed { .. } => "failed".to_owned(),
    }
}

fn show(printer: &Printer, one: &Move) -> String {
    let mut rows: Vec<(String, String)> = [
        ("move", one.id.to_string()),
        ("container", one.name.to_string()),
        ("from", one.from.to_string()),
        ("to", one.to.to_string()),
        ("requested", human::date_time(one.requested_at_ms)),
        ("state", state(one)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    let mut more = |name: &str, value: String| rows.push((name.to_owned(), value));
    if let Outcome::Failed { phase, reason } = &one.outcome {
        more("failed in", phase.to_string());
        more("because", reason.clone());
    }
    if one.summary.is_none() {
        more("sent", format!("{} of {}", Bytes(one.progress.bytes_sent), Bytes(one.progress.bytes_total)));
        more("rounds", one.progress.rounds.to_string());
    }
    rows.extend(one.summary.iter().flat_map(cost_rows));
    pairs(printer, rows)
}

/// What a move cost: total time, downtime with its parts in their order, bytes, rounds.
pub fn cost(printer: &Printer, summary: &Summary) -> String {
    pairs(printer, cost_rows(summary))
}

fn cost_rows(summary: &Summary) -> Vec<(String, String)> {
    let mut rows = vec![
        ("total time".to_owned(), human::millis(summary.total_ms)),
        ("downtime".to_owned(), human::millis(summary.downtime_ms)),
    ];
    let part =
        |(part, ms): (&DowntimePart, &f64)| (format!("  {}", part.as_str()), format!("  {}", human::millis(*ms)));
    rows.extend(summary.downtime_parts.iter().map(part));
    let (memory, files) = (Bytes(summary.memory_bytes), Bytes(summary.file_bytes));
    rows.push(("sent".to_owned(), format!("{} (memory {memory}, files {files})", Bytes(summary.bytes_sent))));
    rows.push(("rounds".to_owned(), summary.rounds.to_string()));
    if let Some(percent) = summary.slowed_to_percent {
        rows.push(("slowed down".to_owned(), format!("to {percent} % of its CPU time while it was copied")));
    }
    if summary.late_bytes > 0 {
        let late = Bytes(summary.late_bytes);
        rows.push(("post-copied".to_owned(), format!("{late} of memory, when it ran on the other host already")));
    }
    let copied = match &summary.stood_still {
        None => format!("in rounds while it ran{}", paused(summary)),
        Some(why) if summary.late_bytes > 0 => format!("not before the hand-over: {why}"),
        Some(why) => format!("while it stood still: {why}"),
    };
    rows.push(("memory copied".to_owned(), copied));
    rows.push(("frames parked".to_owned(), summary.frames_parked.to_string()));
    rows
}

/// What tells written pages at the source, where that is not free.
fn paused(summary: &Summary) -> String {
    let told =
        |ms| format!("; written pages told by soft-dirty bits, for which it stood still {} in all", human::millis(ms));
    summary.paused_ms.map(told).unwrap_or_default()
}
