//! Errors of every operation as HTTP answers: a status and an `ErrorBody`.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use godwit_api::types::ErrorBody;
use godwit_model::{ContainerName, EnvName, HostName, MoveId};
use godwit_store::{CommitError, StoreFault};

use super::sessions::SessionError;
use crate::apply::ApplyError;
use crate::balance::BalanceError;
use crate::containers::ContainerError;
use crate::hosts::HostError;
use crate::links::AskError;
use crate::moves::MoveError;
use crate::plans::ExplainError;
use crate::state::StateError;

/// A refusal, or a failure of ours, as it is sent.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

impl ApiError {
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, body: ErrorBody::new(error) }
    }

    /// `error` with everything below it. What is our own fault is also logged: who asks cannot mend it.
    pub fn from_chain(status: StatusCode, error: &(dyn std::error::Error + 'static)) -> Self {
        let body = ErrorBody::from_chain(error);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(error = body.one_line(), "a request failed");
        }
        Self { status, body }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body = self.body.with_hint(hint);
        self
    }

    fn causes(mut self, causes: Vec<String>) -> Self {
        self.body.causes = causes;
        self
    }

    pub fn no_environment(name: &EnvName) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no environment {name}")).hint("`godwit env list` shows all")
    }

    pub fn no_host(name: &HostName) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no host {name}")).hint("`godwit host list` shows all")
    }

    pub fn no_container(name: &ContainerName) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no container {name}")).hint("`godwit ps` shows all")
    }

    pub fn no_move(id: &MoveId) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no move {id}")).hint("`godwit move list` shows all")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> Self {
        let status = match &error {
            StateError::TooManyHosts => StatusCode::CONFLICT,
            StateError::Contended => StatusCode::SERVICE_UNAVAILABLE,
            StateError::Commit(CommitError::Fault(StoreFault::Full { .. })) => StatusCode::INSUFFICIENT_STORAGE,
            StateError::Commit(
                CommitError::ValueTooLong { .. } | CommitError::TooManyOps { .. } | CommitError::TooManyBytes { .. },
            ) => StatusCode::UNPROCESSABLE_ENTITY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::from_chain(status, &error)
    }
}

impl From<ApplyError> for ApiError {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::State(error) => error.into(),
            ApplyError::NoSuchEnvironment { name } => Self::no_environment(&name),
            error @ ApplyError::TooFewHosts { .. } => Self::from_chain(StatusCode::CONFLICT, &error)
                .hint("add hosts first (`godwit host list` shows those there are), or loosen the rule"),
            ApplyError::PortTaken { .. } | ApplyError::Exhausted { .. } => {
                Self::from_chain(StatusCode::CONFLICT, &error)
            }
            error => Self::from_chain(StatusCode::UNPROCESSABLE_ENTITY, &error),
        }
    }
}

impl From<ContainerError> for ApiError {
    fn from(error: ContainerError) -> Self {
        match error {
            ContainerError::NoSuchContainer { name } => Self::no_container(&name),
            ContainerError::State(error) => error.into(),
        }
    }
}

impl From<ExplainError> for ApiError {
    fn from(error: ExplainError) -> Self {
        match error {
            ExplainError::NoSuchContainer { name } => Self::no_container(&name),
            error @ ExplainError::Fleet(_) => Self::from_chain(StatusCode::INTERNAL_SERVER_ERROR, &error),
        }
    }
}

impl From<HostError> for ApiError {
    fn from(error: HostError) -> Self {
        match error {
            HostError::State(error) => error.into(),
            error @ HostError::NoSuchHost { .. } => Self::from_chain(StatusCode::NOT_FOUND, &error),
            error @ HostError::Connected { .. } => Self::from_chain(StatusCode::CONFLICT, &error)
                .hint("to empty a host that is alive: godwit host evacuate"),
            error @ HostError::Lost { .. } => Self::from_chain(StatusCode::CONFLICT, &error)
                .hint("it takes containers again by itself as soon as its agent is back"),
            error @ HostError::ToItself { .. } => Self::from_chain(StatusCode::UNPROCESSABLE_ENTITY, &error),
            error @ HostError::Plan(_) => Self::from_chain(StatusCode::INTERNAL_SERVER_ERROR, &error),
        }
    }
}

impl From<BalanceError> for ApiError {
    fn from(error: BalanceError) -> Self {
        match error {
            BalanceError::State(error) => error.into(),
            error @ BalanceError::OutOfRange { .. } => Self::from_chain(StatusCode::UNPROCESSABLE_ENTITY, &error),
            error @ BalanceError::Waits { .. } => Self::from_chain(StatusCode::CONFLICT, &error),
        }
    }
}

impl From<MoveError> for ApiError {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::NoSuchContainer { name } => Self::no_container(&name),
            MoveError::NoSuchMove { id } => Self::no_move(&id),
            MoveError::Refused { name, because } => {
                Self::new(StatusCode::CONFLICT, format!("{name} cannot be moved")).causes(because)
            }
            MoveError::State(error) => error.into(),
            error @ MoveError::Busy { .. } => {
                Self::from_chain(StatusCode::CONFLICT, &error).hint("`godwit move list` shows it")
            }
            error @ MoveError::Fleet(_) => Self::from_chain(StatusCode::INTERNAL_SERVER_ERROR, &error),
            error @ MoveError::TooLate { .. } => Self::from_chain(StatusCode::CONFLICT, &error),
        }
    }
}

impl From<AskError> for ApiError {
    fn from(error: AskError) -> Self {
        let status = match error {
            AskError::Refused { .. } => StatusCode::CONFLICT,
            AskError::Silent { .. } => StatusCode::GATEWAY_TIMEOUT,
            AskError::NotConnected { .. } | AskError::Gone { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::from_chain(status, &error)
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Ask(error) => error.into(),
            SessionError::NoSuchContainer { name } => Self::no_container(&name),
            SessionError::NotRunning { .. } | SessionError::NoHost { .. } => {
                Self::from_chain(StatusCode::CONFLICT, &error)
            }
            SessionError::TooMany => Self::from_chain(StatusCode::SERVICE_UNAVAILABLE, &error),
            SessionError::NotDialled { .. } => Self::from_chain(StatusCode::GATEWAY_TIMEOUT, &error),
        }
    }
}
