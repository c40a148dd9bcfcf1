//! `godwit balance show|off|advise|automatic|now`.

mod watch;

use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use godwit_api::client::Client;
use godwit_api::types::{BalanceChange, BalanceMode, BalanceView, LoadView};
use godwit_plan::{Advice, Advised, Purpose};

use super::DONE;
use crate::human;
use crate::printer::Printer;
use crate::table::{pairs, table};

#[derive(Debug, Subcommand)]
pub enum BalanceVerb {
    /// Show mode and policy, what hosts have to do, and which moves would make the fleet better now
    Show,
    /// Look for nothing
    Off(PolicyArgs),
    /// Tell which moves would make the fleet better, make none
    Advise(PolicyArgs),
    /// Make the moves that make the fleet better, a few at a time
    Automatic(PolicyArgs),
    /// Make the moves that are advised now, once
    Now {
        /// Do not wait for the end; `godwit balance show` tells how it goes on
        #[arg(short, long)]
        detach: bool,
    },
}

/// When moving is worth it; what is not given stays as it is.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// CPU or memory in use from which a host has too much to do, for example 85%
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    threshold: Option<u16>,
    /// How long it must have had too much to do, for example 5m
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    hold: Option<Duration>,
    /// How much fuller than the emptiest host one must be before it gives containers away
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    level: Option<u16>,
    /// How much less full the fuller of both hosts must be after a move
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    least_gain: Option<u16>,
    /// How long a container is left alone after a move
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    rest: Option<Duration>,
    /// The most moves at the same time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    at_once: Option<u32>,
}

/// `85%`, or `85`, in thousandths.
fn parse_percent(text: &str) -> Result<u16, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    let percent: f64 = number.parse().map_err(|_| "write a number of percent, for example 85%".to_owned())?;
    if (0.0..=100.0).contains(&percent) {
        Ok((percent * 10.0).round() as u16)
    } else {
        Err("that is not from 0% to 100%".to_owned())
    }
}

fn percent(permille: u64) -> String {
    let text = format!("{:.1}", permille as f64 / 10.0);
    format!("{}%", text.trim_end_matches(".0"))
}

pub async fn run(client: &Client, printer: &Printer, verb: BalanceVerb) -> Result<u8> {
    match verb {
        BalanceVerb::Show => printer.value(&client.balance().await?, |view| show(printer, view))?,
        BalanceVerb::Off(policy) => change(client, printer, BalanceMode::Off, &policy).await?,
        BalanceVerb::Advise(policy) => change(client, printer, BalanceMode::Advise, &policy).await?,
        BalanceVerb::Automatic(policy) => change(client, printer, BalanceMode::Automatic, &policy).await?,
        BalanceVerb::Now { detach } => return now(client, printer, detach).await,
    }
    Ok(DONE)
}

async fn change(client: &Client, printer: &Printer, mode: BalanceMode, policy: &PolicyArgs) -> Result<()> {
    let ms = |duration: Option<Duration>| duration.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
    let change = BalanceChange {
        mode: Some(mode),
        cpu_threshold_permille: policy.threshold,
        memory_threshold_permille: policy.threshold,
        hold_ms: ms(policy.hold),
        level_permille: policy.level,
        least_gain_permille: policy.least_gain,
        rest_ms: ms(policy.rest),
        at_once: policy.at_once,
    };
    let view = client.change_balance(&change).await?;
    printer.say(format_args!("balance is {}: {}", view.mode.as_str(), standing(&view)));
    if printer.is_json() { printer.json(&view) } else { Ok(()) }
}

async fn now(client: &Client, printer: &Printer, detach: bool) -> Result<u8> {
    let answer = client.balance_now().await?;
    printer.value(&answer.advice, |advice| moves(printer, advice))?;
    if answer.advice.moves.is_empty() {
        printer.say("nothing would make the fleet better");
    } else if !detach {
        watch::until_done(client, printer, &answer).await?;
    }
    Ok(DONE)
}

fn show(printer: &Printer, view: &BalanceView) -> String {
    let policy = &view.policy;
    let threshold = format!(
        "CPU {}, memory {}, for {}",
        percent(policy.cpu_threshold_permille.into()),
        percent(policy.memory_threshold_permille.into()),
        human::span(Duration::from_millis(policy.hold_ms))
    );
    let rows = [
        ("mode", view.mode.as_str().to_owned()),
        ("too much to do", threshold),
        ("level", percent(policy.level_permille.into())),
        ("least gain", percent(policy.least_gain_permille.into())),
        ("rest", human::span(Duration::from_millis(policy.rest_ms))),
        ("moves at once", view.at_once.to_string()),
        ("now", standing(view)),
    ];
    let hosts = table(printer, &["HOST", "CPU", "MEMORY", "TOO MUCH FOR"], view.hosts.iter().map(load));
    let sections = [pairs(printer, rows), hosts, moves(printer, &view.advice)];
    let sections: Vec<String> = sections.into_iter().filter(|text| !text.is_empty()).collect();
    sections.join("\n\n")
}

/// What is to be said of this moment.
fn standing(view: &BalanceView) -> String {
    let mut text = match (&view.waits, view.advice.moves.len()) {
        (Some(because), _) => format!("nothing is begun, because {because}"),
        (None, 0) => "nothing would make the fleet better".to_owned(),
        (None, 1) => "1 move would make the fleet better".to_owned(),
        (None, n) => format!("{n} moves would make the fleet better"),
    };
    if view.under_way > 0 {
        text.push_str(&format!(", {} under way", view.under_way));
    }
    text
}

fn load(host: &LoadView) -> Vec<String> {
    let long = host.overloaded_ms.map(|ms| human::span(Duration::from_millis(ms)));
    let (cpu, memory) = (percent(host.cpu_permille.into()), percent(host.memory_permille.into()));
    vec![host.host.to_string(), cpu, memory, human::or_dash(long)]
}

fn moves(printer: &Printer, advice: &Advice) -> String {
    let head = ["STEP", "CONTAINER", "FROM", "TO", "PURPOSE", "GAIN", "COST", "AFTER", "WHY"];
    let rows = advice.moves.iter().enumerate().map(|(at, advised)| {
        let step = &advised.step;
        let after: Vec<String> = step.after.iter().map(|first| (first + 1).to_string()).collect();
        vec![
            (at + 1).to_string(),
            step.container.to_string(),
            step.from.to_string(),
            step.to.to_string(),
            purpose(advised.purpose).to_owned(),
            gain(advised),
            advised.cost.to_string(),
            if after.is_empty() { human::NOTHING.to_owned() } else { after.join(",") },
            step.reasons.join("; "),
        ]
    });
    let mut text = table(printer, &head, rows);
    if advice.more {
        text.push_str("\nthere is more to do after these");
    }
    text
}

fn purpose(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Spread => "spread",
        Purpose::Overload => "overload",
        Purpose::Level => "level",
    }
}

/// Fewer beside it, or by how much the fuller host gets less full.
fn gain(advised: &Advised) -> String {
    match advised.purpose {
        Purpose::Spread => format!("{} fewer beside it", advised.gain),
        Purpose::Overload | Purpose::Level => percent(advised.gain),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn percent_is_read_and_written() {
        for (text, permille) in [("85%", 850), ("12.5", 125), ("0%", 0), ("100", 1000)] {
            assert_eq!(parse_percent(text).unwrap(), permille);
        }
        for bad in ["", "%", "101%", "-1", "NaN", "many"] {
            assert!(parse_percent(bad).is_err(), "{bad}");
        }
        assert_eq!((percent(850), percent(125), percent(3)), ("85%".to_owned(), "12.5%".to_owned(), "0.3%".to_owned()));
    }
}
