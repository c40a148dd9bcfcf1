//! The link between an agent and the controller: one WebSocket the agent dials, JSON messages both ways.
//!
//! ```text
//! agent                                  controller
//!   │ ── Hello{protocol, facts} ──────────▶ │   checks the protocol, the host's name against its certificate
//!   │ ◀───────────────────── Desired{…} ── │   the whole wanted state of this host; again after each change
//!   │ ── Status{containers} ──────────────▶ │   after each change, and every HEARTBEAT_MS
//!   │ ◀──────────────── Request{n, …} ──── │   something to do now
//!   │ ── Reply{n, …} ─────────────────────▶ │
//!   │ ── Move*{…}, Event{…} ──────────────▶ │
//! ```
//! `Desired` is level-triggered and complete: whatever a lost request would have done, the next `Desired` does too.
//! An agent that finds a container it does not own any more unmakes it, but only if `store_id` is the one in its
//! ledger: a controller with a new, empty store cannot make hosts drop what they run.

use std::net::{Ipv4Addr, SocketAddr};

use godwit_lease::{Beat, Grant};
use godwit_model::container::{ContainerSpec, ContainerStatus, Movable};
use godwit_model::event::EventKind;
use godwit_model::host::HostFacts;
use godwit_model::migration::{DowntimePart, MoveOptions, Phase, Progress};
use godwit_model::network::MacAddress;
use godwit_model::{Bytes, ContainerId, ContainerName, Generation, HostName, MoveId};
use serde::{Deserialize, Serialize};

use crate::session::ExecRequest;
use crate::types::ErrorBody;

/// The version of this protocol; the controller takes this one and the one before.
pub const PROTOCOL: u32 = 1;
/// How often an agent sends its status at the latest, in milliseconds.
pub const HEARTBEAT_MS: u64 = 2_000;
/// Silence after which the controller calls a host disconnected, in milliseconds.
pub const SILENCE_MS: u64 = 6_000;
/// The largest message on the link, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// How long a request may take before the asker gives up, in milliseconds, where nothing else is said.
pub const REQUEST_TIMEOUT_MS: u64 = 30_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum FromAgent {
    Hello {
        protocol: u32,
        facts: Box<HostFacts>,
    },
    /// Every container this host holds, and the revision of the last `Desired` that is carried out.
    Status {
        containers: Vec<ContainerStatus>,
        applied_revision: u64,
        /// Asks for the host's lease to go on; agents that would not stop at its end ask for none.
        #[serde(default)]
        beat: Option<Beat>,
    },
    Event {
        kind: EventKind,
        container: Option<ContainerName>,
        message: String,
    },
    MoveProgress {
        id: MoveId,
        phase: Phase,
        progress: Progress,
    },
    /// Source: the processes stand still and this host's own frames go to the destination. Others may follow.
    MoveFrozen {
        id: MoveId,
    },
    /// Destination: everything has arrived and is restored, nothing runs yet. Asks for the hand-over.
    MoveReady {
        id: MoveId,
        parts: Vec<(DowntimePart, f64)>,
        /// Milliseconds since the freeze, as counted along the stream, without clocks of two hosts being compared.
        since_freeze_ms: f64,
        bytes_received: u64,
        memory_bytes: u64,
        file_bytes: u64,
        rounds: u32,
        #[serde(default)]
        slowed_to_percent: Option<u32>,
        /// As in the move's summary.
        #[serde(default)]
        late_bytes: u64,
        /// As in the move's summary.
        #[serde(default)]
        stood_still: Option<String>,
        /// As in the move's summary.
        #[serde(default)]
        paused_ms: Option<f64>,
    },
    /// Either side: this move cannot go on. Not sent by a source that has given everything away.
    MoveFailed {
        id: MoveId,
        phase: Phase,
        error: ErrorBody,
    },
    Reply {
        request: u64,
        result: Result<Reply, ErrorBody>,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum FromController {
    /// The agent is not wanted: wrong name, wrong protocol. The link closes after it.
    Refused {
        error: ErrorBody,
    },
    Desired(Box<Desired>),
    /// The answer to a beat; not sent to agents that ask for none.
    Lease(Grant),
    Request {
        request: u64,
        body: Box<Request>,
    },
}

/// Everything a host shall be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Desired {
    /// Identity of the store, made once with it.
    pub store_id: String,
    pub revision: u64,
    pub containers: Vec<Assignment>,
    /// Containers that are not assigned here, whose volumes stay here all the same: one takes them over, or arrives.
    #[serde(default)]
    pub volumes: Vec<ContainerName>,
    pub networks: Vec<NetworkSpec>,
    /// Tunnel addresses of all hosts: containers reach nothing there but published ports.
    #[serde(default)]
    pub hosts: Vec<Ipv4Addr>,
    /// Containers of these networks that are being moved, by whomever: a redirect of any other is over.
    #[serde(default)]
    pub moving: Vec<MacAddress>,
    /// Moves that are not over and have this host on one side.
    pub moves: Vec<MoveRef>,
}

/// One container that this host owns in this generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    pub spec: ContainerSpec,
    pub generation: Generation,
    /// `false`: a person stopped it; its files stay.
    pub run: bool,
    /// Grows when a person says `start` again for a container that ended by itself.
    pub start_count: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveRef {
    pub id: MoveId,
    pub container: ContainerId,
    pub role: MoveRole,
    pub handed_over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveRole {
    Source,
    Destination,
}

/// One environment's network as seen from this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    pub env: String,
    pub vni: u32,
    pub subnet: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    /// This host's own address in the environment's network.
    pub host_address: Ipv4Addr,
    /// Tunnel addresses of the other hosts that take part.
    pub remotes: Vec<Ipv4Addr>,
    pub endpoints: Vec<EndpointSpec>,
    pub ports: Vec<PortSpec>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSpec {
    pub container: ContainerId,
    pub mac: MacAddress,
    pub address: Ipv4Addr,
    /// Tunnel address of the host it is on; `None` where it is this host.
    pub remote: Option<Ipv4Addr>,
    /// The names that lead to it: `db-1`, `db`, aliases.
    pub names: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    pub host_port: u16,
    pub udp: bool,
    pub targets: Vec<(Ipv4Addr, u16)>,
}

/// Something to do now. Every request is idempotent by its move or session id.
///
/// A request may overtake the `Desired` it follows from, and an older one may still be carried out when it comes. So those
/// that begin something carry the `revision` at which the store says so: a `Desired` of an earlier revision says nothing
/// about what they began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Request {
    /// Destination: get everything ready to receive. Answered with `Prepared` when the copy may begin.
    /// `memory` is what the container uses now.
    PrepareMove {
        id: MoveId,
        spec: Box<ContainerSpec>,
        generation: Generation,
        from: HostName,
        memory: Bytes,
        #[serde(default)]
        revision: u64,
    },
    /// Source: begin. Answered with `Accepted`; the rest is told by `Move*` messages.
    StartMove {
        id: MoveId,
        container: ContainerId,
        to: HostName,
        address: SocketAddr,
        to_tunnel: Ipv4Addr,
        #[serde(default)]
        options: MoveOptions,
        /// What moves like this stood still for besides sending, in milliseconds; `None`: none has been seen.
        #[serde(default)]
        fixed_ms: Option<f64>,
        #[serde(default)]
        revision: u64,
    },
    /// Source: can this container be moved as it is now? Answered with `Examined`.
    Examine {
        container: ContainerId,
    },
    /// Other hosts: frames for this address go to that host from now on.
    Redirect {
        vni: u32,
        mac: MacAddress,
        to_tunnel: Ipv4Addr,
    },
    /// Destination: the store names you as owner. Let it run, deliver what was parked.
    ActivateMove {
        id: MoveId,
        generation: Generation,
        #[serde(default)]
        revision: u64,
    },
    /// Source: handed over. Free everything; nothing may revive it.
    ReleaseMove {
        id: MoveId,
    },
    /// Either side: the move is off. The source runs on, the destination forgets.
    AbortMove {
        id: MoveId,
        reason: String,
    },
    OpenSession {
        session: String,
        body: SessionBody,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum SessionBody {
    Logs { container: ContainerId, tail: Option<u32>, follow: bool },
    Exec { container: ContainerId, request: ExecRequest },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Reply {
    Done,
    /// Seen at this moment, where `Status` may be two seconds old.
    Examined {
        movable: Movable,
    },
    /// The destination waits here for the stream of this move.
    Prepared {
        address: SocketAddr,
    },
    /// By the destination's own clock, in milliseconds: from `MoveReady` to the word, and from the word to the first
    /// instruction with the parked frames delivered.
    Activated {
        hand_over_ms: f64,
        activate_ms: f64,
        frames_parked: u64,
    },
}
