//! A program in a container, with its input and output passed between a person and the host.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket};
use axum::response::Response;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use godwit_api::link::SessionBody;
use godwit_api::session::{ExecControl, ExecRequest, MAX_MESSAGE_BYTES};
use godwit_api::types::ErrorBody;
use godwit_model::ContainerName;
use tokio::time::timeout;

use super::Api;
use super::error::ApiError;
use super::extract::{ContainerPath, Upgrade};
use super::sessions;

/// How long a client may take to say what to run, in milliseconds.
const START_TIMEOUT_MS: u64 = 10_000;
/// How long it may take to tell a client why its session ends, in milliseconds.
const TELL_TIMEOUT_MS: u64 = 1_000;

pub async fn exec(
    State(api): State<Api>,
    ContainerPath(name): ContainerPath,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, ApiError> {
    // What can be refused now is refused with a status, before there is a WebSocket.
    sessions::check_running(&api.core, &name)?;
    let task = api.tasks.token();
    let upgrade = upgrade.max_message_size(MAX_MESSAGE_BYTES).max_frame_size(MAX_MESSAGE_BYTES);
    Ok(upgrade.on_upgrade(move |mut person| async move {
        let _task = task;
        let end = tokio::select! {
            end = run(&api, &name, &mut person) => end,
            () = api.stop.cancelled() => Err("the controller ends".to_owned()),
        };
        if let Err(message) = end {
            tell(&mut person, &ExecControl::Error { message }).await;
        }
        sessions::close(person).await;
    }))
}

/// Until either side ends the session; an error is still to be told to the person.
async fn run(api: &Api, name: &ContainerName, person: &mut WebSocket) -> Result<(), String> {
    let request = start(person).await?;
    let opened = sessions::open(&api.core, name, |container| SessionBody::Exec { container, request }).await;
    let mut agent = opened.map_err(|error| ErrorBody::from_chain(&error).one_line())?;
    join(person, &mut agent.socket).await;
    sessions::close(agent.socket).await;
    Ok(())
}

/// The first message: what to run.
async fn start(person: &mut WebSocket) -> Result<ExecRequest, String> {
    let first = timeout(Duration::from_millis(START_TIMEOUT_MS), person.recv()).await;
    let Ok(Some(Ok(Message::Text(text)))) = first else {
        return Err("the client did not say what to run".to_owned());
    };
    match serde_json::from_str(text.as_str()) {
        Ok(ExecControl::Start { request }) if !request.argv.is_empty() => Ok(request),
        Ok(ExecControl::Start { .. }) => Err("there is nothing to run: the command is empty".to_owned()),
        Ok(_) => Err("the client's first message is not what to run".to_owned()),
        Err(error) => Err(format!("the client's first message cannot be read: {error}")),
    }
}

/// Passes messages both ways, one at a time each, so that a slow reader slows down its writer.
async fn join(person: &mut WebSocket, agent: &mut WebSocket) {
    let (to_person, from_person) = person.split();
    let (to_agent, from_agent) = agent.split();
    tokio::select! {
        () = pass(from_agent, to_person) => {}
        () = pass(from_person, to_agent) => {}
    }
}

async fn pass<E>(
    mut from: impl Stream<Item = Result<Message, E>> + Unpin,
    mut to: impl Sink<Message, Error = E> + Unpin,
) {
    while let Some(Ok(message)) = from.next().await {
        match message {
            Message::Text(_) | Message::Binary(_) => {
                if to.send(message).await.is_err() {
                    return;
                }
            }
            Message::Close(_) => return,
            // Answered by the connection they came from.
            Message::Ping(_) | Message::Pong(_) => {}
        }
    }
}

async fn tell(person: &mut WebSocket, control: &ExecControl) {
    if let Ok(text) = serde_json::to_string(control) {
        // A client that is gone needs no reason.
        let _ = timeout(Duration::from_millis(TELL_TIMEOUT_MS), person.send(Message::Text(text.into()))).await;
    }
}
