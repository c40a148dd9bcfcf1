//! Sessions: streams between a person and one container (logs, exec), joined by the controller.
//!
//! A person's request makes a session id; the controller sends [`crate::link::Request::OpenSession`] to the agent;
//! the agent dials `/v1/agent/sessions/{id}` and the controller passes messages both ways unchanged.
//!
//! Exec: binary messages start with one byte: 0 standard input (client → container; an empty payload closes it),
//! 1 standard output, 2 standard error. Text messages are [`ExecControl`] as JSON. Zero-length binary messages and
//! other first bytes are protocol errors. Logs: text messages, one [`LogLine`] as JSON each, then a close.

use serde::{Deserialize, Serialize};

/// The largest message of a session, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;

/// One line a container wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Milliseconds since the epoch, by the host's clock.
    pub at_ms: u64,
    pub stream: LogStream,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogStream {
    Stdout,
    Stderr,
}

/// What to run in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    #[serde(default)]
    pub environment: Vec<String>,
    pub working_dir: Option<String>,
    /// `name`, `name:group`, or numbers; `None` is the container's own user.
    pub user: Option<String>,
    /// With a terminal of this size; standard error is part of standard output then.
    pub terminal: Option<TerminalSize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

/// The text messages of an exec session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum ExecControl {
    /// The first message, client → container.
    Start { request: ExecRequest },
    /// The person's terminal changed its size.
    Resize { size: TerminalSize },
    /// The last message, container → client: exit code, or 128 + signal number.
    Exit { code: i32 },
    /// It could not be started, or broke; the session ends.
    Error { message: String },
}
