//! Tells how advice is carried out, until that is over.

use std::time::Duration;

use anyhow::Result;
use godwit_api::client::{Client, ClientError, Lines};
use godwit_api::types::BalanceAnswer;
use godwit_model::event::{Event, EventKind};
use tokio::time::Instant;

use crate::printer::Printer;

/// How long a controller may be away meanwhile, in milliseconds. It goes on without anyone watching.
const AWAY_TIMEOUT_MS: u64 = 60_000;
/// Time between two attempts to reach it again, in milliseconds.
const RETRY_INTERVAL_MS: u64 = 500;

pub async fn until_done(client: &Client, printer: &Printer, answer: &BalanceAnswer) -> Result<()> {
    let mut since = answer.since;
    let mut heard = Instant::now();
    loop {
        match client.events(Some(since), true).await {
            Ok(mut lines) => {
                if follow(&mut lines, printer, answer, &mut since).await {
                    return Ok(());
                }
                heard = Instant::now();
            }
            Err(error) if heard.elapsed() > Duration::from_millis(AWAY_TIMEOUT_MS) => return Err(error.into()),
            Err(_) => {}
        }
        // The event may have been forgotten while nobody listened.
        if client.balance().await.is_ok_and(|view| view.once.is_none()) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(RETRY_INTERVAL_MS)).await;
    }
}

/// Until the stream ends; whether all is done.
async fn follow(lines: &mut Lines<Event>, printer: &Printer, answer: &BalanceAnswer, since: &mut u64) -> bool {
    while let Some(Ok::<Event, ClientError>(event)) = lines.next().await {
        *since = event.number;
        let advised =
            |event: &Event| answer.advice.moves.iter().any(|a| Some(&a.step.container) == event.container.as_ref());
        match event.kind {
            EventKind::MoveDone | EventKind::MoveFailed if advised(&event) => printer.say(&event.message),
            EventKind::BalanceDone => {
                printer.say(&event.message);
                return true;
            }
            _ => {}
        }
    }
    false
}
