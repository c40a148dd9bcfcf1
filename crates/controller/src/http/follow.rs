//! Streams of what changes: one move, and everything that happens.

use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use godwit_api::types::ErrorBody;
use godwit_model::MoveId;
use godwit_model::migration::Move;
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};

use super::Api;
use super::error::ApiError;
use super::extract::{MovePath, Params};
use super::lines::{self, End, Lines};
use crate::core::Core;

/// The shortest time between two lines about one move, in milliseconds; the last one does not wait.
const MOVE_PAUSE_MS: u64 = 100;

pub async fn watch_move(State(api): State<Api>, MovePath(id): MovePath) -> Result<Response, ApiError> {
    if !api.core.state.world().moves.contains_key(&id) {
        return Err(ApiError::no_move(&id));
    }
    let core = api.core.clone();
    Ok(lines::answer(&api, |out| async move { tell_move(&core, &id, &out).await }))
}

async fn tell_move(core: &Core, id: &MoveId, out: &Lines) -> Result<(), End> {
    let mut world = core.state.follow();
    let mut progress = core.moves.follow();
    let mut told: Option<Move> = None;
    let mut not_before = Instant::now();
    loop {
        let snapshot = world.borrow_and_update().clone();
        progress.mark_unchanged();
        // Forgotten: it was over long ago.
        let Some(now) = core.moves.view(&snapshot, id) else { return Ok(()) };
        let over = now.outcome.over();
        let is_new = told.as_ref() != Some(&now);
        let early = Instant::now() < not_before;
        if over || (is_new && !early) {
            out.value(&now).await?;
            if over {
                return Ok(());
            }
            not_before = Instant::now() + Duration::from_millis(MOVE_PAUSE_MS);
            told = Some(now);
        }
        tokio::select! {
            changed = world.changed() => changed.map_err(|_| ending())?,
            changed = progress.changed() => changed.map_err(|_| ending())?,
            () = sleep_until(not_before), if is_new && early => {}
        }
    }
}

#[derive(Deserialize)]
pub struct EventsParams {
    /// Only events with a number above it.
    #[serde(default)]
    since: u64,
    #[serde(default)]
    follow: bool,
}

pub async fn events(State(api): State<Api>, Params(EventsParams { since, follow }): Params<EventsParams>) -> Response {
    let mut world = api.core.state.follow();
    lines::answer(&api, |out| async move {
        let mut told = since;
        loop {
            let snapshot = world.borrow_and_update().clone();
            let first = snapshot.events.partition_point(|(_, event)| event.number <= told);
            for (_, event) in snapshot.events.range(first..) {
                out.value(&**event).await?;
                told = event.number;
            }
            if !follow {
                return Ok(());
            }
            world.changed().await.map_err(|_| ending())?;
        }
    })
}

fn ending() -> End {
    End::Failed(ErrorBody::new("the controller ends; ask again"))
}
