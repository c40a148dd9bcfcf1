//! One `criu swrk` process and the socket to it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use prost::Message as _;
use thiserror::Error;

use crate::binary::Criu;
use crate::options::{Directories, DumpOptions, OpenDirectories, PageServerOptions, RestoreOptions};
use crate::proto::{Request, Response, request_type};

/// The largest packet of the protocol, in bytes; CRIU's own limit is far below.
const MAX_PACKET_BYTES: usize = 1 << 20;
/// The number of the session's socket inside the `criu swrk` process.
const SOCKET_FD: RawFd = 3;

#[derive(Debug, Error)]
pub enum SessionError {
    #[error("criu could not be started from {path}")]
    Start { path: String, source: io::Error },
    #[error("the directories for criu could not be opened")]
    Directories { source: io::Error },
    #[error("the socket to criu broke while {doing}")]
    Socket { doing: &'static str, source: nix::Error },
    #[error("criu ended without an answer; its log is in the move's work directory")]
    Ended,
    #[error("criu sent a packet that is not of its protocol")]
    Protocol { source: prost::DecodeError },
    #[error("criu did not answer within {seconds} s")]
    TimedOut { seconds: u64 },
    #[error("criu failed (errno {errno}): {message}")]
    Failed { errno: i32, message: String },
}

/// A descriptor the session's process gets under a number of our choice.
#[derive(Debug)]
pub struct PassedFd {
    pub number: RawFd,
    pub fd: OwnedFd,
}

/// What CRIU said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// CRIU has come to a named point and waits for [`Session::proceed`].
    /// `pid` is the first process's, as this host counts, where CRIU tells it (`setup-namespaces`, `post-restore`).
    Notify { script: String, pid: Option<i32> },
    /// The dump is complete.
    Dumped,
    /// The processes run; this is the first one's process id.
    Restored { pid: i32 },
    /// The page server runs as the given process, a child of criu.
    PageServer { pid: i32 },
    /// Any other request is done; a waited-for process's status where one was asked for.
    Done { status: Option<i32> },
}

/// See the crate's documentation for the contract.
pub struct Session {
    child: Child,
    socket: Option<OwnedFd>,
    ends: Ends,
    /// CRIU opens these through our process, at any time of its work.
    directories: Option<OpenDirectories>,
}

/// How a session's process ends when the session is dropped before its work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// At once, also when the calling thread dies: for restores, whose half-made processes are worth nothing.
    Killed,
    /// By itself after its socket closes, so that CRIU takes its hands off the processes it holds; killed only after
    /// [`UNDO_TIMEOUT_MS`]. For dumps: the dumped processes are to live on.
    Undone,
    /// Nothing to do: somebody else has reaped it.
    Reaped,
}

/// How long CRIU may take to let go of a container, in milliseconds.
pub const UNDO_TIMEOUT_MS: u64 = 10_000;

impl Session {
    /// Starts `criu swrk`. With `rst_sibling` restores, restored processes become children of the calling process.
    pub fn start(criu: &Criu, passed: Vec<PassedFd>, ends: Ends) -> Result<Self, SessionError> {
        Self::start_with(criu, passed, ends, &[])
    }

    /// As [`Session::start`], with more variables in criu's environment.
    pub fn start_with(
        criu: &Criu,
        passed: Vec<PassedFd>,
        ends: Ends,
        environment: &[(&str, &Path)],
    ) -> Result<Self, SessionError> {
        let start = |source| SessionError::Start { path: criu.path.display().to_string(), source };
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| start(e.into()))?;
        // Moved out of the way of the numbers below, so that no dup2 closes what a later one needs.
        let mut moves: Vec<(OwnedFd, RawFd)> = Vec::with_capacity(passed.len() + 1);
        moves.push((move_up(theirs).map_err(&start)?, SOCKET_FD));
        for p in passed {
            moves.push((move_up(p.fd).map_err(&start)?, p.number));
        }
        let pairs: Vec<(RawFd, RawFd)> = moves.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect();
        let mut command = Command::new(&criu.path);
        command.args(["swrk", &SOCKET_FD.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).env_remove("CRIU_CONFIG_FILE");
        command.envs(environment.iter().copied());
        // SAFETY: between fork and exec only dup2, signal and prctl are called, all async-signal-safe; no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                for (from, to) in &pairs {
                    if nix::libc::dup2(*from, *to) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                // Ignored signals stay ignored across exec, and CRIU ends its own helpers by SIGTERM and waits for them.
                for signal in [nix::libc::SIGHUP, nix::libc::SIGINT, nix::libc::SIGTERM, nix::libc::SIGPIPE] {
                    if nix::libc::signal(signal, nix::libc::SIG_DFL) == nix::libc::SIG_ERR {
                        return Err(io::Error::last_os_error());
                    }
                }
                let with_parent = ends == Ends::Killed;
                if with_parent && nix::libc::prctl(nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().map_err(start)?;
        Ok(Self { child, socket: Some(ours), ends, directories: None })
    }

    /// The process id of criu itself.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The caller has waited for criu's process itself: its id may be another's by now.
    pub fn reaped(&mut self) {
        self.ends = Ends::Reaped;
    }

    fn socket(&self) -> Result<BorrowedFd<'_>, SessionError> {
        self.socket.as_ref().map(AsFd::as_fd).ok_or(SessionError::Ended)
    }

    /// To be polled for reading: readable means [`Session::receive`] will not block.
    pub fn fd(&self) -> Result<BorrowedFd<'_>, SessionError> {
        self.socket()
    }

    pub fn request_dump(&mut self, options: &DumpOptions) -> Result<(), SessionError> {
        let request = options.request(self.open(&options.directories)?);
        self.send(&request)
    }

    pub fn request_restore(&mut self, options: &RestoreOptions) -> Result<(), SessionError> {
        let request = options.request(self.open(&options.directories)?);
        self.send(&request)
    }

    pub fn request_page_server(&mut self, options: &PageServerOptions) -> Result<(), SessionError> {
        let request = options.request(self.open(&options.directories)?);
        self.send(&Request { keep_open: Some(true), ..request })
    }

    fn open(&mut self, directories: &Directories) -> Result<&OpenDirectories, SessionError> {
        let open = directories.open().map_err(|source| SessionError::Directories { source })?;
        Ok(self.directories.insert(open))
    }

    /// Asks for the end of a child of criu; answered by [`Message::Done`] with its status.
    pub fn request_wait(&self, pid: i32) -> Result<(), SessionError> {
        self.send(&Request { kind: request_type::WAIT_PID, pid: Some(pid as u32), ..Request::default() })
    }

    /// Answers a notification: go on, or fail.
    pub fn proceed(&self, success: bool) -> Result<(), SessionError> {
        self.send(&Request { kind: request_type::NOTIFY, notify_success: Some(success), ..Request::default() })
    }

    fn send(&self, request: &Request) -> Result<(), SessionError> {
        send(self.socket()?.as_raw_fd(), &request.encode_to_vec(), MsgFlags::MSG_NOSIGNAL)
            .map(|_| ())
            .map_err(|source| SessionError::Socket { doing: "sending a request", source })
    }

    /// The next message; blocks until there is one. An unsuccessful answer is [`SessionError::Failed`].
    pub fn receive(&self) -> Result<Message, SessionError> {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let n = recv(self.socket()?.as_raw_fd(), &mut buffer, MsgFlags::empty())
            .map_err(|source| SessionError::Socket { doing: "waiting for an answer", source })?;
        if n == 0 {
            return Err(SessionError::Ended);
        }
        let response = Response::decode(&buffer[..n]).map_err(|source| SessionError::Protocol { source })?;
        if !response.success {
            let errno = response.errno.unwrap_or(0);
            return Err(SessionError::Failed {
                errno,
                message: response.message.unwrap_or_else(|| "no reason given".into()),
            });
        }
        Ok(match response.kind {
            request_type::NOTIFY => {
                let notify = response.notify.unwrap_or_default();
                Message::Notify { script: notify.script.unwrap_or_default(), pid: notify.pid }
            }
            request_type::DUMP => Message::Dumped,
            request_type::RESTORE => Message::Restored { pid: response.restore.map_or(0, |r| r.pid) },
            request_type::PAGE_SERVER | request_type::PAGE_SERVER_CHLD => {
                Message::PageServer { pid: response.ps.and_then(|p| p.pid).unwrap_or(0) }
            }
            _ => Message::Done { status: response.status },
        })
    }

    /// Like [`Session::receive`], but gives up after `timeout`.
    pub fn receive_within(&self, timeout: Duration) -> Result<Message, SessionError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.socket()?, PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) => return Err(SessionError::TimedOut { seconds: timeout.as_secs() }),
                Ok(_) => return self.receive(),
                Err(nix::Error::EINTR) => {}
                Err(source) => return Err(SessionError::Socket { doing: "waiting for an answer", source }),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Errors below mean that the process has ended already, which is what is wanted.
        self.socket = None;
        match self.ends {
            Ends::Reaped => return,
            Ends::Killed => {}
            Ends::Undone => {
                if let Ok(Some(_)) = self.wait_within(Duration::from_millis(UNDO_TIMEOUT_MS)) {
                    return;
                }
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Session {
    /// The process's end, waited for by its pidfd.
    fn wait_within(&mut self, limit: Duration) -> io::Result<Option<std::process::ExitStatus>> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX));
        self.child.try_wait()
    }
}

/// The same open file under a number above every number that is passed on, closed on exec.
fn move_up(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(&fd, 200).map_err(io::Error::from)
}
