//! pgbench as a client: its command line, its log of transactions, its last words.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_lab::{Lab, Node};
use rustix::process::{Pid, Signal, kill_process};

use super::clients::{Client, Ended, Seen};
use super::stage::{ENTRANCE, Stage};
use crate::failure::Failure;

/// Far more than the moves take: pgbench is told when they are over.
const LONGEST_SECONDS: u32 = 3_600;
const END_LIMIT: Duration = Duration::from_secs(60);
const CLIENTS: u32 = 4;
/// Largest log that is read, in bytes: a line has about 40.
const MAX_LOG_BYTES: u64 = 256 << 20;

/// pgbench at work.
pub struct Bench {
    client: Client,
    log: PathBuf,
}

/// What pgbench did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Of all clients, in the order of the log: when each ended, and how long its client had waited for it since the
    /// one before, both in microseconds.
    transactions: Vec<(u64, u64)>,
    /// Transactions that failed, clients that gave up.
    pub errors: u64,
    pub processed: u64,
    pub messages: Vec<String>,
}

pub fn arguments(stage: &Stage, added: &[&str]) -> Vec<String> {
    let address = ENTRANCE.address().to_string();
    let program = stage.pgbench.to_string_lossy();
    let fixed = [&*program, "-h", &*address, "-p", "5432", "-U", "postgres"];
    fixed.into_iter().chain(added.iter().copied()).chain(["shop"]).map(str::to_owned).collect()
}

impl Bench {
    /// Returns once transactions were counted.
    pub async fn start(lab: &Lab, stage: &Stage) -> Result<Self> {
        let prefix = lab.paths().host_state(Node::Client).join("pgbench");
        let prefix_text = prefix.to_string_lossy().into_owned();
        let (clients, seconds) = (CLIENTS.to_string(), LONGEST_SECONDS.to_string());
        let mut added = vec!["-n", "-c", &clients, "-j", "1", "-T", &seconds, "-P", "1"];
        added.extend(["--log", "--log-prefix", &prefix_text]);
        let client = Client::start(lab, "pgbench", &arguments(stage, &added), "progress:").await?;
        let pid = client.pid().context("pgbench has ended")?;
        Ok(Self { client, log: format!("{prefix_text}.{pid}").into() })
    }

    /// Tells pgbench that its time is over, which is when it finishes its transactions and says what it did.
    pub async fn end(self) -> Result<Outcome> {
        // The signal of its own clock. It has one thread, so it has one log.
        if let Some(pid) = self.client.pid().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            kill_process(pid, Signal::ALARM).context("cannot tell pgbench to end")?;
        }
        let ended = self.client.end(END_LIMIT).await?;
        Outcome::read(&ended, &read_log(&self.log)?)
    }
}

fn read_log(path: &Path) -> Result<String> {
    let bytes = std::fs::metadata(path).map_or(0, |file| file.len());
    if bytes > MAX_LOG_BYTES {
        return Err(Failure::new(format!("{} has {bytes} bytes, more than is read", path.display())).into());
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read pgbench's log {}", path.display()))
}

impl Outcome {
    /// Log lines: client, number, microseconds or `failed`, script, second and microsecond of the end.
    fn read(ended: &Ended, log: &str) -> Result<Self> {
        let mut outcome = Self::default();
        let mut last: BTreeMap<u32, u64> = BTreeMap::new();
        for line in log.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [client, _, duration, _, seconds, microseconds, ..] = fields.as_slice() else {
                return Err(Failure::new(format!("pgbench's log has the line {line:?}")).into());
            };
            let number =
                |text: &str| text.parse::<u64>().with_context(|| format!("pgbench's log has the line {line:?}"));
            let end = number(seconds)? * 1_000_000 + number(microseconds)?;
            let before = last.insert(number(client)? as u32, end);
            if *duration == "failed" {
                outcome.errors += 1;
            }
            outcome.transactions.push((end, before.map_or(0, |before| end.saturating_sub(before))));
        }
        let field = |name: &str| {
            let line = ended.output.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        outcome.processed = field("number of transactions actually processed:").unwrap_or(0);
        outcome.errors = outcome.errors.max(field("number of failed transactions:").unwrap_or(0));
        // What a client says that gives up; the others go on.
        outcome.messages = ended.talk.iter().filter(|line| !line.starts_with("progress:")).take(20).cloned().collect();
        outcome.errors += ended.talk.iter().filter(|line| line.contains("aborted")).count() as u64;
        if !ended.success && outcome.errors == 0 {
            outcome.errors = 1;
        }
        Ok(outcome)
    }

    /// What happened from `from_ms` on and before `until_ms`, in milliseconds since the epoch.
    pub fn seen(&self, from_ms: u64, until_ms: u64) -> Seen {
        let range = from_ms.saturating_mul(1_000)..until_ms.saturating_mul(1_000);
        let within = self.transactions.iter().filter(|(end, _)| range.contains(end));
        within.fold(Seen { requests: 0, gap_ms: 0.0 }, |all, (_, gap)| Seen {
            requests: all.requests + 1,
            gap_ms: all.gap_ms.max(*gap as f64 / 1_000.0),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_silence_of_one_connection_counts() {
        let log = "0 1 900 0 10 0\n1 1 900 0 10 500\n0 2 900 0 10 2000\n1 2 900 0 10 400500\n0 3 failed 0 11 0\n";
        let output = "number of transactions actually processed: 4\nnumber of failed transactions: 1 (20.000%)\n";
        let talk = vec!["progress: 1.0 s".to_owned(), "pgbench: error: client 1 aborted in command 4".to_owned()];
        let outcome = Outcome::read(&Ended { success: false, output: output.to_owned(), talk }, log).unwrap();
        assert_eq!((outcome.processed, outcome.errors, outcome.messages.len()), (4, 2, 1));
        assert_eq!(outcome.seen(10_000, 11_000), Seen { requests: 4, gap_ms: 400.0 });
        assert_eq!(outcome.seen(11_000, u64::MAX), Seen { requests: 1, gap_ms: 998.0 });
        assert_eq!(outcome.seen(12_000, u64::MAX).requests, 0);
    }
}
