//! `godwit logs`.

use anyhow::Result;
use clap::Args;
use godwit_api::client::Client;

use super::DONE;
use crate::printer::Printer;
use crate::{human, names};

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// For example shop/db-1, or shop/db where there is only one
    container: String,
    /// Go on with what comes, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "N")]
    tail: Option<u32>,
    /// Begin each line with its time
    #[arg(short, long)]
    timestamps: bool,
}

pub async fn run(client: &Client, printer: &Printer, args: LogsArgs) -> Result<u8> {
    let name = names::container(client, &args.container).await?;
    let mut lines = client.logs(&name, args.tail, args.follow).await?;
    while let Some(line) = printer.while_read(lines.next()).await {
        let line = line?;
        if printer.is_json() {
            printer.json_line(&line)?;
        } else if args.timestamps {
            printer.data(format_args!("{} {}", human::date_time(line.at_ms), line.text))?;
        } else {
            printer.data(&line.text)?;
        }
    }
    Ok(DONE)
}
