//! `godwit env apply|list|show|delete`.

mod apply;

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Subcommand;
use godwit_api::client::Client;
use godwit_api::types::EnvironmentView;
use godwit_model::EnvName;

use super::{DONE, ps};
use crate::failure::Failure;
use crate::printer::Printer;
use crate::table::{pairs, table};

#[derive(Debug, Subcommand)]
pub enum EnvVerb {
    /// Make an environment what a Compose file says
    Apply(apply::ApplyArgs),
    /// List environments
    #[command(visible_alias = "ls")]
    List,
    /// Show an environment with its layers and containers
    Show {
        /// As `godwit env list` shows it
        env: EnvName,
    },
    /// Remove an environment with its containers, their files and volumes
    Delete {
        /// As `godwit env list` shows it
        env: EnvName,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

pub async fn run(client: &Client, printer: &Printer, verb: EnvVerb) -> Result<u8> {
    match verb {
        EnvVerb::Apply(args) => return apply::run(client, printer, args).await,
        EnvVerb::List => {
            let all = client.environments().await?;
            printer.value(&all, |all| list(printer, all))?;
            if all.is_empty() {
                printer.say("no environments; `godwit env apply -f FILE` makes one");
            }
        }
        EnvVerb::Show { env } => printer.value(&client.environment(&env).await?, |view| show(printer, view))?,
        EnvVerb::Delete { env, yes } => {
            confirm(yes, &format!("delete {env} with its containers, their files and volumes"))?;
            let answer = client.delete_environment(&env).await?;
            printer.changes(&answer)?;
        }
    }
    Ok(DONE)
}

/// Asks the person on the terminal; without one, `--yes` is needed.
pub fn confirm(yes: bool, what: &str) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::new(format!("nobody is here to be asked whether to {what}"))
            .hint("`--yes` says so")
            .into());
    }
    write!(io::stderr(), "{what}? [y/N] ").context("cannot ask")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::new("not done").into()),
    }
}

fn list(printer: &Printer, all: &[EnvironmentView]) -> String {
    let head = ["ENVIRONMENT", "LAYERS", "CONTAINERS", "RUNNING", "NETWORK"];
    let rows = all.iter().map(|env| {
        let running: u32 = env.layers.iter().map(|layer| layer.running).sum();
        let wanted: u32 = env.layers.iter().map(|layer| layer.wanted).sum();
        vec![
            env.name.to_string(),
            env.layers.len().to_string(),
            env.containers.len().to_string(),
            format!("{running}/{wanted}"),
            env.subnet.clone(),
        ]
    });
    table(printer, &head, rows)
}

fn show(printer: &Printer, env: &EnvironmentView) -> String {
    let facts = [("environment", env.name.to_string()), ("network", format!("{} (VXLAN {})", env.subnet, env.vni))];
    let layers = env.layers.iter().map(|layer| {
        vec![
            layer.name.to_string(),
            format!("{}/{}", layer.running, layer.wanted),
            layer.image.clone(),
            layer.ports.join(", "),
        ]
    });
    [
        pairs(printer, facts),
        table(printer, &["LAYER", "RUNNING", "IMAGE", "PORTS"], layers),
        ps::list(printer, &env.containers),
    ]
    .join("\n\n")
}

impl Printer {
    /// What changed, a line each; that nothing did is talk.
    fn changes(&self, answer: &godwit_api::types::ApplyAnswer) -> Result<()> {
        if self.is_json() {
            return self.json(answer);
        }
        for change in &answer.changes {
            self.data(change)?;
        }
        for place in &answer.places {
            let reasons = place.reasons.join("; ");
            match &place.host {
                Some(host) => self.data(format_args!("{} would go to {host}: {reasons}", place.container))?,
                None => self.data(format_args!("{} would wait: {reasons}", place.container))?,
            }
        }
        for warning in &answer.warnings {
            self.labelled("warning", warning);
        }
        if answer.changes.is_empty() {
            self.say("nothing to change");
        }
        Ok(())
    }
}
