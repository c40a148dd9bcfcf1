//! What can go wrong between a client and the controller.

use std::io;

use http::StatusCode;

use super::address::Address;
use crate::types::ErrorBody;

/// A request that was not answered as wished. Each says who failed: nobody there, the controller's refusal, or a
/// conversation that broke.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody could be reached.
    #[error("cannot connect to the controller at {address}")]
    Connect {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// Connected, but no answer in time.
    #[error("the controller at {address} did not answer within {} s", after_ms / 1000)]
    Silent {
        /// Where.
        address: Address,
        /// How long was waited.
        after_ms: u64,
    },
    /// An `https` address without a certificate to show.
    #[error("{address} needs a client certificate")]
    NoCertificate {
        /// Where.
        address: Address,
    },
    /// The controller said no.
    #[error("{body}")]
    Api {
        /// HTTP status.
        status: StatusCode,
        /// Its sentence, causes and hint.
        body: ErrorBody,
    },
    /// The connection broke in the middle.
    #[error("the connection broke while reading {path}")]
    Broken {
        /// The route.
        path: String,
        /// Why: from hyper, or a limit that was passed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is not of the type that the route promises.
    #[error(
        "the answer to {path} ({status}) is not what this version of godwit expects; is the controller as new as this client?"
    )]
    NotJson {
        /// The route.
        path: String,
        /// HTTP status.
        status: StatusCode,
        /// Where in the text.
        source: serde_json::Error,
    },
    /// A value that does not become JSON.
    #[error("the request cannot be written as JSON")]
    Encode {
        /// Why.
        source: serde_json::Error,
    },
    /// Something else that the protocol does not allow.
    #[error("{what}")]
    Protocol {
        /// A sentence.
        what: String,
    },
}

impl ClientError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Connect { address: Address::Unix(_), source } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("the socket belongs to root; try again as root".to_owned())
            }
            Self::Connect { .. } | Self::Silent { .. } => Some(
                "is the controller running? `godwit lab list` shows labs on this machine; `--lab NAME` or \
                 `--controller ADDRESS` choose another controller"
                    .to_owned(),
            ),
            Self::NoCertificate { .. } => Some(
                "`--identity DIRECTORY` names where it is; the controller keeps one for people in its state directory"
                    .to_owned(),
            ),
            Self::Api { body, .. } => body.hint.clone(),
            Self::Broken { .. } | Self::NotJson { .. } | Self::Encode { .. } | Self::Protocol { .. } => None,
        }
    }

    /// Whether asking again may help: the controller is away or went away in the middle.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Silent { .. } | Self::Broken { .. } => true,
            Self::Api { status, .. } => *status == StatusCode::SERVICE_UNAVAILABLE,
            _ => false,
        }
    }
}
