//! `godwit events`.

use anyhow::Result;
use clap::Args;
use godwit_api::client::Client;
use godwit_model::event::Event;

use super::DONE;
use crate::human;
use crate::printer::Printer;

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with what comes, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only events with a number above this one
    #[arg(long, value_name = "NUMBER")]
    since: Option<u64>,
}

pub async fn run(client: &Client, printer: &Printer, args: EventsArgs) -> Result<u8> {
    let mut events = client.events(args.since, args.follow).await?;
    while let Some(event) = printer.while_read(events.next()).await {
        let event = event?;
        if printer.is_json() { printer.json_line(&event)? } else { printer.data(line(&event))? }
    }
    Ok(DONE)
}

/// A stream has no table: lines come before their widths are known.
pub fn line(event: &Event) -> String {
    let about = match (&event.container, &event.env, &event.host) {
        (Some(container), _, _) => container.to_string(),
        (None, Some(env), _) => env.to_string(),
        (None, None, Some(host)) => host.to_string(),
        (None, None, None) => human::NOTHING.to_owned(),
    };
    format!("{}  {:<18}  {about:<12}  {}", human::date_time(event.at_ms), event.kind.as_str(), event.message)
}
