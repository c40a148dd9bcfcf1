//! From configuration to a running agent.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use godwit_api::listen::listen;
use godwit_api::tls::{self, ClientCertificate};
use godwit_api::types::ErrorBody;
use godwit_criu::Criu;
use godwit_image::{ImageStore, OpenError};
use godwit_memory::MappingFlags;
use godwit_network::{HostNetwork, HostNetworkConfig, NetworkError};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::config::AgentConfig;
use crate::expedite::Expedite;
use crate::host::{Host, supervise};
use crate::join::JoinError;
use crate::lease::{Lease, LeaseError};
use crate::ledger::Ledger;
use crate::{join, lease, link, moves, task, witness};

#[derive(Debug, Error)]
pub enum RunError {
    #[error("the agent must run as root: it makes namespaces, mounts and cgroups")]
    NotRoot,
    #[error("{} could not be made", path.display())]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("this host could not become a member")]
    Join(#[from] JoinError),
    #[error("keys or certificates failed")]
    Tls(#[from] tls::TlsError),
    #[error("the image store could not be opened")]
    Images(#[from] OpenError),
    #[error("the host's network could not be taken over")]
    Network(#[from] NetworkError),
    #[error("moves cannot be received at {address}; is another agent running there?")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("the lease of this host could not be read")]
    Lease(#[from] LeaseError),
    #[error("signals cannot be handled")]
    Signals(#[source] std::io::Error),
}

/// Runs until SIGTERM or SIGINT. Containers go on when it returns.
pub async fn run(config: AgentConfig) -> Result<(), RunError> {
    if !rustix::process::geteuid().is_root() {
        return Err(RunError::NotRoot);
    }
    godwit_memory::bound_heap();
    for path in [
        config.state_dir.clone(),
        config.run_dir.clone(),
        config.containers_dir(),
        config.volumes_dir(),
        config.moves_dir(),
    ] {
        std::fs::create_dir_all(&path).map_err(|source| RunError::Directory { path: path.clone(), source })?;
    }
    let criu = match Criu::find() {
        Ok(criu) => Some(criu),
        Err(error) => {
            tracing::warn!(%error, "containers of this host cannot move");
            None
        }
    };
    let identity = join::identity(&config).await?;
    let listener = listen(config.migration_address())
        .await
        .map_err(|source| RunError::Listen { address: config.migration_address(), source })?;
    let images_dir = config.state_dir.join("images");
    let images = tokio::task::spawn_blocking(move || ImageStore::open(&images_dir))
        .await
        .map_err(|e| RunError::Directory { path: config.state_dir.clone(), source: e.into() })??;
    let network = HostNetwork::open(HostNetworkConfig {
        tunnel_address: config.tunnel_address,
        uplink: config.uplink.clone(),
        resolvers: resolvers(),
    })
    .await?;
    let (voice, line) = link::voice();
    let ledger = Ledger::open(&config.state_dir);
    let last = ledger.load().ok().flatten().map(Arc::new);
    let mut server_tls = tls::server_config(&identity, ClientCertificate::Required)?;
    server_tls.alpn_protocols = vec![witness::ALPN.to_vec()];
    let mut witness_tls = tls::client_config(&identity)?;
    witness_tls.alpn_protocols = vec![witness::ALPN.to_vec()];
    let host = Arc::new(Host {
        client_tls: Arc::new(tls::client_config(&identity)?),
        witness_tls: Arc::new(witness_tls),
        server_tls: Arc::new(server_tls),
        lease: Lease::open(&config.state_dir, &config.run_dir)?,
        certificate_sha256: identity.certificate_sha256()?,
        criu,
        mapping_flags: tokio::task::spawn_blocking(mapping_flags).await.ok().flatten(),
        voice,
        network: tokio::sync::Mutex::new(network),
        images,
        tasks: Mutex::new(BTreeMap::new()),
        incoming: Mutex::new(BTreeMap::new()),
        redirects: Mutex::new(BTreeMap::new()),
        redirected: Mutex::new(BTreeMap::new()),
        controller_address: Mutex::new(None),
        desired: watch::Sender::new(None),
        applied_revision: Mutex::new(0),
        expedite: Arc::new(Expedite::new(&config.state_dir)),
        changed: Notify::new(),
        task_gone: Notify::new(),
        preparing: tokio::sync::Mutex::default(),
        config,
    });
    if let Some(criu) = host.criu.clone() {
        tokio::task::spawn_blocking(move || criu.look_at_kernel());
    }
    // What lived before this agent did, before anything is decided about it.
    task::adopt_all(&host, last.as_deref()).await;
    let arriving: Vec<_> = crate::host::locked(&host.incoming).keys().cloned().collect();
    moves::dump::WorkDirs::sweep(&host, &arriving);
    host.desired.send_replace(last);
    tokio::spawn(supervise(Arc::clone(&host), ledger));
    tokio::spawn(lease::watch(Arc::clone(&host)));
    tokio::spawn(moves::listen(Arc::clone(&host), listener));
    tokio::spawn(link::run(Arc::clone(&host), line));
    let mut term = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut int = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("the agent ends; containers go on");
    Ok(())
}

/// Without them everything works, and a move's downtime grows by some 15 ms per GiB.
fn mapping_flags() -> Option<MappingFlags> {
    let learnt = MappingFlags::learn();
    learnt.inspect_err(|e| tracing::info!(because = ErrorBody::from_chain(e).one_line(), "CRIU will read smaps")).ok()
}

/// Name servers of this host, from resolv.conf(5), for names that are no container's.
fn resolvers() -> Vec<std::net::SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let address = |l: &str| l.strip_prefix("nameserver ")?.trim().parse::<std::net::IpAddr>().ok();
    text.lines().filter_map(address).map(|ip| (ip, 53).into()).collect()
}
