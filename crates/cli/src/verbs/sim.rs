//! `godwit sim`: a fleet of simulated hosts lives through failures, growth and evacuations.

use anyhow::Result;
use clap::Args;
use godwit_sim::{Hour, SETTLE_HOURS, Settings, Summary};
use serde::Serialize;

use super::DONE;
use crate::human;
use crate::printer::Printer;
use crate::table::{pairs, table};

#[derive(Debug, Args)]
pub struct SimArgs {
    /// How many hosts
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=50_000))]
    hosts: u32,
    /// How many containers at the beginning
    #[arg(long, default_value_t = 2_000, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    containers: u32,
    /// The same seed gives the same result, byte for byte
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Virtual hours with failures; then the fleet gets some to settle
    #[arg(long, default_value_t = 24, value_name = "N", value_parser = clap::value_parser!(u32).range(..=10_000))]
    hours: u32,
}

#[derive(Serialize)]
struct Lived {
    hours: Vec<Hour>,
    summary: Summary,
}

/// Exit code 1 and an error where a promise was broken.
pub fn run(printer: &Printer, args: &SimArgs) -> Result<u8> {
    let SimArgs { hosts, containers, seed, hours } = *args;
    let settings = Settings { hosts, containers, seed, hours };
    let mut told = Vec::new();
    printer.say(format_args!(
        "{} with {}, {hours} virtual hours and {SETTLE_HOURS} to settle",
        human::count(hosts as usize, "host"),
        human::count(containers as usize, "container")
    ));
    let summary = godwit_sim::run(&settings, |hour| {
        if hour.hour.is_multiple_of(6) {
            let (at, running) = (hour.hour, hour.running);
            printer.say(format_args!("hour {at}: {running} of {} containers run", hour.containers));
        }
        told.push(hour.clone());
    })?;
    let lived = Lived { hours: told, summary };
    printer.value(&lived, |lived| show(printer, lived))?;
    Ok(DONE)
}

fn show(printer: &Printer, lived: &Lived) -> String {
    let head = ["HOUR", "HOSTS", "CONTAINERS", "RUNNING", "DOUBLED", "MOVES", "RESTARTS", "HOSTS LOST"];
    let rows = lived.hours.iter().map(|h| {
        vec![
            h.hour.to_string(),
            h.hosts_active.to_string(),
            h.containers.to_string(),
            h.running.to_string(),
            h.doubled.to_string(),
            h.moves.to_string(),
            h.restarts.to_string(),
            h.hosts_failed.to_string(),
        ]
    });
    format!("{}\n\n{}", table(printer, &head, rows), pairs(printer, summary(&lived.summary)))
}

fn summary(s: &Summary) -> Vec<(&'static str, String)> {
    let c = &s.counts;
    vec![
        ("events", c.events.to_string()),
        (
            "hosts lost",
            format!("{} failed, {} cut off; {} came back", c.hosts_failed, c.hosts_cut_off, c.hosts_returned),
        ),
        ("evacuations", format!("{}, of which {} emptied the host", c.evacuations, c.evacuated)),
        ("containers", format!("{} added, {} removed", c.containers_added, c.containers_removed)),
        ("restarts", format!("{} after failures of hosts", c.restarts)),
        (
            "moves",
            format!(
                "{}: {} to evacuate, {} to make room, {} to balance; {} failed, {} steps dropped",
                c.moves, c.moves_to_evacuate, c.moves_to_make_room, c.moves_to_balance, c.moves_failed, c.steps_dropped
            ),
        ),
        ("moves per hour", format!("{} on average, {} at most", s.mean_moves_per_hour, s.most_moves_per_hour)),
        ("growth", format!("{} granted, {} refused", c.grown, c.growth_refused)),
        ("longest down", human::millis(s.longest_down_ms as f64)),
        ("longest wait", format!("{} for room or volumes", human::millis(s.longest_wait_ms as f64))),
        ("flaps", c.flaps.to_string()),
        ("at the end", format!("{} doubled that no move would part, {} wait", s.doubled_at_end, s.waiting_at_end)),
        ("promises", "kept: rules on every host after every event, never two, never none too long, settled".to_owned()),
        ("fingerprint", format!("{:016x}", s.fingerprint)),
    ]
}
