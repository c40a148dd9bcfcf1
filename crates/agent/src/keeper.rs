//! The agent's end of a keeper's socket, for tokio: calls with answers and descriptors, and a stream of events.
//!
//! One connection per container for as long as the agent lives. Losing it means that the keeper is gone; the container
//! is gone with it (the kernel sees to that), and `exit.json` says how it ended if anybody knows.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_container::keeper::protocol::{Call, Event, ExecSpec, MAX_MESSAGE_BYTES, Message, Reply, Request};
use godwit_container::keeper::state::Exit;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use thiserror::Error;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How long a keeper may take to answer, in milliseconds: it builds whole containers.
const CALL_TIMEOUT_MS: u64 = 25_000;
/// Events waiting to be looked at.
const QUEUE_EVENTS: usize = 64;
/// Descriptors that may come with one message.
const MAX_FDS: usize = 8;
const READ_BYTES: usize = 64 << 10;

#[derive(Debug, Error)]
pub enum KeeperError {
    #[error("the keeper's socket {} does not answer", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the keeper has ended")]
    Gone,
    #[error("the keeper did not answer {request} within {} s", CALL_TIMEOUT_MS / 1000)]
    Timeout { request: &'static str },
    #[error("the keeper answered {request} with something else")]
    Odd { request: &'static str },
    #[error("{reason}")]
    Failed { reason: String },
}

/// Answer, descriptors, and for a started command its end.
type Answer = (Reply, Vec<OwnedFd>, Option<oneshot::Receiver<Exit>>);

/// A command that runs in a container.
pub struct RunningCommand {
    pub exec_id: u64,
    /// The terminal's master, or standard input, output and error.
    pub fds: Vec<OwnedFd>,
    pub ended: oneshot::Receiver<Exit>,
}

type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>>;

/// Cheap to clone; all clones speak over one connection.
#[derive(Clone)]
pub struct Keeper {
    writer: Arc<tokio::sync::Mutex<(OwnedWriteHalf, u64)>>,
    waiting: Waiting,
}

impl Keeper {
    /// Connects to the keeper of `dir`. The receiver ends when the keeper does.
    pub async fn connect(dir: &Path) -> Result<(Self, mpsc::Receiver<Event>), KeeperError> {
        let path = dir.join(godwit_container::keeper::SOCKET_FILE);
        let failed = |source| KeeperError::Connect { path: path.clone(), source };
        // A socket's address is short (unix(7): 108 bytes), so the directory goes in as a descriptor.
        let opened = std::fs::File::open(dir).map_err(failed)?;
        let short = format!("/proc/self/fd/{}/{}", opened.as_raw_fd(), godwit_container::keeper::SOCKET_FILE);
        let stream = UnixStream::connect(&short).await.map_err(failed)?;
        let (reader, writer) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, receiver) = mpsc::channel(QUEUE_EVENTS);
        tokio::spawn(read(reader, Arc::clone(&waiting), events));
        Ok((Self { writer: Arc::new(tokio::sync::Mutex::new((writer, 0))), waiting }, receiver))
    }

    /// Asks and waits for the answer; `what` names the request in errors.
    pub async fn call(&self, request: Request, what: &'static str) -> Result<Answer, KeeperError> {
        let (sender, receiver) = oneshot::channel();
        let seq = {
            let mut writer = self.writer.lock().await;
            writer.1 += 1;
            let seq = writer.1;
            lock(&self.waiting).as_mut().ok_or(KeeperError::Gone)?.insert(seq, sender);
            let mut line = serde_json::to_vec(&Call { seq, request })
                .map_err(|e| KeeperError::Failed { reason: e.to_string() })?;
            line.push(b'\n');
            writer.0.write_all(&line).await.map_err(|_| KeeperError::Gone)?;
            seq
        };
        match timeout(Duration::from_millis(CALL_TIMEOUT_MS), receiver).await {
            Ok(Ok((Reply::Failed { error }, ..))) => Err(KeeperError::Failed { reason: error }),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(KeeperError::Gone),
            Err(_) => {
                if let Some(waiting) = lock(&self.waiting).as_mut() {
                    waiting.remove(&seq);
                }
                Err(KeeperError::Timeout { request: what })
            }
        }
    }

    pub async fn exec(&self, spec: ExecSpec) -> Result<RunningCommand, KeeperError> {
        match self.call(Request::Exec(spec), "exec").await? {
            (Reply::Exec { exec_id }, fds, Some(ended)) => Ok(RunningCommand { exec_id, fds, ended }),
            _ => Err(KeeperError::Odd { request: "exec" }),
        }
    }

    pub async fn signal_exec(&self, exec_id: u64, signal: i32) -> Result<(), KeeperError> {
        self.call(Request::SignalExec { exec_id, signal }, "signal a command").await.map(|_| ())
    }

    pub async fn signal(&self, signal: i32) -> Result<(), KeeperError> {
        self.call(Request::Signal { signal }, "signal").await.map(|_| ())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A poisoned lock only means that another task panicked; the map itself is always whole.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn read(reader: OwnedReadHalf, waiting: Waiting, events: mpsc::Sender<Event>) {
    let mut text: Vec<u8> = Vec::new();
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut commands: HashMap<u64, oneshot::Sender<Exit>> = HashMap::new();
    while let Ok(n) = receive(&reader, &mut text, &mut fds).await {
        if n == 0 || text.len() > 2 * MAX_MESSAGE_BYTES {
            break;
        }
        while let Some(end) = text.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Message::Reply { seq, reply }) => {
                    let sender = lock(&waiting).as_mut().and_then(|w| w.remove(&seq));
                    let answer = match reply {
                        Reply::Exec { exec_id } => {
                            let (ended, receiver) = oneshot::channel();
                            commands.insert(exec_id, ended);
                            (reply, std::mem::take(&mut fds), Some(receiver))
                        }
                        reply => (reply, Vec::new(), None),
                    };
                    if let Some(sender) = sender {
                        let _ = sender.send(answer);
                    }
                }
                Ok(Message::Event(Event::ExecExited { exec_id, exit })) => {
                    if let Some(ended) = commands.remove(&exec_id) {
                        let _ = ended.send(exit);
                    }
                }
                Ok(Message::Event(event)) => {
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::error!(%error, "a keeper said something that cannot be read"),
            }
        }
    }
    lock(&waiting).take();
}

/// Reads what is there, descriptors included; 0 at the end.
async fn receive(reader: &OwnedReadHalf, text: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let stream: &UnixStream = reader.as_ref();
    stream
        .async_io(Interest::READABLE, || {
            let mut buffer = vec![0u8; READ_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received =
                recvmsg(stream, &mut [io::IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(list) = message {
                    fds.extend(list);
                }
            }
            text.extend_from_slice(&buffer[..received.bytes]);
            Ok(received.bytes)
        })
        .await
}
