//! From configuration to a running controller, and to its end.

mod kept;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::tls::{ClientCertificate, TlsError, server_config};
use godwit_store::{OpenError, Store};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::core::{Core, Waiting};
use crate::http::{Api, Sessions, SocketError, UnixSocket, serve_tls, serve_unix};
use crate::links::Links;
use crate::moves::Moves;
use crate::reconcile;
use crate::state::{State, StateError};
use kept::Kept;

/// How long streams, links and requests under way may take to end, in milliseconds.
const STOP_TIMEOUT_MS: u64 = 5_000;

pub struct ControllerConfig {
    /// The store, keys and the join token; made if it is not there.
    pub state_dir: PathBuf,
    /// Where people on this machine reach the API.
    pub api_socket: PathBuf,
    /// Host and port of the TLS listener, for agents and for people elsewhere.
    pub listen: String,
    /// Whether what a lost host had is started elsewhere; without it leases have no end.
    pub recovery: bool,
    /// Gets the TLS listener's address once the API answers.
    pub started: Option<oneshot::Sender<SocketAddr>>,
    /// Ends the controller as SIGTERM does.
    pub stop: CancellationToken,
}

impl ControllerConfig {
    pub fn new(state_dir: impl Into<PathBuf>, api_socket: impl Into<PathBuf>, listen: impl Into<String>) -> Self {
        Self {
            state_dir: state_dir.into(),
            api_socket: api_socket.into(),
            listen: listen.into(),
            recovery: true,
            started: None,
            stop: CancellationToken::new(),
        }
    }
}

#[derive(Debug, Error)]
pub enum RunError {
    #[error("the state directory {} could not be made", path.display())]
    StateDir { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error("the state could not be opened")]
    State(#[source] StateError),
    #[error("keys or certificates failed")]
    Tls(#[from] TlsError),
    #[error("the join token {} could not be read", path.display())]
    TokenFile { path: PathBuf, source: io::Error },
    #[error("the join token {} is not one; remove the file, then the next start makes a new one", path.display())]
    TokenFormat { path: PathBuf, source: serde_json::Error },
    #[error("a join token could not be made: the system gives no random numbers")]
    Random,
    #[error("agents cannot be listened for at {address}; is another controller running there?")]
    Listen { address: String, source: io::Error },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("signals cannot be handled")]
    Signals(#[source] io::Error),
    #[error("the state cannot be followed any more; everything acknowledged is kept: start again")]
    Follow(#[source] StateError),
    #[error("{what} ended unexpectedly; this is a defect of this program: start again")]
    Died { what: &'static str, source: Option<JoinError> },
}

/// Runs until SIGTERM, SIGINT or [`ControllerConfig::stop`]; hosts and containers go on when it returns.
pub async fn run(config: ControllerConfig) -> Result<(), RunError> {
    let ControllerConfig { state_dir, api_socket, listen, recovery, started, stop } = config;
    let mut term = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut int = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let opening = tokio::task::spawn_blocking(move || Kept::open(&state_dir)).await;
    let Kept { store, authority, join_token, identity } =
        opening.map_err(|source| RunError::Died { what: "opening the state directory", source: Some(source) })??;
    let tls = Arc::new(server_config(&identity, ClientCertificate::Optional)?);
    let store: Arc<dyn Store> = Arc::new(store);
    let (state, follower) = State::open(Arc::clone(&store)).await.map_err(RunError::State)?;
    let core = Arc::new(Core {
        state,
        links: Links::new(),
        moves: Moves::new(),
        waiting: Waiting::default(),
        leases: crate::leases::Leases::new(recovery),
        stranded: Waiting::default(),
        evacuations: crate::reconcile::evacuate::Evacuations::default(),
        rooms: crate::reconcile::room::Rooms::default(),
        loads: crate::loads::Loads::default(),
        balancing: crate::reconcile::balance::Balancing::default(),
        placing: tokio::sync::Mutex::default(),
        sessions: Sessions::default(),
        authority,
        join_token,
    });
    let api = Api { core: Arc::clone(&core), stop: stop.child_token(), tasks: TaskTracker::new() };
    // Whatever fails from here on, nothing is left running.
    let _stop_others = api.stop.clone().drop_guard();
    // Later than the others: requests under way wait until the snapshot shows what they changed.
    let stop_follower = CancellationToken::new();
    let _stop_follower = stop_follower.clone().drop_guard();
    let mut follower = tokio::spawn(follower.run(stop_follower.clone()));

    let no_listener = |source| RunError::Listen { address: listen.clone(), source };
    let listener = godwit_api::listen::listen(&listen).await.map_err(no_listener)?;
    let address = listener.local_addr().map_err(no_listener)?;
    api.tasks.spawn(serve_tls(api.clone(), listener, tls));
    let (listener, unpublished) = UnixSocket::bind(&api_socket).await?;
    api.tasks.spawn(serve_unix(api.clone(), listener));
    let mut reconciling = tokio::spawn(reconcile::run(Arc::clone(&core), api.stop.clone()));
    let socket = unpublished.publish()?;
    tracing::info!(%address, socket = %api_socket.display(), "the controller answers");
    if let Some(started) = started {
        // Whoever wanted to know may have gone.
        let _ = started.send(address);
    }

    let ended = tokio::select! {
        // A stop that was asked for also ends the tasks below: it is looked at first.
        biased;
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
        () = stop.cancelled() => Ok(()),
        ended = &mut follower => Err(match ended {
            Ok(Err(error)) => RunError::Follow(error),
            Ok(Ok(())) => RunError::Died { what: "following the state", source: None },
            Err(source) => RunError::Died { what: "following the state", source: Some(source) },
        }),
        ended = &mut reconciling => Err(RunError::Died { what: "reconciling", source: ended.err() }),
    };
    tracing::info!("the controller ends; hosts and containers go on");
    socket.remove();
    api.stop.cancel();
    api.tasks.close();
    if timeout(Duration::from_millis(STOP_TIMEOUT_MS), api.tasks.wait()).await.is_err() {
        tracing::warn!(left = api.tasks.len(), "some connections did not end within {STOP_TIMEOUT_MS} ms");
    }
    if !reconciling.is_finished() {
        let _ = timeout(Duration::from_millis(STOP_TIMEOUT_MS), reconciling).await;
    }
    stop_follower.cancel();
    if !follower.is_finished() {
        let _ = timeout(Duration::from_millis(STOP_TIMEOUT_MS), follower).await;
    }
    drop((api, core));
    // The last owner finishes what is queued and gives the lock back; a saga under way may still be one.
    let _ = tokio::task::spawn_blocking(move || drop(store)).await;
    ended
}
