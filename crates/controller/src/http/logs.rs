//! What a container wrote, from its host.

use axum::extract::State;
use axum::extract::ws::Message;
use axum::response::Response;
use godwit_api::link::SessionBody;
use godwit_api::types::ErrorBody;
use serde::Deserialize;

use super::Api;
use super::error::ApiError;
use super::extract::{ContainerPath, Params};
use super::lines::{self, End};
use super::sessions;

#[derive(Deserialize)]
pub struct LogsParams {
    #[serde(default)]
    follow: bool,
    /// `None`: everything that is kept.
    tail: Option<u32>,
}

pub async fn logs(
    State(api): State<Api>,
    ContainerPath(name): ContainerPath,
    Params(LogsParams { follow, tail }): Params<LogsParams>,
) -> Result<Response, ApiError> {
    let body = |container| SessionBody::Logs { container, tail, follow };
    let mut agent = sessions::open(&api.core, &name, body).await?;
    // The agent's side ends with this future: when the log does, or its reader.
    Ok(lines::answer(&api, |out| async move {
        loop {
            match agent.socket.recv().await {
                Some(Ok(Message::Text(text))) => out.text(text.as_str()).await?,
                Some(Ok(Message::Close(_))) => return Ok(()),
                Some(Ok(_)) => {}
                None | Some(Err(_)) => {
                    let text = format!("the log of {name} broke off: its host or the connection to it went away");
                    return Err(End::Failed(ErrorBody::new(text)));
                }
            }
        }
    }))
}
