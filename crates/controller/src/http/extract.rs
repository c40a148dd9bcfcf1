//! What handlers take from a request. A refusal is an [`ApiError`], so that every answer has the API's form.

use std::str::FromStr;
use std::time::Duration;

use axum::Json;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use godwit_api::tls::PeerName;
use godwit_model::{ContainerName, EnvName, HostName, MoveId, NameError};
use serde::de::DeserializeOwned;

use super::Peer;
use super::error::ApiError;

/// How long a body may take to arrive, in milliseconds.
const BODY_TIMEOUT_MS: u64 = 10_000;

/// `{env}`.
pub struct EnvPath(pub EnvName);
/// `{env}/{local}`.
pub struct ContainerPath(pub ContainerName);
/// `{host}`.
pub struct HostPath(pub HostName);
/// `{id}` of a move.
pub struct MovePath(pub MoveId);
/// What follows the question mark.
pub struct Params<T>(pub T);
/// A JSON body.
pub struct Body<T>(pub T);
/// A request to become a WebSocket.
pub struct Upgrade(pub WebSocketUpgrade);
/// The host that the peer's certificate names.
pub struct AgentHost(pub HostName);

async fn path<T: DeserializeOwned + Send, S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<T, ApiError> {
    let path = Path::<T>::from_request_parts(parts, state).await;
    path.map(|Path(value)| value).map_err(|e| ApiError::new(e.status(), e.body_text()))
}

fn named<T: FromStr<Err = NameError>>(text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|error: NameError| ApiError::new(StatusCode::BAD_REQUEST, error.to_string()))
}

impl<S: Send + Sync> FromRequestParts<S> for EnvPath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        named(&path::<String, S>(parts, state).await?).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for HostPath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        named(&path::<String, S>(parts, state).await?).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ContainerPath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let (env, local) = path::<(String, String), S>(parts, state).await?;
        named(&format!("{env}/{local}")).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for MovePath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        named(&path::<String, S>(parts, state).await?).map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(value)| Self(value)).map_err(|e| ApiError::new(e.status(), e.body_text()))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let limit = Duration::from_millis(BODY_TIMEOUT_MS);
        match tokio::time::timeout(limit, Json::<T>::from_request(request, state)).await {
            Ok(Ok(Json(value))) => Ok(Self(value)),
            Ok(Err(e)) => Err(ApiError::new(e.status(), e.body_text())),
            Err(_) => {
                let text = format!("the request's body did not arrive within {} s", BODY_TIMEOUT_MS / 1000);
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, text))
            }
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let upgrade = WebSocketUpgrade::from_request_parts(parts, state).await;
        upgrade.map(Self).map_err(|e| ApiError::new(e.status(), e.body_text()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for AgentHost {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match parts.extensions.get::<Peer>() {
            Some(Peer::Tls(Some(PeerName::Host(host)))) => Ok(Self(host.clone())),
            Some(Peer::Tls(None)) => {
                let error = ApiError::new(StatusCode::UNAUTHORIZED, "this route needs a host's certificate");
                Err(error.hint("join first: a host gets its certificate for the join token"))
            }
            _ => Err(ApiError::new(StatusCode::FORBIDDEN, "this route is for the agents of hosts only")),
        }
    }
}
