//! What agent and keeper say to each other: one JSON object a line, at most
//! [`MAX_MESSAGE_BYTES`]; descriptors travel with the first byte of the line they belong to.
//!
//! ```text
//!  agent                                     keeper
//!    ── {"seq":1,"request":"Create"} ───────▶  clones, builds the container's world
//!    ◀── {"Reply":{"seq":1,"reply":{"Created":{"pid":4711}}}} ──
//!       … agent attaches the network to pid's namespace …
//!    ── {"seq":2,"request":"Start"} ────────▶  exec
//!    ◀── {"Reply":{"seq":2,"reply":"Started"}} ──
//!    ◀── {"Event":{"Exited":{…}}} ──           whenever it happens
//!    ── {"seq":3,"request":{"Quit":{"kill":false}}} ▶
//! ```
//! One connection at a time: a new one replaces the old. Losing the connection changes nothing
//! for the container.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::state::{Exit, State};
use crate::spec::User;

/// Largest message of either side.
pub const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the agent, repeated in the reply.
    pub seq: u64,
    pub request: Request,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Builds the container as `spec.json` says, up to the program's start.
    Create,
    /// Lets the created container's program run.
    Start,
    /// A container will arrive: starts its criu, so that [`Request::Restore`] begins at once.
    PrepareRestore {
        /// The criu program.
        criu: PathBuf,
    },
    /// Receives a container that was frozen and dumped on another host, instead of `Create` and
    /// `Start`. Answered at once; [`Event::RestoreNetwork`], [`Event::Restored`] and
    /// [`Event::Resumed`] (or [`Event::RestoreFailed`]) follow.
    Restore(RestoreSpec),
    /// The agent's word at [`Event::RestoreNetwork`] and [`Event::Restored`]: go on, or give up.
    RestoreProceed {
        go_on: bool,
    },
    /// The container, frozen by the agent, stays so until the keeper thaws it: the lease of the host has ended.
    Fence,
    /// The container is this host's still: one that stood still for the lease's end goes on.
    Unfence,
    /// Sends a signal number to pid 1.
    Signal {
        signal: i32,
    },
    /// Starts a command in the running container.
    Exec(ExecSpec),
    /// Sends a signal number to a command.
    SignalExec {
        exec_id: u64,
        signal: i32,
    },
    Status,
    /// Ends the keeper; with `kill` also a container that still runs, else that is refused.
    Quit {
        kill: bool,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    Created {
        pid: u32,
    },
    Started,
    /// With a terminal one descriptor (its master), else three (stdin, stdout, stderr).
    Exec {
        exec_id: u64,
    },
    Status(State),
    Done,
    /// Nothing was changed; the sentence says why.
    Failed {
        error: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The restored container's network namespace exists, nothing is in it yet.
    RestoreNetwork {
        pid: u32,
    },
    /// Everything is restored, nothing runs.
    Restored {
        pid: u32,
    },
    /// It runs.
    Resumed {
        pid: u32,
    },
    /// It could not be restored; nothing of it is left.
    RestoreFailed {
        error: String,
    },
    Exited(Exit),
    ExecExited {
        exec_id: u64,
        exit: Exit,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    Reply { seq: u64, reply: Reply },
    Event(Event),
}

/// Where a dumped container is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// The criu program.
    pub criu: PathBuf,
    pub images_dir: PathBuf,
    /// For CRIU's log and temporary files; on a tmpfs.
    pub work_dir: PathBuf,
    /// Inode numbers of the pipes that were the program's stdout and stderr where it was dumped.
    pub stdout_pipe: Option<u64>,
    pub stderr_pipe: Option<u64>,
    /// Memory is filled in by whoever listens on `lazy-pages.socket` in the work directory.
    #[serde(default)]
    pub lazy_pages: bool,
}

/// A command to run in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    pub argv: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    pub cwd: String,
    pub user: User,
    /// A terminal of this size instead of pipes.
    pub tty: Option<WindowSize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}
