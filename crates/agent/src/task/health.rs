//! Health checks: a command run inside the container at an interval, judged after a number of failures in a row.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use godwit_container::LaunchSpec;
use godwit_container::keeper::protocol::ExecSpec;
use godwit_model::container::{Health, HealthCheck};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::Shared;
use crate::keeper::Keeper;

/// Output of a check that is kept for the message, in bytes.
const MAX_OUTPUT_BYTES: usize = 256;
/// After its end, what it said last arrives within this time, in milliseconds.
const LAST_OUTPUT_MS: u64 = 100;
/// A killed check has ended within this time, in milliseconds.
const KILL_TIMEOUT_MS: u64 = 5_000;
/// While a container starts, checks come at least this often, in milliseconds: others may wait for it.
const EAGER_MS: u64 = 1_000;

/// Ends with its value.
pub struct HealthLoop {
    results: mpsc::Receiver<(Health, String)>,
    worker: JoinHandle<()>,
}

impl Drop for HealthLoop {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

impl HealthLoop {
    pub fn start(check: HealthCheck, keeper: Keeper, shared: Arc<Shared>) -> Self {
        let (sender, results) = mpsc::channel(1);
        Self { results, worker: tokio::spawn(watch(check, keeper, shared, sender)) }
    }

    /// The next judgement; never without a check.
    pub async fn next(this: &mut Option<Self>) -> (Health, String) {
        match this {
            Some(this) => match this.results.recv().await {
                Some(result) => result,
                None => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    }
}

async fn watch(check: HealthCheck, keeper: Keeper, shared: Arc<Shared>, results: mpsc::Sender<(Health, String)>) {
    let begun = Instant::now();
    let mut failures = 0;
    let mut healthy = false;
    loop {
        let pause = if healthy { check.interval_ms } else { check.interval_ms.min(EAGER_MS) };
        sleep(Duration::from_millis(pause)).await;
        let judged = match once(&check, &keeper, &shared).await {
            Ok(()) => {
                failures = 0;
                healthy = true;
                Some((Health::Healthy, "healthy".to_owned()))
            }
            // A container that stands still for a move is not ill.
            Err(None) => None,
            Err(Some(why)) => {
                let starting = !healthy && begun.elapsed() < Duration::from_millis(check.start_period_ms);
                failures += u32::from(!starting);
                (failures >= check.retries.max(1)).then(|| (Health::Unhealthy, format!("unhealthy: {why}")))
            }
        };
        if let Some(judged) = judged
            && results.send(judged).await.is_err()
        {
            return;
        }
    }
}

/// One check; the error is what it said, or nothing where it could not be run or had to make way for a move.
async fn once(check: &HealthCheck, keeper: &Keeper, shared: &Shared) -> Result<(), Option<String>> {
    let mut probe = shared.gate.probe().ok_or(None)?;
    let launch = LaunchSpec::load(&shared.dir).map_err(|_| None)?;
    let spec = ExecSpec { argv: check.argv.clone(), env: launch.env, cwd: launch.cwd, user: launch.user, tty: None };
    let command = keeper.exec(spec).await.map_err(|_| None)?;
    let (fds, mut ended) = (command.fds, command.ended);
    let limit = Duration::from_millis(check.timeout_ms);
    let whole = timeout(limit, async {
        let mut reading = std::pin::pin!(read_output(fds));
        let mut said = None;
        let exit = loop {
            tokio::select! {
                text = &mut reading, if said.is_none() => said = Some(text),
                exit = &mut ended => break exit,
            }
        };
        // What the check has left running may hold its output open; it has ended all the same.
        let said = match said {
            Some(said) => said,
            None => timeout(Duration::from_millis(LAST_OUTPUT_MS), reading).await.unwrap_or_default(),
        };
        (exit, said)
    });
    let result = tokio::select! {
        result = whole => result.map_err(|_| Some(format!("no answer within {} ms", check.timeout_ms))),
        () = probe.called_off() => Err(None),
    };
    match result {
        Ok((Ok(exit), _)) if exit.code == Some(0) => Ok(()),
        Ok((Ok(exit), said)) => {
            let code = exit.code.unwrap_or_else(|| 128 + exit.signal.unwrap_or(0));
            Err(Some(format!("exit code {code}: {}", said.trim())))
        }
        Ok((Err(_), _)) => Err(None),
        Err(why) => {
            let _ = keeper.signal_exec(command.exec_id, nix::libc::SIGKILL).await;
            let _ = timeout(Duration::from_millis(KILL_TIMEOUT_MS), ended).await;
            Err(why)
        }
    }
}

/// Standard output and error to their ends, the first bytes kept. Standard input is closed at once.
async fn read_output(fds: Vec<OwnedFd>) -> String {
    let mut text = Vec::new();
    for fd in fds.into_iter().skip(1) {
        let Ok(pipe) = pipe::Receiver::from_owned_fd(fd) else { continue };
        let mut buffer = [0; 4096];
        loop {
            if pipe.readable().await.is_err() {
                break;
            }
            match pipe.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    let room = MAX_OUTPUT_BYTES.saturating_sub(text.len());
                    text.extend_from_slice(&buffer[..n.min(room)]);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}
