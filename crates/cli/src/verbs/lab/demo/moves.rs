//! One move, from the request to its end.

use std::time::Duration;

use anyhow::Result;
use godwit_api::client::Client;
use godwit_api::types::MigrateRequest;
use godwit_model::migration::{Move, Outcome};
use godwit_model::{ContainerName, HostName};

use super::within;
use crate::failure::Failure;
use crate::human;

/// Two gigabytes of files and one of memory take seconds; a loaded machine's disk takes its time.
const MOVE_LIMIT: Duration = Duration::from_secs(240);

/// A move that succeeded.
pub struct Done {
    pub record: Move,
    /// When it was asked for, in milliseconds since the epoch, by the clock that clients use too.
    pub began_ms: u64,
}

/// Moves a container and waits until its source is free.
pub async fn to(client: &Client, name: &ContainerName, to: &HostName) -> Result<Done> {
    let began_ms = human::now_ms();
    let what = format!("the move of {name} to {to}");
    let record = within(MOVE_LIMIT, &what, async {
        let begun = client.migrate(name, &MigrateRequest { to: Some(to.clone()) }).await?;
        follow(client, begun).await
    })
    .await?;
    match &record.outcome {
        Outcome::Failed { phase, reason } => {
            Err(Failure::new(format!("{name} was not moved from {} to {to}: {phase}: {reason}", record.from)).into())
        }
        _ => Ok(Done { record, began_ms }),
    }
}

/// The move at its end. A controller that ends the stream early is asked again.
async fn follow(client: &Client, begun: Move) -> Result<Move> {
    let mut latest = begun;
    while !latest.outcome.over() {
        let mut lines = client.watch_move(&latest.id).await?;
        while let Some(next) = lines.next().await {
            latest = next?;
        }
    }
    Ok(latest)
}
