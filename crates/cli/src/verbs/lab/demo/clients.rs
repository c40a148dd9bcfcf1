//! Clients: processes on the lab's client node that say `connected`, work, and report in the end.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_lab::workload::Report;
use godwit_lab::{Lab, Node};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::within;
use crate::failure::Failure;

/// How long a client may take to be at work.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Most lines of a client's talk that are kept.
const MAX_LINES: usize = 200;
/// Longest report; a line for each tenth of a second is part of it.
const MAX_REPORT_BYTES: u64 = 16 << 20;

/// What a client saw from one moment to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    pub requests: u64,
    pub gap_ms: f64,
}

/// A client at work. Dropping it ends it.
pub struct Client {
    child: Child,
    what: String,
    talk: JoinHandle<Vec<String>>,
}

impl Client {
    /// Starts `argv` on the client node; returns once it has said a line that contains `sign`.
    pub async fn start(lab: &Lab, what: &str, argv: &[String], sign: &'static str) -> Result<Self> {
        let command = lab.exec(Node::Client, argv)?;
        let mut child = Command::from(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {what}"))?;
        let stderr = child.stderr.take().context("the client has no standard error")?;
        let (at_work, wait) = oneshot::channel();
        let mut talk = tokio::spawn(listen(stderr, sign, at_work));
        within(START_LIMIT, &format!("{what} to connect"), async {
            if wait.await.is_ok() {
                return Ok(());
            }
            let said = (&mut talk).await.unwrap_or_default().join(" | ");
            Err(Failure::new(format!("{what} ended: {said}")).into())
        })
        .await?;
        Ok(Self { child, what: what.to_owned(), talk })
    }

    /// The process id; `None` once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Closes its standard input and waits for its end: exit code 0, standard output, what it said.
    pub async fn end(mut self, limit: Duration) -> Result<Ended> {
        drop(self.child.stdin.take());
        let what = format!("the end of {}", self.what);
        within(limit, &what, async {
            let mut output = String::new();
            if let Some(stdout) = self.child.stdout.take() {
                stdout.take(MAX_REPORT_BYTES).read_to_string(&mut output).await?;
            }
            let success = self.child.wait().await?.success();
            Ok(Ended { success, output, talk: self.talk.await.unwrap_or_default() })
        })
        .await
    }

    /// As [`Client::end`], for clients that print a [`Report`].
    pub async fn report(self, limit: Duration) -> Result<Report> {
        let what = self.what.clone();
        let ended = self.end(limit).await?;
        serde_json::from_str(&ended.output)
            .with_context(|| format!("{what} did not report; it said: {}", ended.talk.join(" | ")))
    }
}

/// A client that has ended.
pub struct Ended {
    pub success: bool,
    pub output: String,
    pub talk: Vec<String>,
}

/// Reads what a client says to its end, so that it never waits for us.
async fn listen(stderr: ChildStderr, sign: &str, at_work: oneshot::Sender<()>) -> Vec<String> {
    let mut lines = BufReader::new(stderr).lines();
    let (mut kept, mut at_work) = (Vec::new(), Some(at_work));
    while let Ok(Some(line)) = lines.next_line().await {
        if line.contains(sign)
            && let Some(at_work) = at_work.take()
        {
            // Nobody waits any more once the client has failed to start in time.
            let _ = at_work.send(());
        }
        if kept.len() < MAX_LINES {
            kept.push(line);
        }
    }
    kept
}

/// Runs a client that ends by itself.
pub async fn run(lab: &Lab, what: &str, argv: &[String], limit: Duration) -> Result<Ended> {
    let mut command = Command::from(lab.exec(Node::Client, argv)?);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = within(limit, what, async { Ok(command.output().await?) }).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let talk = text(&output.stderr).lines().map(str::to_owned).collect();
    Ok(Ended { success: output.status.success(), output: text(&output.stdout), talk })
}

/// What a client that reports intervals saw from `from_ms` on and before `until_ms`.
pub fn seen(report: &Report, from_ms: u64, until_ms: u64) -> Seen {
    let within = report.intervals.iter().filter(|i| i.until_unix_ms > from_ms && i.until_unix_ms <= until_ms);
    within.fold(Seen { requests: 0, gap_ms: 0.0 }, |all, one| Seen {
        requests: all.requests + one.arrivals,
        gap_ms: all.gap_ms.max(one.client_gap_ms),
    })
}
