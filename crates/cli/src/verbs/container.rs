//! `godwit stop|start|rm`.

use anyhow::Result;
use clap::Args;
use godwit_api::client::Client;
use godwit_api::types::ContainerView;

use super::DONE;
use super::env::confirm;
use crate::names;
use crate::printer::Printer;

#[derive(Debug, Args)]
pub struct OneContainer {
    /// For example shop/db-1, or shop/db where there is only one
    container: String,
}

#[derive(Debug, Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    one: OneContainer,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub async fn stop(client: &Client, printer: &Printer, args: OneContainer) -> Result<u8> {
    let name = names::container(client, &args.container).await?;
    let view = client.stop(&name).await?;
    told(printer, &view, "stops")
}

pub async fn start(client: &Client, printer: &Printer, args: OneContainer) -> Result<u8> {
    let name = names::container(client, &args.container).await?;
    let view = client.start(&name).await?;
    told(printer, &view, "starts")
}

pub async fn remove(client: &Client, printer: &Printer, args: RemoveArgs) -> Result<u8> {
    let name = names::container(client, &args.one.container).await?;
    confirm(args.yes, &format!("remove {name} with its files and volumes"))?;
    let view = client.remove_container(&name).await?;
    told(printer, &view, "goes away")
}

/// Without JSON there is no data to print: the sentence is talk.
fn told(printer: &Printer, view: &ContainerView, does: &str) -> Result<u8> {
    if printer.is_json() {
        printer.json(view)?;
    } else {
        printer.say(format_args!("{} {does}", view.name));
    }
    Ok(DONE)
}
