//! `godwit env apply`: reads the file, sends it, and waits if asked to.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use godwit_api::client::Client;
use godwit_api::types::{ApplyRequest, ContainerView, EnvironmentView};
use godwit_model::EnvName;
use godwit_model::container::Health;
use godwit_model::manifest::{self, Manifest};
use tokio::time::Instant;

use super::DONE;
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;

/// The largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// How often `--wait` asks, in milliseconds: health and state are numbers of the agents, not events.
const WAIT_INTERVAL_MS: u64 = 300;

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The Compose file; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Say what would change, change nothing
    #[arg(long)]
    dry_run: bool,
    /// The environment's name, instead of the file's `name` or its directory's
    #[arg(long, value_name = "ENV")]
    name: Option<EnvName>,
    /// What ${NAME} in the file stands for, before this process's own variables
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = variable)]
    vars: Vec<(String, String)>,
    /// Return when every container runs, and is healthy where that is checked
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// How long to wait, for example 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = human::parse_duration, requires = "wait")]
    timeout: Duration,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

pub async fn run(client: &Client, printer: &Printer, args: ApplyArgs) -> Result<u8> {
    let manifest = read(&args)?;
    let name = manifest.name.clone();
    let answer = client.apply(&ApplyRequest { manifest, dry_run: args.dry_run }).await?;
    printer.changes(&answer)?;
    if args.wait {
        wait(client, printer, &name, args.timeout).await?;
    }
    Ok(DONE)
}

fn read(args: &ApplyArgs) -> Result<Manifest> {
    let from_stdin = args.file == Path::new("-");
    let shown = if from_stdin { "<stdin>".to_owned() } else { args.file.display().to_string() };
    let text = read_text(&args.file, from_stdin).with_context(|| format!("cannot read {shown}"))?;
    // Variables that are no UTF-8 cannot be part of a text file.
    let mut vars: BTreeMap<String, String> =
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
    vars.extend(args.vars.iter().cloned());
    let default = args.name.as_ref().map(ToString::to_string).or_else(|| directory_name(&args.file, from_stdin));
    let mut manifest = manifest::parse(&shown, &text, default.as_deref(), &vars)?;
    if let Some(name) = &args.name {
        manifest.name = name.clone();
    }
    Ok(manifest)
}

fn read_text(path: &Path, from_stdin: bool) -> Result<String> {
    let mut text = String::new();
    if from_stdin {
        std::io::stdin().take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    }
    if text.len() as u64 > MAX_FILE_BYTES {
        anyhow::bail!("it is longer than {} MiB", MAX_FILE_BYTES >> 20);
    }
    Ok(text)
}

/// As Compose does: a file without a name is called after its directory. The characters a name cannot have become
/// `-`.
fn directory_name(file: &Path, from_stdin: bool) -> Option<String> {
    if from_stdin {
        return None;
    }
    let path = std::fs::canonicalize(file).ok()?;
    let name = path.parent()?.file_name()?.to_string_lossy().to_lowercase();
    let clean: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let clean = clean.trim_matches('-');
    (!clean.is_empty()).then(|| clean.to_owned())
}

async fn wait(client: &Client, printer: &Printer, name: &EnvName, timeout: Duration) -> Result<()> {
    let started = Instant::now();
    let mut told = None;
    loop {
        let env = client.environment(name).await?;
        let waiting = not_ready(&env);
        let wanted: u32 = env.layers.iter().map(|layer| layer.wanted).sum();
        let ready = env.containers.len().saturating_sub(waiting.len());
        // Containers that are not made yet are missing, not ready.
        if waiting.is_empty() && env.containers.len() >= wanted as usize {
            printer.say(format_args!("{name} runs: {}", human::count(ready, "container")));
            return Ok(());
        }
        if started.elapsed() >= timeout {
            let message = format!("{name} does not run after {}: {ready} of {wanted} are ready", human::span(timeout));
            return Err(Failure::new(message).hint(waiting.join("; ")).into());
        }
        if told != Some(ready) {
            told = Some(ready);
            printer.say(format_args!("{name}: {ready} of {} ready", human::count(wanted as usize, "container")));
        }
        tokio::time::sleep(Duration::from_millis(WAIT_INTERVAL_MS)).await;
    }
}

/// A sentence for each container that is not what is wanted of it.
fn not_ready(env: &EnvironmentView) -> Vec<String> {
    let ready = |c: &ContainerView| {
        let runs = c.state == "running" && matches!(c.health, None | Some(Health::Healthy));
        c.growth.is_none() && (!c.wanted_running || runs)
    };
    let sentence = |c: &ContainerView| match c.message.clone().or_else(|| super::ps::growth(c)) {
        Some(message) => format!("{} is {}: {message}", c.name, super::ps::state(c)),
        None => format!("{} is {}", c.name, super::ps::state(c)),
    };
    env.containers.iter().filter(|c| !ready(c)).map(sentence).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_gives_the_name() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("_My Shop.2");
        std::fs::create_dir(&directory).unwrap();
        let file = directory.join("compose.yaml");
        std::fs::write(&file, "").unwrap();
        assert_eq!(directory_name(&file, false).as_deref(), Some("my-shop-2"));
        assert_eq!(directory_name(&file, true), None);
    }
}
