//! What is seen from inside a container.

use std::time::Duration;

use anyhow::Result;
use godwit_api::client::{Client, ExecOutput};
use godwit_api::session::ExecRequest;
use godwit_model::ContainerName;

use super::within;
use crate::failure::Failure;

/// Longest wait for a command that only looks.
const LOOK_LIMIT: Duration = Duration::from_secs(30);
/// Most that a command may say, in bytes.
const MAX_OUTPUT_BYTES: usize = 4 << 20;

/// Runs a shell command and returns its standard output; it must succeed.
pub async fn shell(client: &Client, name: &ContainerName, command: &str, limit: Duration) -> Result<String> {
    let request = ExecRequest {
        argv: ["sh", "-ec", command].map(str::to_owned).into(),
        environment: Vec::new(),
        working_dir: None,
        user: None,
        terminal: None,
    };
    within(limit, &format!("{command:?} in {name}"), output(client, name, request)).await
}

async fn output(client: &Client, name: &ContainerName, request: ExecRequest) -> Result<String> {
    let (mut sender, mut receiver) = client.exec(name, request).await?;
    sender.close_stdin().await?;
    let (mut out, mut talk) = (Vec::new(), Vec::new());
    let code = loop {
        match receiver.next().await? {
            Some(ExecOutput::Stdout(bytes)) => out.extend_from_slice(&bytes),
            Some(ExecOutput::Stderr(bytes)) => talk.extend_from_slice(&bytes),
            Some(ExecOutput::Exit(code)) => break code,
            None => return Err(Failure::new("the session ended without an exit code").into()),
        }
        if out.len() + talk.len() > MAX_OUTPUT_BYTES {
            return Err(Failure::new(format!("more than {MAX_OUTPUT_BYTES} bytes of output")).into());
        }
    };
    if code == 0 {
        return Ok(String::from_utf8_lossy(&out).into_owned());
    }
    Err(Failure::new(format!("exit code {code}: {}", String::from_utf8_lossy(&talk).trim())).into())
}

/// What would differ if the program had been started again: what `own` prints, and where the kernel put its first
/// process in memory, which is another place at each start. (Not the numbers of its file: they are the host's.)
pub async fn identity(client: &Client, name: &ContainerName, own: &str) -> Result<String> {
    shell(client, name, &format!("{own}; head -n 1 /proc/1/maps | cut -d ' ' -f 1"), LOOK_LIMIT).await
}

/// Resident memory of all processes, what they share counted once.
pub async fn resident_bytes(client: &Client, name: &ContainerName) -> Result<u64> {
    // A process may end while it is looked at, as the shell's own helpers do.
    let text = shell(client, name, "cat /proc/[0-9]*/status 2>/dev/null || true", LOOK_LIMIT).await?;
    Ok(sum_resident(&text))
}

fn sum_resident(status: &str) -> u64 {
    let kib = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let own: u64 = status.lines().filter_map(|line| kib(line, "RssAnon:")).sum();
    let shared: u64 = status.lines().filter_map(|line| kib(line, "RssShmem:")).max().unwrap_or(0);
    (own + shared) << 10
}

/// Length of all files below a directory.
pub async fn file_bytes(client: &Client, name: &ContainerName, directory: &str) -> Result<u64> {
    let text = shell(client, name, &format!("du -sb {directory}"), LOOK_LIMIT).await?;
    let number = text.split_whitespace().next().and_then(|number| number.parse().ok());
    number.ok_or_else(|| Failure::new(format!("du says {text:?} of {directory} in {name}")).into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_counted_once() {
        let one = "Name:\tpostgres\nVmRSS:\t 9 kB\nRssAnon:\t     100 kB\nRssFile:\t 50 kB\nRssShmem:\t     70 kB\n";
        let two = "Name:\tpostgres\nRssAnon:\t       4 kB\nRssShmem:\t     80 kB\n";
        assert_eq!(sum_resident(&format!("{one}{two}")), 184 << 10);
        assert_eq!(sum_resident("Name: kthread\n"), 0);
    }
}
