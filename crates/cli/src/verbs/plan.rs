//! `godwit plan evacuate|fail|rebalance`: what would happen. Nothing changes.

use std::fmt::Display;

use anyhow::Result;
use clap::Subcommand;
use godwit_api::client::Client;
use godwit_api::types::EvacuateRequest;
use godwit_model::HostName;
use serde::Serialize;

use super::DONE;
use super::host::evacuate::HowArgs;
use crate::printer::Printer;

#[derive(Debug, Subcommand)]
pub enum PlanVerb {
    /// How everything would be moved off a host
    Evacuate {
        /// As `godwit host list` shows it
        host: HostName,
        #[command(flatten)]
        how: HowArgs,
    },
    /// What would start where, and what would not, if a host were lost now
    Fail {
        /// As `godwit host list` shows it
        host: HostName,
    },
    /// Which moves would spread and level containers better
    Rebalance,
}

pub async fn run(client: &Client, printer: &Printer, verb: PlanVerb) -> Result<u8> {
    match verb {
        PlanVerb::Evacuate { host, how } => {
            let request = EvacuateRequest { options: how.into(), dry_run: true };
            show(printer, &client.evacuate(&host, &request).await?.plan)
        }
        PlanVerb::Fail { host } => show(printer, &client.plan_fail(&host).await?),
        PlanVerb::Rebalance => show(printer, &client.plan_rebalance().await?),
    }
}

/// The plan itself as JSON, or every word of it.
fn show(printer: &Printer, plan: &(impl Serialize + Display)) -> Result<u8> {
    printer.value(plan, |plan| plan.to_string().trim_end().to_owned())?;
    Ok(DONE)
}
