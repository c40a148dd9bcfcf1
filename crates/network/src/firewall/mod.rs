//! The firewall: one table `godwit` in family `bridge` (what a container's port may send, what may cross the overlay)
//! and one in family `inet` (what reaches the host, other environments and the world; address translation).
//!
//! The rules are a pure function of [`Rules`] and replace the old ones in one kernel transaction: there is no instant
//! without rules, and known connections keep their translation.

mod render;

use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::NetworkError;
pub(crate) use render::{Rules, parking_mac};

/// How long one run of nft may take, in seconds. It takes milliseconds; on a machine with twenty busy threads to a core
/// it was seen to take more than ten seconds, nearly all of it in the kernel's clearing up after it, when the new rules
/// were in force already.
const NFT_TIMEOUT_S: u64 = 60;
/// Our tables, by family.
pub(crate) const TABLES: [&str; 2] = ["bridge godwit", "inet godwit"];

/// Replaces our tables by these rules, atomically.
pub(crate) async fn replace(text: &str) -> Result<(), NetworkError> {
    run("replace rules", &["-f", "-"], &format!("{}{text}", forget_text())).await.map(drop)
}

/// Removes our tables, if they are there.
pub(crate) async fn remove() -> Result<(), NetworkError> {
    run("remove rules", &["-f", "-"], &forget_text()).await.map(drop)
}

/// Our tables that exist now.
pub(crate) async fn tables() -> Result<Vec<String>, NetworkError> {
    let listing = run("list tables", &["list", "tables"], "").await?;
    let names = listing.lines().filter_map(|line| line.strip_prefix("table "));
    Ok(names.filter(|name| TABLES.contains(name)).map(str::to_owned).collect())
}

/// `add` before `delete`: deleting a table that is not there would fail the whole transaction.
fn forget_text() -> String {
    TABLES.iter().map(|table| format!("add table {table}\ndelete table {table}\n")).collect()
}

async fn run(action: &'static str, arguments: &[&str], input: &str) -> Result<String, NetworkError> {
    let limit = Duration::from_secs(NFT_TIMEOUT_S);
    let output = tokio::time::timeout(limit, spawn(arguments, input)).await;
    let output = output.map_err(|_| NetworkError::NftTimeout { action, seconds: NFT_TIMEOUT_S })?;
    let output = output.map_err(NetworkError::NftMissing)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetworkError::Nft { action, message })
}

async fn spawn(arguments: &[&str], input: &str) -> std::io::Result<Output> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // nft reads everything before it says anything, so this cannot block on its output.
        match stdin.write_all(input.as_bytes()).await {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    child.wait_with_output().await
}
