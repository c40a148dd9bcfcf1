//! Connections: accepted, identified, served one by one. None holds up another.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use godwit_api::tls::peer_name;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::{Api, Peer, router};

/// Connections of one listener that have not become WebSockets. More wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1_024;
/// A TLS handshake, in milliseconds.
const HANDSHAKE_TIMEOUT_MS: u64 = 5_000;
/// A request's head, also the wait for the next one, in milliseconds.
const HEAD_TIMEOUT_MS: u64 = 30_000;
/// A request's head, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// How long answers under way may take when the controller ends, in milliseconds.
const FINISH_TIMEOUT_MS: u64 = 2_000;
/// The pause after a failed accept, in milliseconds: the usual cause is too many open files.
const ACCEPT_PAUSE_MS: u64 = 100;
/// A silent peer is asked whether it lives after this time, then this often, so many times.
const KEEPALIVE_IDLE_S: u64 = 15;
const KEEPALIVE_INTERVAL_S: u64 = 5;
const KEEPALIVE_PROBES: u32 = 3;

/// People on this machine, until the controller ends.
pub async fn serve_unix(api: Api, listener: UnixListener) {
    let router = router(api.clone());
    accept_all(
        &api,
        || listener.accept(),
        |(stream, _), permit| {
            let (router, stop) = (router.clone(), api.stop.clone());
            async move {
                let _permit = permit;
                serve(router, stream, Peer::Local, stop).await;
            }
        },
    )
    .await;
}

/// Agents and people elsewhere, until the controller ends.
pub async fn serve_tls(api: Api, listener: TcpListener, tls: Arc<rustls::ServerConfig>) {
    let router = router(api.clone());
    let acceptor = TlsAcceptor::from(tls);
    accept_all(
        &api,
        || listener.accept(),
        |(stream, address), permit| {
            let (router, stop, acceptor) = (router.clone(), api.stop.clone(), acceptor.clone());
            async move {
                let _permit = permit;
                if let Err(error) = serve_one_tls(router, acceptor, stream, stop).await {
                    tracing::debug!(%address, error, "a connection was refused");
                }
            }
        },
    )
    .await;
}

async fn accept_all<T, A, W>(api: &Api, accept: impl Fn() -> A, serve: impl Fn(T, OwnedSemaphorePermit) -> W)
where
    A: Future<Output = io::Result<T>>,
    W: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            // Never closed.
            let permit = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((accept().await?, permit))
        };
        let accepted = tokio::select! {
            () = api.stop.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, permit)) => drop(api.tasks.spawn(serve(stream, permit))),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

async fn serve_one_tls(
    router: Router,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    stop: CancellationToken,
) -> Result<(), String> {
    keep_alive(&stream).map_err(|e| e.to_string())?;
    let limit = Duration::from_millis(HANDSHAKE_TIMEOUT_MS);
    let stream = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        accepted = timeout(limit, acceptor.accept(stream)) => match accepted {
            Ok(stream) => stream.map_err(|e| e.to_string())?,
            Err(_) => return Err(format!("no TLS handshake within {HANDSHAKE_TIMEOUT_MS} ms")),
        },
    };
    // rustls has verified the chain; here it is only read.
    let name = match stream.get_ref().1.peer_certificates() {
        Some(chain) => Some(peer_name(chain).map_err(|e| e.to_string())?),
        None => None,
    };
    serve(router, stream, Peer::Tls(name), stop).await;
    Ok(())
}

/// A host that has lost its power says nothing; without this its connections would stay for ever.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(KEEPALIVE_IDLE_S))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(KEEPALIVE_INTERVAL_S))?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}

/// The requests of one connection. When the controller ends, the one under way is finished.
async fn serve<S>(router: Router, stream: S, peer: Peer, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(HEAD_TIMEOUT_MS))
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            match timeout(Duration::from_millis(FINISH_TIMEOUT_MS), connection).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}
