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

/// How long something may keep a container from being moved. A command that we ran in it keeps it until its agent has
/// told of the command's end.
const MOVABLE_LIMIT: Duration = Duration::from_secs(20);
/// How often that is looked at: it is a state of the agent, not an event.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A move that succeeded.
pub struct Done {
    pub record: Move,
    /// When it was asked for, in milliseconds since the epoch, by the clock that clients use too.
    pub began_ms: u64,
}

/// Moves a container and waits until its source is free.
pub async fn to(client: &Client, name: &ContainerName, to: &HostName) -> Result<Done> {
    let mut because = Vec::new();
    let movable = within(MOVABLE_LIMIT, &format!("{name} to be movable"), movable(client, name, &mut because)).await;
    movable.map_err(|error| error.context(format!("{name} cannot be moved: {}", because.join("; "))))?;
    let began_ms = human::now_ms();
    let what = format!("the move of {name} to {to}");
    let record = within(MOVE_LIMIT, &what, async {
        let begun = client.migrate(name, &MigrateRequest { to: Some(to.clone()), ..Default::default() }).await?;
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

async fn movable(client: &Client, name: &ContainerName, because: &mut Vec<String>) -> Result<()> {
    loop {
        if let Some(status) = client.container(name).await?.status {
            *because = status.movable.because;
            if because.is_empty() {
                return Ok(());
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
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
