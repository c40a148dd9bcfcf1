//! The agent's end of the connection to a keeper.
//!
//! Calls block with a timeout (use a blocking task from async code); events arrive on a thread
//! of the client's own and are given to a callback.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::protocol::{Call, Event, ExecSpec, MAX_MESSAGE_BYTES, Message, Reply, Request};
use super::state::State;
use super::{SOCKET_FILE, fds};

/// How long a keeper may take to answer: the longest it allows a container to start.
pub const CALL_TIMEOUT_MS: u64 = super::launch::INIT_TIMEOUT_MS + 10_000;

#[derive(Debug, thiserror::Error)]
pub enum KeeperCallError {
    #[error("cannot reach the keeper of {dir}")]
    Connect { dir: PathBuf, source: io::Error },
    #[error("cannot talk to the keeper")]
    Talk { source: io::Error },
    #[error("the keeper closed the connection")]
    Closed,
    #[error("the keeper did not answer within {timeout_ms} ms")]
    Timeout { timeout_ms: u64 },
    #[error("{0}")]
    Failed(String),
    #[error("the keeper gave an answer to another question: {0}")]
    Unexpected(String),
}

/// What a callback gets to hear.
#[derive(Debug)]
pub enum KeeperEvent {
    Happened(Event),
    /// The connection is over: the keeper ended, or another agent took it.
    Lost,
}

type Answer = (Reply, Vec<OwnedFd>);

struct Shared {
    writer: Mutex<UnixStream>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next_seq: u64,
    closed: bool,
    answers: HashMap<u64, Sender<Answer>>,
}

/// A connection to one keeper; clones share it.
#[derive(Clone)]
pub struct KeeperClient {
    shared: Arc<Shared>,
    /// Ends the connection, and with it the reading thread, with the last clone.
    _hang_up: Arc<HangUp>,
}

struct HangUp(UnixStream);

impl Drop for HangUp {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A poisoned lock guards plain data here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KeeperClient {
    /// Connects to the keeper of `dir`; a client connected before loses its connection.
    /// `on_event` is called on another thread and must not block for long.
    pub fn connect(
        dir: &Path,
        on_event: impl FnMut(KeeperEvent) + Send + 'static,
    ) -> Result<KeeperClient, KeeperCallError> {
        let failed = |source| KeeperCallError::Connect { dir: dir.to_owned(), source };
        // A socket address is short, so the directory goes in as a descriptor.
        let directory = std::fs::File::open(dir).map_err(failed)?;
        let address = format!("/proc/self/fd/{}/{SOCKET_FILE}", directory.as_raw_fd());
        let stream = UnixStream::connect(address).map_err(failed)?;
        let reader = stream.try_clone().map_err(failed)?;
        let hang_up = HangUp(stream.try_clone().map_err(failed)?);
        let shared = Arc::new(Shared { writer: Mutex::new(stream), waiting: Mutex::default() });
        let for_reader = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("keeper-events".into())
            .spawn(move || read_messages(reader, &for_reader, on_event))
            .map_err(failed)?;
        Ok(KeeperClient { shared, _hang_up: Arc::new(hang_up) })
    }

    /// Builds the container; gives its pid, whose network namespace is there to be connected.
    pub fn create(&self) -> Result<u32, KeeperCallError> {
        match self.call(Request::Create)? {
            (Reply::Created { pid }, _) => Ok(pid),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Runs the created container's program.
    pub fn start(&self) -> Result<(), KeeperCallError> {
        match self.call(Request::Start)? {
            (Reply::Started, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Sends a signal number to the container's pid 1.
    pub fn signal(&self, signal: i32) -> Result<(), KeeperCallError> {
        self.done(Request::Signal { signal })
    }

    /// Runs a command; gives its id and either a terminal's master or stdin, stdout, stderr.
    pub fn exec(&self, spec: ExecSpec) -> Result<(u64, Vec<OwnedFd>), KeeperCallError> {
        match self.call(Request::Exec(spec))? {
            (Reply::Exec { exec_id }, fds) => Ok((exec_id, fds)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Sends a signal number to a command.
    pub fn signal_exec(&self, exec_id: u64, signal: i32) -> Result<(), KeeperCallError> {
        self.done(Request::SignalExec { exec_id, signal })
    }

    pub fn status(&self) -> Result<State, KeeperCallError> {
        match self.call(Request::Status)? {
            (Reply::Status(state), _) => Ok(state),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// See [`Request::Fence`].
    pub fn fence(&self) -> Result<(), KeeperCallError> {
        self.done(Request::Fence)
    }

    /// See [`Request::Unfence`].
    pub fn unfence(&self) -> Result<(), KeeperCallError> {
        self.done(Request::Unfence)
    }

    /// Ends the keeper, with `kill` also a running container.
    pub fn quit(&self, kill: bool) -> Result<(), KeeperCallError> {
        self.done(Request::Quit { kill })
    }

    fn done(&self, request: Request) -> Result<(), KeeperCallError> {
        match self.call(request)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Sends a request and waits for its reply; a refusal is an error.
    pub fn call(&self, request: Request) -> Result<Answer, KeeperCallError> {
        let (sender, receiver) = channel();
        let seq = {
            let mut waiting = lock(&self.shared.waiting);
            if waiting.closed {
                return Err(KeeperCallError::Closed);
            }
            waiting.next_seq += 1;
            let seq = waiting.next_seq;
            waiting.answers.insert(seq, sender);
            seq
        };
        let result = self.send(&Call { seq, request }).and_then(|()| {
            match receiver.recv_timeout(Duration::from_millis(CALL_TIMEOUT_MS)) {
                Ok((Reply::Failed { error }, _)) => Err(KeeperCallError::Failed(error)),
                Ok(answer) => Ok(answer),
                Err(RecvTimeoutError::Timeout) => Err(KeeperCallError::Timeout { timeout_ms: CALL_TIMEOUT_MS }),
                Err(RecvTimeoutError::Disconnected) => Err(KeeperCallError::Closed),
            }
        });
        lock(&self.shared.waiting).answers.remove(&seq);
        result
    }

    fn send(&self, call: &Call) -> Result<(), KeeperCallError> {
        let talk = |source| KeeperCallError::Talk { source };
        let mut line = serde_json::to_vec(call).map_err(|error| talk(error.into()))?;
        if line.len() >= MAX_MESSAGE_BYTES {
            return Err(talk(io::Error::new(io::ErrorKind::InvalidInput, "request too long")));
        }
        line.push(b'\n');
        lock(&self.shared.writer).write_all(&line).map_err(talk)
    }
}

fn unexpected(reply: &Reply) -> KeeperCallError {
    KeeperCallError::Unexpected(format!("{reply:?}"))
}

/// Until the connection ends, hands replies to their callers and events to the callback.
fn read_messages(stream: UnixStream, shared: &Shared, mut on_event: impl FnMut(KeeperEvent)) {
    let mut input = Vec::new();
    let mut pending_fds = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok((count, fds)) = fds::receive(&stream, &mut buffer) {
        if count == 0 || input.len() > MAX_MESSAGE_BYTES {
            break;
        }
        // The kernel never joins bytes across a message with descriptors, and the keeper sends
        // them with a message's first byte: they belong to the next reply that carries any.
        pending_fds.extend(fds);
        input.extend_from_slice(&buffer[..count]);
        while let Some(end) = input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = input.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Message::Event(event)) => on_event(KeeperEvent::Happened(event)),
                Ok(Message::Reply { seq, reply }) => {
                    let fds = match reply {
                        Reply::Exec { .. } => std::mem::take(&mut pending_fds),
                        _ => Vec::new(),
                    };
                    if let Some(sender) = lock(&shared.waiting).answers.remove(&seq) {
                        // A caller that gave up closes the descriptors by not taking them.
                        let _ = sender.send((reply, fds));
                    }
                }
                // Of another version: nobody waits for what cannot be understood.
                Err(error) => tracing::warn!(%error, "unknown message from a keeper"),
            }
        }
    }
    let mut waiting = lock(&shared.waiting);
    waiting.closed = true;
    waiting.answers.clear();
    drop(waiting);
    on_event(KeeperEvent::Lost);
}
