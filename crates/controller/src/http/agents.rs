//! The agents' routes: joining, the link, sessions.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::{Extension, Json};
use godwit_api::tls::TlsError;
use godwit_api::types::{JoinAnswer, JoinRequest};
use godwit_api::{link, session as session_messages};

use super::error::ApiError;
use super::extract::{AgentHost, Body, Upgrade};
use super::{Api, Peer};
use crate::links;

/// Makes whoever knows the token a member.
pub async fn join(
    State(api): State<Api>,
    Extension(peer): Extension<Peer>,
    Body(request): Body<JoinRequest>,
) -> Result<Json<JoinAnswer>, ApiError> {
    if peer == Peer::Local {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "hosts join over TLS, not over the unix socket"));
    }
    if !equal(request.token.as_bytes(), api.core.join_token.as_bytes()) {
        tracing::warn!(host = %request.name, "a host with a wrong token was refused");
        return Err(ApiError::new(StatusCode::FORBIDDEN, "the join token is wrong")
            .hint("the controller keeps it as `join-token` in its state directory"));
    }
    // Two machines of one name would take the link from each other for ever.
    if api.core.links.connected(&request.name) {
        let text = format!("a host with the name {} is connected", request.name);
        return Err(ApiError::new(StatusCode::CONFLICT, text).hint("choose another --name, or stop that host's agent"));
    }
    let signed = api.core.authority.sign_csr(&request.csr_pem, &request.name);
    let certificate_pem = signed.map_err(|error| match &error {
        TlsError::Request { .. } => ApiError::from_chain(StatusCode::BAD_REQUEST, &error),
        _ => ApiError::from_chain(StatusCode::INTERNAL_SERVER_ERROR, &error),
    })?;
    tracing::info!(host = %request.name, "a host joined");
    Ok(Json(JoinAnswer { certificate_pem, ca_pem: api.core.authority.ca_pem().to_owned() }))
}

/// An agent's link, for as long as it lives.
pub async fn link(State(api): State<Api>, AgentHost(host): AgentHost, Upgrade(upgrade): Upgrade) -> Response {
    let task = api.tasks.token();
    let upgrade = upgrade.max_message_size(link::MAX_MESSAGE_BYTES).max_frame_size(link::MAX_MESSAGE_BYTES);
    upgrade.on_upgrade(move |socket| async move {
        let _task = task;
        tokio::select! {
            () = links::serve(api.core, host, socket) => {}
            () = api.stop.cancelled() => {}
        }
    })
}

/// The host's side of a session that it was asked to open.
pub async fn session(
    State(api): State<Api>,
    AgentHost(host): AgentHost,
    Path(id): Path<String>,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, ApiError> {
    let claimed = api.core.sessions.claim(&id, &host);
    let claimed = claimed.ok_or_else(|| {
        let text = format!("no session is expected of {host} under this id; it may be too late");
        ApiError::new(StatusCode::NOT_FOUND, text)
    })?;
    let upgrade = upgrade
        .max_message_size(session_messages::MAX_MESSAGE_BYTES)
        .max_frame_size(session_messages::MAX_MESSAGE_BYTES);
    Ok(upgrade.on_upgrade(move |socket| async move {
        // Whoever waited may have left: then the connection ends here.
        let _ = claimed.send(socket);
    }))
}

/// Takes as long for a wrong token as for the right one.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let differs = a.iter().zip(b).fold(0, |differs, (a, b)| std::hint::black_box(differs | (a ^ b)));
    a.len() == b.len() && differs == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_equal_or_not() {
        assert!(equal(b"abc", b"abc"));
        for other in [&b"abd"[..], b"ab", b"abcd", b""] {
            assert!(!equal(b"abc", other));
        }
    }
}
