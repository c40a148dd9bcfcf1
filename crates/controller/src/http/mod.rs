//! The API: one router for people and agents, on a unix socket and over TLS.
//!
//! ```text
//!  unix socket (root's) ──▶ Peer::Local ─┐
//!                                        ├─▶ router ─▶ people's routes: Local, or the admin's certificate
//!  TLS (certificate if any) ▶ Peer::Tls ─┘        └──▶ agents' routes: a host's certificate; joining: the token
//! ```
//! Handlers translate: they take a request apart, call what decides, and show the outcome ([`views`]).

mod agents;
mod error;
mod exec;
mod extract;
mod follow;
mod lines;
mod logs;
mod people;
mod serve;
mod sessions;
mod socket;
mod views;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use godwit_api::routes;
use godwit_api::tls::PeerName;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use serve::{serve_tls, serve_unix};
pub use sessions::Sessions;
pub use socket::{SocketError, UnixSocket};

use crate::core::Core;
use error::ApiError;

/// The largest body of a request, in bytes: room for the largest value of the store.
const MAX_BODY_BYTES: usize = 2 * godwit_store::MAX_VALUE_BYTES;

/// What every handler holds.
#[derive(Clone)]
pub struct Api {
    pub core: Arc<Core>,
    /// The controller ends: streams shall, too.
    pub stop: CancellationToken,
    /// Everything that outlives its request: streams, links, sessions.
    pub tasks: TaskTracker,
}

/// Who sent a request; an extension of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Over the unix socket, whose file only its owner can open.
    Local,
    /// Over TLS, with the name in its certificate if it showed one.
    Tls(Option<PeerName>),
}

pub fn router(api: Api) -> Router {
    people()
        .route_layer(from_fn(people_only))
        .merge(agents())
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(api)
}

fn people() -> Router<Api> {
    let container = format!("{}/{{env}}/{{local}}", routes::CONTAINERS);
    let one_move = format!("{}/{{id}}", routes::MOVES);
    Router::new()
        .route(routes::VERSION, get(people::version))
        .route(routes::HOSTS, get(people::list_hosts))
        .route(&format!("{}/{{host}}/evacuate", routes::HOSTS), post(people::evacuate))
        .route(&format!("{}/{{host}}/cordon", routes::HOSTS), post(people::cordon))
        .route(&format!("{}/{{host}}/declare-dead", routes::HOSTS), post(people::declare_dead))
        .route(&format!("{}/{{host}}/activate", routes::HOSTS), post(people::activate))
        .route(routes::BALANCE, get(people::balance).put(people::change_balance))
        .route(routes::BALANCE_NOW, post(people::balance_now))
        .route(routes::ENVIRONMENTS, get(people::environments))
        .route(
            &format!("{}/{{env}}", routes::ENVIRONMENTS),
            get(people::environment).put(people::apply).delete(people::delete_environment),
        )
        .route(routes::CONTAINERS, get(people::containers))
        .route(&container, get(people::container).delete(people::remove_container))
        .route(&format!("{container}/stop"), post(people::stop))
        .route(&format!("{container}/start"), post(people::start))
        .route(&format!("{container}/placement"), get(people::placement))
        .route(&format!("{container}/plan-move"), post(people::plan_move))
        .route(&format!("{container}/migrate"), post(people::migrate))
        .route(&format!("{container}/logs"), get(logs::logs))
        .route(&format!("{container}/exec"), get(exec::exec))
        .route(&format!("{}/{{host}}", routes::PLAN_FAIL), get(people::plan_fail))
        .route(routes::PLAN_REBALANCE, get(people::plan_rebalance))
        .route(routes::MOVES, get(people::moves))
        .route(&one_move, get(people::one_move))
        .route(&format!("{one_move}/watch"), get(follow::watch_move))
        .route(&format!("{one_move}/cancel"), post(people::cancel_move))
        .route(routes::EVENTS, get(follow::events))
}

fn agents() -> Router<Api> {
    Router::new()
        .route(routes::AGENT_JOIN, post(agents::join))
        .route(routes::AGENT_LINK, get(agents::link))
        .route(&format!("{}/{{id}}", routes::AGENT_SESSIONS), get(agents::session))
}

async fn people_only(request: Request, next: Next) -> Response {
    let refused = match request.extensions().get::<Peer>() {
        Some(Peer::Local | Peer::Tls(Some(PeerName::Admin))) => return next.run(request).await,
        Some(Peer::Tls(None)) => ApiError::new(StatusCode::UNAUTHORIZED, "this route needs the admin's certificate")
            .hint("the controller keeps it as `admin` in its state directory"),
        Some(Peer::Tls(Some(PeerName::Host(host)))) => {
            let text = format!("this route is for people; the certificate names the host {host}");
            ApiError::new(StatusCode::FORBIDDEN, text)
        }
        Some(Peer::Tls(Some(PeerName::Controller))) | None => {
            ApiError::new(StatusCode::FORBIDDEN, "this route is for people")
        }
    };
    refused.into_response()
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no route {}", uri.path()))
        .hint("is the controller as new as this client? `godwit version` shows both")
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
}
