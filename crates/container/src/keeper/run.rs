//! The keeper's loop: one poll over everything that can happen.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitOptions, WaitStatus, wait};

use super::connection::Connection;
use super::exec::{self, Command};
use super::fence::Fence;
use super::launch::{self, Created};
use super::protocol::{Call, Event, Message, Reply, Request};
use super::restore::Restoring;
use super::state::{self, Exit, Phase, State, unix_ms_now};
use super::{KeeperError, chain, note, process};
use crate::cgroup::Cgroup;
use crate::log::{LogWriter, Stream};
use crate::spec::LaunchSpec;
use crate::sys;

/// How long a keeper without a container and without an agent waits for either.
const IDLE_TIMEOUT_MS: u64 = 60_000;
/// Output read in one go, so that a container that writes without end does not starve the rest.
const OUTPUT_BYTES: usize = 64 * 1024;

/// What a file descriptor in the poll set is.
#[derive(Clone, Copy)]
enum Source {
    Children,
    Listener,
    Agent,
    Criu,
    Lease,
    Output(Stream),
}

/// The container's pid 1 as the keeper holds it.
pub(super) struct Init {
    pub pid: u32,
    pub pidfd: OwnedFd,
    pub cgroup: Cgroup,
    /// There until the program runs.
    pub sync: Option<std::os::unix::net::UnixStream>,
}

pub(super) struct Keeper {
    pub(super) dir: PathBuf,
    pub(super) spec: LaunchSpec,
    listener: UnixListener,
    children: SignalFd,
    agent: Option<Connection>,
    pub(super) init: Option<Init>,
    pub(super) output: [Option<OwnedFd>; 2],
    log: LogWriter,
    commands: Vec<Command>,
    pub(super) restoring: Option<Restoring>,
    pub(super) fence: Fence,
    next_exec_id: u64,
    pub(super) state: State,
    quit: bool,
}

impl Keeper {
    pub fn new(
        dir: &Path,
        spec: LaunchSpec,
        listener: UnixListener,
        lease: Option<PathBuf>,
    ) -> Result<Keeper, KeeperError> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(process("block signals"))?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(process("watch for children"))?;
        let log = LogWriter::open(dir, spec.log).map_err(process("open the container's log"))?;
        let fence = Fence::new(lease).map_err(process("wait for the end of a lease"))?;
        let keeper_pid = std::process::id();
        let state = State {
            phase: Phase::New,
            keeper_pid,
            keeper_start_ticks: sys::start_time_ticks(keeper_pid).map_err(process("read the own start time"))?,
            pid: None,
            pid_start_ticks: None,
            created_unix_ms: None,
            started_unix_ms: None,
            stdout_pipe: None,
            stderr_pipe: None,
            execs: 0,
            log_lost_bytes: 0,
            cgroup: spec.cgroup_path(),
            exit: None,
            guarded: fence.guards(),
            fenced: false,
        };
        // How an earlier container in this directory ended is not how this one does.
        match std::fs::remove_file(dir.join(state::EXIT_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(process("remove an old exit record")(error));
            }
            _ => {}
        }
        let keeper = Keeper {
            dir: dir.to_owned(),
            spec,
            listener,
            children,
            agent: None,
            init: None,
            output: [None, None],
            log,
            commands: Vec::new(),
            restoring: None,
            fence,
            next_exec_id: 1,
            state,
            quit: false,
        };
        keeper.save_state();
        Ok(keeper)
    }

    /// Until told to quit, or until the container has ended and no agent is there.
    pub fn run(&mut self) -> Result<(), KeeperError> {
        let mut idle_since = Instant::now();
        loop {
            let nobody = self.agent.is_none();
            if self.quit || (nobody && self.state.phase == Phase::Exited && self.output_done()) {
                self.log.finish();
                return Ok(());
            }
            let timeout = match nobody && self.state.phase == Phase::New {
                true => Some(Duration::from_millis(IDLE_TIMEOUT_MS).saturating_sub(idle_since.elapsed())),
                false => {
                    idle_since = Instant::now();
                    None
                }
            };
            if timeout.is_some_and(|left| left.is_zero()) {
                note("no agent came: ending");
                return Ok(());
            }
            for source in self.wait(timeout)? {
                self.handle(source);
            }
        }
    }

    fn output_done(&self) -> bool {
        self.output.iter().all(Option::is_none)
    }

    /// The sources that have something to say.
    fn wait(&self, timeout: Option<Duration>) -> Result<Vec<Source>, KeeperError> {
        // The lease first: what a container says or asks for can wait.
        let mut sources = vec![Source::Lease, Source::Children, Source::Listener];
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.fence.timer(), PollFlags::IN),
            PollFd::new(&self.children, PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
        ];
        if let Some(agent) = &self.agent {
            let write = if agent.wants_to_write() { PollFlags::OUT } else { PollFlags::empty() };
            sources.push(Source::Agent);
            fds.push(PollFd::new(agent.stream(), PollFlags::IN | write));
        }
        if let Some(restoring) = &self.restoring {
            sources.push(Source::Criu);
            fds.push(PollFd::from_borrowed_fd(restoring.fd(), PollFlags::IN));
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            if let Some(pipe) = &self.output[stream as usize] {
                sources.push(Source::Output(stream));
                fds.push(PollFd::new(pipe, PollFlags::IN));
            }
        }
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(process("wait for events")(error)),
        }
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(source, _)| *source).collect())
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Children => self.reap(),
            Source::Listener => self.accept(),
            Source::Agent => self.serve(),
            Source::Criu => self.hear_criu(),
            Source::Lease => self.look_at_lease(),
            Source::Output(stream) => {
                self.copy_output(stream);
            }
        }
    }

    fn accept(&mut self) {
        match self.listener.accept().and_then(|(stream, _)| Connection::accept(stream)) {
            Ok(connection) => {
                self.agent = Some(connection);
                if let Some(exit) = self.state.exit.clone() {
                    self.tell(Event::Exited(exit));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => note(&format!("refused a connection: {error}")),
        }
    }

    fn serve(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let calls = match agent.flush().and_then(|()| agent.read()) {
            Ok(calls) => calls,
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    note(&format!("lost the agent: {error}"));
                }
                self.agent = None;
                return;
            }
        };
        for Call { seq, request } in calls {
            let (reply, fds) = match self.answer(request) {
                Ok(answer) => answer,
                Err(error) => {
                    note(&error);
                    (Reply::Failed { error }, Vec::new())
                }
            };
            self.send(&Message::Reply { seq, reply }, fds);
        }
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.send(&Message::Event(event), Vec::new());
    }

    fn send(&mut self, message: &Message, fds: Vec<OwnedFd>) {
        if let Some(agent) = &mut self.agent
            && let Err(error) = agent.send(message, fds)
        {
            note(&format!("lost the agent: {error}"));
            self.agent = None;
        }
    }

    fn answer(&mut self, request: Request) -> Result<(Reply, Vec<OwnedFd>), String> {
        let reply = match request {
            Request::Create => self.create()?,
            Request::Start => self.start()?,
            Request::PrepareRestore { criu } => self.prepare_restore(&criu)?,
            Request::Restore(spec) => self.restore(&spec)?,
            Request::RestoreProceed { go_on } => self.restore_proceed(go_on)?,
            Request::Fence => self.fence()?,
            Request::Unfence => self.unfence()?,
            Request::Signal { signal } => {
                let init = self.init.as_ref().ok_or("the container does not run")?;
                sys::send_signal(init.pidfd.as_fd(), signal)
                    .map_err(|error| format!("cannot send signal {signal}: {error}"))?;
                Reply::Done
            }
            Request::Exec(spec) => return self.exec(&spec),
            Request::SignalExec { exec_id, signal } => {
                let command = self.commands.iter().find(|command| command.id == exec_id);
                let command = command.ok_or_else(|| format!("no command {exec_id} runs"))?;
                sys::send_signal(command.pidfd.as_fd(), signal)
                    .map_err(|error| format!("cannot send signal {signal}: {error}"))?;
                Reply::Done
            }
            Request::Status => {
                self.state.log_lost_bytes = self.log.lost_bytes();
                Reply::Status(self.state.clone())
            }
            Request::Quit { kill } => {
                if self.restoring.is_some() {
                    self.give_up_restore();
                }
                if let Some(init) = &self.init {
                    if !kill {
                        return Err("the container still runs: stop it first, or quit with kill".into());
                    }
                    let cgroup = init.cgroup.clone();
                    cgroup.kill_all_reaping(|| self.reap()).map_err(|error| chain(&error))?;
                    self.reap();
                }
                self.drain_output();
                self.quit = true;
                Reply::Done
            }
        };
        Ok((reply, Vec::new()))
    }

    fn create(&mut self) -> Result<Reply, String> {
        if self.state.phase != Phase::New {
            return Err(format!("the container is {:?} already", self.state.phase));
        }
        let created = launch::create(&self.spec, &self.dir).map_err(|error| chain(&error))?;
        let pid = created.pid;
        self.adopt(created);
        Ok(Reply::Created { pid })
    }

    fn adopt(&mut self, created: Created) {
        let Created { pid, pidfd, sync, output, cgroup } = created;
        self.state.phase = Phase::Created;
        self.state.pid = Some(pid);
        self.state.pid_start_ticks = sys::start_time_ticks(pid).ok();
        self.state.created_unix_ms = Some(unix_ms_now());
        self.state.stdout_pipe = Some(output.stdout_inode);
        self.state.stderr_pipe = Some(output.stderr_inode);
        self.output = [Some(output.stdout), Some(output.stderr)];
        self.init = Some(Init { pid, pidfd, cgroup, sync: Some(sync) });
        self.save_state();
    }

    fn start(&mut self) -> Result<Reply, String> {
        self.check_lease()?;
        let waiting = self.init.as_mut().and_then(|init| init.sync.take());
        let mut sync = waiting.ok_or("there is no created container to start")?;
        launch::start(&mut sync).map_err(|error| chain(&error))?;
        self.state.phase = Phase::Running;
        self.state.started_unix_ms = Some(unix_ms_now());
        self.save_state();
        Ok(Reply::Started)
    }

    fn exec(&mut self, spec: &super::protocol::ExecSpec) -> Result<(Reply, Vec<OwnedFd>), String> {
        let init = self.init.as_ref().filter(|_| self.state.phase == Phase::Running);
        let init = init.ok_or("the container does not run")?;
        // A process that joins a frozen cgroup would stop there, with the keeper waiting for it.
        if init.cgroup.is_frozen().map_err(|error| chain(&error))? {
            return Err("the container is frozen: try again when it runs".into());
        }
        let id = self.next_exec_id;
        let (command, fds) =
            exec::start(id, spec, &init.pidfd, &init.cgroup, self.spec.id_base).map_err(|error| chain(&error))?;
        self.next_exec_id += 1;
        self.commands.push(command);
        self.count_commands();
        Ok((Reply::Exec { exec_id: id }, fds))
    }

    fn count_commands(&mut self) {
        self.state.execs = u32::try_from(self.commands.len()).unwrap_or(u32::MAX);
        self.save_state();
    }

    /// Collects every child that has ended.
    pub(super) fn reap(&mut self) {
        // Signals of one kind merge: the descriptor says "at least one".
        while let Ok(Some(_)) = self.children.read_signal() {}
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
            if self.init.as_ref().is_some_and(|init| init.pid == pid) {
                self.init_ended(status);
            } else if let Some(at) = self.commands.iter().position(|command| command.pid == pid) {
                let command = self.commands.remove(at);
                self.count_commands();
                let exit = exit_of(status, false);
                self.tell(Event::ExecExited { exec_id: command.id, exit });
            } else if let Some(restoring) = &mut self.restoring {
                restoring.reaped(pid);
            }
        }
    }

    fn init_ended(&mut self, status: WaitStatus) {
        let Some(init) = self.init.take() else { return };
        let oom_killed = init.cgroup.usage().is_ok_and(|usage| usage.oom_kills > 0);
        let exit = exit_of(status, oom_killed);
        self.drain_output();
        self.state.phase = Phase::Exited;
        self.state.exit = Some(exit.clone());
        if let Err(error) = state::write_json(&self.dir.join(state::EXIT_FILE), &exit) {
            note(&format!("cannot write the exit record: {error}"));
        }
        self.save_state();
        self.tell(Event::Exited(exit));
    }

    /// What is in the pipes now; they hold a bounded amount.
    fn drain_output(&mut self) {
        const MAX_READS: usize = 64;
        for stream in [Stream::Stdout, Stream::Stderr] {
            for _ in 0..MAX_READS {
                if !self.copy_output(stream) {
                    break;
                }
            }
        }
        self.log.finish();
    }

    /// Copies what there is to the log; false when there is nothing (more).
    fn copy_output(&mut self, stream: Stream) -> bool {
        let Some(pipe) = &self.output[stream as usize] else { return false };
        let mut buffer = [0; OUTPUT_BYTES];
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => {
                self.output[stream as usize] = None;
                false
            }
            Ok(count) => {
                self.log.append(stream, &buffer[..count]);
                true
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            Err(error) => {
                note(&format!("lost the container's {}: {error}", stream.name()));
                self.output[stream as usize] = None;
                false
            }
        }
    }

    pub(super) fn save_state(&self) {
        if let Err(error) = state::write_json(&self.dir.join(state::STATE_FILE), &self.state) {
            note(&format!("cannot write the state: {error}"));
        }
    }
}

fn exit_of(status: WaitStatus, oom_killed: bool) -> Exit {
    Exit {
        code: status.exit_status(),
        signal: status.terminating_signal(),
        oom_killed,
        finished_at_unix_ms: unix_ms_now(),
    }
}
