//! Streams between a person and one container: logs and exec. The agent dials back; see `godwit_api::session`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use godwit_api::link::SessionBody;
use godwit_api::routes;
use godwit_api::session::{
    ExecControl, ExecRequest, LogLine, LogStream, MAX_MESSAGE_BYTES, STDERR, STDIN, STDOUT, TerminalSize,
};
use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::{ExecSpec, WindowSize};
use godwit_container::log::{LogFollower, LogLine as StoredLine, Stream, read_logs};
use godwit_container::{LaunchSpec, resolve_user};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use crate::host::Host;
use crate::link::{Socket, dial};
use crate::task::TaskHandle;

/// How long a look at the log waits for new lines before it sees whether anybody still reads, in milliseconds.
const FOLLOW_MS: u64 = 500;
/// Pieces waiting between container and connection.
const QUEUE_PIECES: usize = 32;
const PIECE_BYTES: usize = 64 << 10;

/// Starts a session in the background; an error says that there will be none.
pub fn open(host: &Arc<Host>, session: String, body: SessionBody) -> Result<(), ErrorBody> {
    let id = match &body {
        SessionBody::Logs { container, .. } | SessionBody::Exec { container, .. } => container,
    };
    let task = host.task(id)?;
    let host = Arc::clone(host);
    tokio::spawn(async move {
        let path = format!("{}/{session}", routes::AGENT_SESSIONS);
        let socket = match dial(&host, &path).await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(error = ErrorBody::from_chain(&error).one_line(), "a session could not be opened");
                return;
            }
        };
        match body {
            SessionBody::Logs { tail, follow, .. } => logs(task, socket, tail, follow).await,
            SessionBody::Exec { request, .. } => exec(task, socket, request).await,
        }
    });
    Ok(())
}

async fn logs(task: TaskHandle, mut socket: Socket, tail: Option<u32>, follow: bool) {
    let (sender, mut lines) = mpsc::channel::<Vec<StoredLine>>(QUEUE_PIECES);
    let dir = task.shared.dir.clone();
    let reader = tokio::task::spawn_blocking(move || {
        // Follow from before the tail is read would repeat lines, from after it lose some: the follower starts at the
        // end it sees, then the tail is what was there.
        let mut follower = follow.then(|| LogFollower::new(&dir)).transpose()?;
        let stored = read_logs(&dir, tail.map(|n| n as usize), None)?;
        if sender.blocking_send(stored).is_err() {
            return Ok(());
        }
        while let Some(follower) = &mut follower {
            let new = follower.next(Duration::from_millis(FOLLOW_MS))?;
            if sender.is_closed() || (!new.is_empty() && sender.blocking_send(new).is_err()) {
                break;
            }
        }
        Ok::<(), godwit_container::log::ReadLogError>(())
    });
    loop {
        tokio::select! {
            batch = lines.recv() => {
                let Some(batch) = batch else { break };
                for line in batch {
                    let Ok(text) = serde_json::to_string(&log_line(line)) else { continue };
                    if socket.send(Message::Text(text.into())).await.is_err() {
                        return;
                    }
                }
            }
            message = socket.next() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
    drop(lines);
    if let Ok(Err(error)) = reader.await {
        tracing::warn!(error = ErrorBody::from_chain(&error).one_line(), "a log could not be read");
    }
    let _ = socket.close(None).await;
}

fn log_line(line: StoredLine) -> LogLine {
    LogLine {
        at_ms: u64::try_from(line.time.as_millisecond()).unwrap_or(0),
        stream: match line.stream {
            Stream::Stdout => LogStream::Stdout,
            Stream::Stderr => LogStream::Stderr,
        },
        text: line.text,
    }
}

async fn exec(task: TaskHandle, mut socket: Socket, request: ExecRequest) {
    let end = match run_exec(&task, &mut socket, request).await {
        Ok(code) => ExecControl::Exit { code },
        Err(message) => ExecControl::Error { message },
    };
    if let Ok(text) = serde_json::to_string(&end) {
        let _ = socket.send(Message::Text(text.into())).await;
    }
    let _ = socket.close(None).await;
}

fn exec_spec(task: &TaskHandle, request: &ExecRequest) -> Result<ExecSpec, String> {
    let launch = LaunchSpec::load(&task.shared.dir).map_err(|e| e.to_string())?;
    let user = match &request.user {
        Some(text) => resolve_user(&launch.rootfs, text).map_err(|e| ErrorBody::from_chain(&e).one_line())?,
        None => launch.user,
    };
    let mut env = launch.env;
    for new in &request.environment {
        let name = new.split('=').next().unwrap_or_default();
        env.retain(|old| old.split('=').next() != Some(name));
        env.push(new.clone());
    }
    if request.terminal.is_some() && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    Ok(ExecSpec {
        argv: request.argv.clone(),
        env,
        cwd: request.working_dir.clone().unwrap_or(launch.cwd),
        user,
        tty: request.terminal.map(|t| WindowSize { rows: t.rows, columns: t.columns }),
    })
}

/// Runs a command to its end; its exit code as shells count it.
async fn run_exec(task: &TaskHandle, socket: &mut Socket, request: ExecRequest) -> Result<i32, String> {
    let keeper = task.keeper().ok_or("the container does not run")?;
    let spec = exec_spec(task, &request)?;
    let terminal = spec.tty.is_some();
    let entered = task.shared.gate.enter().await.ok_or("the container is being moved; try again when it runs")?;
    let command = keeper.exec(spec).await.map_err(|e| ErrorBody::from_chain(&e).one_line())?;
    drop(entered);
    let mut fds = command.fds.into_iter();
    let odd = || "the keeper gave too few descriptors".to_owned();
    let first = Arc::new(nonblocking(fds.next().ok_or_else(odd)?)?);
    let (sender, mut output) = mpsc::channel::<Vec<u8>>(QUEUE_PIECES);
    if terminal {
        tokio::spawn(pump(Arc::clone(&first), STDOUT, sender));
    } else {
        for stream in [STDOUT, STDERR] {
            let fd = Arc::new(nonblocking(fds.next().ok_or_else(odd)?)?);
            tokio::spawn(pump(fd, stream, sender.clone()));
        }
        drop(sender);
    }
    let mut stdin = Some(first);
    let mut ended = command.ended;
    let mut exit = None;
    let mut all_out = false;
    while exit.is_none() || !all_out {
        tokio::select! {
            piece = output.recv(), if !all_out => match piece {
                Some(piece) => socket.send(Message::Binary(piece.into())).await.map_err(|e| e.to_string())?,
                None => all_out = true,
            },
            status = &mut ended, if exit.is_none() => {
                let status = status.map_err(|_| "the container ended")?;
                exit = Some(status.code.unwrap_or_else(|| 128 + status.signal.unwrap_or(0)));
            }
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => match bytes.split_first() {
                    Some((&STDIN, [])) => if !terminal { stdin = None },
                    Some((&STDIN, rest)) => if let Some(fd) = &stdin && write_all(fd, rest).await.is_err() { stdin = None },
                    _ => return Err("the client sent something that is no input".to_owned()),
                },
                Some(Ok(Message::Text(text))) => if let (Ok(ExecControl::Resize { size }), Some(fd)) = (serde_json::from_str(&text), &stdin) {
                    resize(fd, size);
                },
                Some(Ok(Message::Close(_)) | Err(_)) | None => {
                    let _ = keeper.signal_exec(command.exec_id, nix::libc::SIGHUP).await;
                    return Err("the client is gone".to_owned());
                }
                Some(Ok(_)) => {}
            },
        }
    }
    Ok(exit.unwrap_or(0))
}

fn nonblocking(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, String> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(|e| e.to_string())?;
    // The descriptor is owned by the registration, so it is not closed under it; `register` would need `unsafe`.
    #[allow(deprecated)]
    AsyncFd::new(fd).map_err(|e| e.to_string())
}

/// Everything from one descriptor, each piece with its stream's byte in front.
async fn pump(fd: Arc<AsyncFd<OwnedFd>>, stream: u8, output: mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; PIECE_BYTES.min(MAX_MESSAGE_BYTES - 1)];
    loop {
        let Ok(mut ready) = fd.readable().await else { return };
        match ready.try_io(|fd| rustix::io::read(fd.get_ref(), &mut buffer).map_err(Into::into)) {
            // A terminal whose other side is closed answers EIO.
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(n)) => {
                let mut piece = Vec::with_capacity(n + 1);
                piece.push(stream);
                piece.extend_from_slice(&buffer[..n]);
                if output.send(piece).await.is_err() {
                    return;
                }
            }
            Err(_would_block) => {}
        }
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(Into::into)) {
            Ok(written) => bytes = &bytes[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}

fn resize(fd: &AsyncFd<OwnedFd>, size: TerminalSize) {
    let size = rustix::termios::Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    if let Err(error) = rustix::termios::tcsetwinsize(fd.get_ref(), size) {
        tracing::debug!(%error, "a terminal kept its size");
    }
}
