//! Giving a container away: the agent's part of the source's side. Paused on success, resumed on failure.

mod leaving;
mod standstill;

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::link::FromAgent;
use godwit_api::tls;
use godwit_api::types::ErrorBody;
use godwit_container::Cgroup;
use godwit_container::keeper::protocol::Request;
use godwit_migrate::{SendError, send};
use godwit_model::container::ContainerSpec;
use godwit_model::migration::{MoveOptions, Phase};
use godwit_model::{HostName, MoveId};
use godwit_network::Mac;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use self::leaving::Leaving;
use self::standstill::Standstill;
use super::dump::WorkDirs;
use crate::expedite::Expedited;
use crate::host::{Host, locked};
use crate::task::{Closed, Live, Shared};

/// Connecting and handshake, in milliseconds.
const CONNECT_TIMEOUT_MS: u64 = 5_000;
/// What is gathered before it is encrypted, in bytes.
const WRITE_BUFFER_BYTES: usize = 256 << 10;
/// A cancelled sender has let go of the container within this time, in milliseconds.
const CANCEL_TIMEOUT_MS: u64 = 30_000;

/// What the controller said of the move.
#[derive(Debug, Clone)]
pub struct Plan {
    pub id: MoveId,
    pub to: HostName,
    pub address: SocketAddr,
    pub to_tunnel: Ipv4Addr,
    pub options: MoveOptions,
    /// What moves like this stood still for besides sending, in milliseconds; `None`: none has been seen.
    pub fixed_ms: Option<f64>,
    /// Revision of the store at which the move began.
    pub revision: u64,
}

/// A container on its way out, as its task holds it.
pub struct Outgoing {
    pub id: MoveId,
    worker: Option<JoinHandle<Result<(), ()>>>,
    /// Cutting the connection is how a sender is stopped: it then undoes what it did, as for any broken wire.
    connection: Arc<std::sync::Mutex<Option<OwnedFd>>>,
    held: Arc<std::sync::Mutex<Held>>,
}

/// What a container that stands still needs of its host, from around the freeze to the verdict.
#[derive(Default)]
struct Held {
    expedited: Option<Expedited>,
    /// Nobody runs commands in it.
    closed: Option<Closed>,
    /// The container has ended meanwhile, like this: the better reason for what fails then.
    ended: Option<&'static str>,
    /// The criu that dumps it.
    criu: Option<OwnedFd>,
    /// Some of its memory is still to be sent, by the store's word or before it.
    needed: bool,
}

impl Held {
    /// A dump begins, by the criu of this pidfd; not of a container that has ended.
    fn dumping(&mut self, criu: OwnedFd) -> Result<(), &'static str> {
        self.criu = Some(criu);
        self.ended.map_or(Ok(()), Err)
    }

    /// CRIU waits ten seconds for processes that do not come to a stop any more; nothing is left to dump.
    fn container_ended(&mut self, why: &'static str) {
        self.ended = Some(why);
        if let Some(criu) = self.criu.take() {
            // It may have ended by itself.
            let _ = pidfd_send_signal(criu, Signal::KILL);
        }
    }
}

impl Outgoing {
    /// Begins to send in the background.
    pub fn start(host: &Arc<Host>, plan: Plan, spec: &ContainerSpec, live: &Live, shared: Arc<Shared>) -> Self {
        let connection = Arc::new(std::sync::Mutex::new(None));
        let held = Arc::default();
        let id = plan.id.clone();
        let leaving = Leaving {
            host: Arc::clone(host),
            plan,
            spec: spec.clone(),
            cgroup: live.cgroup.clone(),
            standstill: Arc::new(Standstill::new(live.cgroup.clone())),
            pid: live.pid,
            shared,
            dirs: None,
            begun: None,
            unplugging: None,
            held: Arc::clone(&held),
            connection: Arc::clone(&connection),
            begun_at: Instant::now(),
            cpu_usec: live.cgroup.usage().map(|u| u.cpu_usec).unwrap_or_default(),
            usual_cpu: None,
        };
        let worker = tokio::spawn(run(leaving, Arc::clone(&connection)));
        Self { id, worker: Some(worker), connection, held }
    }

    /// A move whose sender died with an earlier agent; only the store's verdict is missing.
    pub fn orphan(id: MoveId) -> Self {
        Self { id, worker: None, connection: Arc::default(), held: Arc::default() }
    }

    /// The end of the sending part: given away, or failed and running on. Never, once it has been told.
    pub async fn ended(this: &mut Option<Self>) -> Result<(), ()> {
        match this.as_mut().and_then(|o| o.worker.as_mut()) {
            Some(worker) => {
                let result = worker.await;
                if let Some(outgoing) = this {
                    outgoing.worker = None;
                }
                result.unwrap_or(Err(()))
            }
            None => std::future::pending().await,
        }
    }

    /// Stops a sender that is still at work and waits until it has undone its part.
    pub async fn cancel(&mut self) {
        self.hang_up();
        if let Some(worker) = self.worker.take()
            && timeout(Duration::from_millis(CANCEL_TIMEOUT_MS), worker).await.is_err()
        {
            tracing::error!(id = %self.id, "a cancelled move has not let go of its container yet");
        }
    }

    /// The destination owns it: waits until it has what it still needs of it, however long that takes as long as
    /// something is sent; any other sender is stopped.
    pub async fn given(&mut self) {
        if !locked(&self.held).needed {
            return self.cancel().await;
        }
        if let Some(worker) = self.worker.take() {
            // It has logged what went wrong.
            let _ = worker.await;
        }
    }

    /// The container has ended here. `false`: not everything was given away, so the move has failed. `true`: the
    /// destination may have all of it, and only the store's word tells where it goes on.
    pub async fn container_ended(&mut self, why: &'static str) -> bool {
        locked(&self.held).container_ended(why);
        self.hang_up();
        let Some(worker) = self.worker.take() else { return true };
        match timeout(Duration::from_millis(CANCEL_TIMEOUT_MS), worker).await {
            Ok(Ok(Err(()))) => false,
            // A sender that died, or does not let go: nobody knows what it has sent.
            Ok(Err(_)) | Err(_) | Ok(Ok(Ok(()))) => true,
        }
    }

    fn hang_up(&self) {
        if let Some(fd) = locked(&self.connection).as_ref() {
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        }
    }
}

async fn run(mut leaving: Leaving, connection: Arc<std::sync::Mutex<Option<OwnedFd>>>) -> Result<(), ()> {
    let host = Arc::clone(&leaving.host);
    let id = leaving.plan.id.clone();
    let result = give(&mut leaving, &connection).await;
    // A criu that still waits for the freeze has the directory open in which it works.
    tokio::task::block_in_place(|| {
        leaving.begun = None;
        leaving.standstill.end();
    });
    if let Some(dirs) = leaving.dirs.take()
        && let Err(error) = dirs.remove()
    {
        tracing::error!(%error, "a move's working files are left behind");
    }
    locked(&connection).take();
    match result {
        Ok(()) => Ok(()),
        Err((phase, error)) => {
            let error = locked(&leaving.held).ended.map_or(error, ErrorBody::new);
            tracing::warn!(container = %leaving.spec.name, %phase, error = error.one_line(), "not moved; it runs on");
            host.voice.say(FromAgent::MoveFailed { id, phase, error });
            Err(())
        }
    }
}

async fn give(leaving: &mut Leaving, connection: &std::sync::Mutex<Option<OwnedFd>>) -> Result<(), (Phase, ErrorBody)> {
    let check = |e: ErrorBody| (Phase::Check, e);
    let prepare = |text: String| (Phase::Prepare, ErrorBody::new(text));
    let host = Arc::clone(&leaving.host);
    host.criu.as_ref().ok_or_else(|| check(ErrorBody::new("this host has no usable CRIU")))?;
    let container_dir = leaving.shared.dir.clone();
    let settled = tokio::task::spawn_blocking(move || super::fill::settled(&container_dir)).await;
    settled.map_err(|e| prepare(e.to_string()))?.map_err(check)?;
    let dirs = WorkDirs::make(&host, &leaving.plan.id)
        .map_err(|e| prepare(format!("the move's working directory could not be made: {e}")))?;
    leaving.dirs = Some(dirs);
    let net = &leaving.spec.network;
    let network = host.network.lock().await;
    let ready = network.prepare_divert(Mac(net.mac.0), net.vni).await;
    drop(network);
    ready.map_err(|e| (Phase::Prepare, ErrorBody::from_chain(&e)))?;
    let to = leaving.plan.to.clone();
    let (stream, handle) = connect(&host, &leaving.plan).await.map_err(prepare)?;
    *locked(connection) = Some(handle);
    let (reader, writer) = tokio::io::split(stream);
    let writer = tokio::io::BufWriter::with_capacity(WRITE_BUFFER_BYTES, writer);
    let id = leaving.plan.id.to_string();
    let container = leaving.spec.id.to_string();
    match send(reader, writer, &id, &container, leaving).await {
        Ok(sent) => {
            tracing::info!(container = %leaving.spec.name, to = %to, bytes = sent.bytes, "given away; waits for the verdict");
            Ok(())
        }
        Err(error) => Err((error.phase(), describe(&error))),
    }
}

/// A connection to the destination, and a handle by which it can be cut; what went wrong, if there is none.
async fn connect(host: &Host, plan: &Plan) -> Result<(TlsStream<TcpStream>, OwnedFd), String> {
    let (address, to) = (plan.address, &plan.to);
    let connect = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let handle = tcp.as_fd().try_clone_to_owned()?;
        let connector = TlsConnector::from(Arc::clone(&host.client_tls));
        Ok::<_, std::io::Error>((connector.connect(tls::host_server_name(to), tcp).await?, handle))
    };
    timeout(Duration::from_millis(CONNECT_TIMEOUT_MS), connect)
        .await
        .map_err(|_| format!("{to} ({address}) does not answer"))?
        .map_err(|e| format!("{to} ({address}) could not be reached: {e}"))
}

fn describe(error: &SendError) -> ErrorBody {
    ErrorBody::from_chain(error)
}

/// The container goes on here: wire first, so that its first word is heard.
/// After the end of the host's lease it stays frozen, and its keeper lets it go on when it is known whose it is.
pub async fn thaw(host: &Arc<Host>, spec: &ContainerSpec, cgroup: &Cgroup) -> Result<(), ErrorBody> {
    locked(&host.redirects).remove(&Mac(spec.network.mac.0));
    let network = host.network.lock().await;
    let plugged = network.plug(spec.id.as_str()).await;
    drop(network);
    if !host.lease.may_run() {
        plugged.map_err(|e| ErrorBody::from_chain(&e))?;
        let keeper = host.task(&spec.id)?.keeper().ok_or_else(|| ErrorBody::new("its keeper is gone"))?;
        return keeper.call(Request::Fence, "fence").await.map(|_| ()).map_err(|e| ErrorBody::from_chain(&e));
    }
    let cgroup = cgroup.clone();
    let thawed = tokio::task::spawn_blocking(move || cgroup.thaw().map_err(|e| ErrorBody::from_chain(&e)));
    // Both are tried whatever becomes of the other.
    let thawed = thawed.await.map_err(|e| ErrorBody::new(e.to_string()))?;
    plugged.map_err(|e| ErrorBody::from_chain(&e))?;
    thawed
}
