//! The filler's thread: faults first, events as they come, the rest behind them.
//!
//! One thread for all of it: what is copied and what a process gives back are then never decided at the same time.

mod fill;
mod late;

use std::collections::{HashSet, VecDeque};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::OwnedFd;

use self::late::Waiting;
use super::socket::{Listener, Message, receive};
use super::view::{Extent, Layout, Source};
use super::{Command, FillError, FillReport, Shared, SharedReport, SharedUse};
use crate::late::Awaited;
use crate::pages::PageRange;
use crate::store::{Key, PageStore};
use crate::sys::uffd::{Event, Userfaultfd};
use crate::tracker::ObjectKind;

/// What one turn copies in the background, in bytes.
const STEP_BYTES: u64 = 1 << 20;
/// Events taken from one process before others are looked at.
const EVENTS: usize = 64;
/// How often it is looked whether processes that nothing is done for are gone, in milliseconds: nothing tells us.
const LOOK_MS: u64 = 500;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const STREAM: u64 = 2;
const FIRST_SPACE: u64 = 3;

/// An address space.
struct AddressSpace {
    key: u64,
    inner_pid: i32,
    uffd: Userfaultfd,
    layout: Layout,
    /// What one copy may be at most; smaller where runs cross mappings.
    step: u64,
    /// While pages come late: the pass over what is here has come to this address.
    cursor: u64,
}

impl AddressSpace {
    /// What is to be filled next; only from one source, if one is named.
    fn next(&self, late: bool, only: Option<Key>) -> Option<(u64, Extent)> {
        self.layout.first(only, if late && only.is_none() { self.cursor } else { 0 })
    }
}

pub(super) struct Server {
    listener: Option<Listener>,
    stream: Option<UnixStream>,
    store: Arc<PageStore>,
    /// Pages that come while the processes run.
    late: Option<Waiting>,
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    inbox: Receiver<Command>,
    epoll: OwnedFd,
    spaces: Vec<AddressSpace>,
    /// Sources that more than one address space still draws from: their memory is kept until the end.
    kept: HashSet<Key>,
    /// Faults that must wait until a change of their address space is through.
    deferred: VecDeque<(u64, u64)>,
    next_key: u64,
    /// Every mapping is at its place.
    placed: bool,
    /// Everything runs.
    finished: bool,
    last_fault: Option<Instant>,
    last_look: Instant,
    began: Option<Instant>,
    report: FillReport,
}

type Result<T> = std::result::Result<T, FillError>;

fn milliseconds(ms: u64) -> rustix::time::Timespec {
    rustix::time::Timespec { tv_sec: (ms / 1000).cast_signed(), tv_nsec: (ms % 1000 * 1_000_000).cast_signed() }
}

fn kernel(doing: &'static str) -> impl FnOnce(rustix::io::Errno) -> FillError {
    move |source| FillError::Kernel { doing, source: source.into() }
}

impl Server {
    pub(super) fn new(
        listener: Listener,
        store: Arc<PageStore>,
        late: Option<Arc<Awaited>>,
        shared: Arc<Shared>,
        wake: Arc<OwnedFd>,
        inbox: Receiver<Command>,
    ) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(kernel("make an epoll"))?;
        let add = |fd: std::os::fd::BorrowedFd<'_>, key| {
            epoll::add(&epoll, fd, EventData::new_u64(key), EventFlags::IN).map_err(kernel("watch a descriptor"))
        };
        add(wake.as_fd(), WAKE)?;
        add(listener.as_fd(), LISTENER)?;
        Ok(Self {
            listener: Some(listener),
            stream: None,
            store,
            late: late.map(Waiting::new),
            shared,
            wake,
            inbox,
            epoll,
            spaces: Vec::new(),
            kept: HashSet::new(),
            deferred: VecDeque::new(),
            next_key: FIRST_SPACE,
            placed: false,
            finished: false,
            last_fault: None,
            last_look: Instant::now(),
            began: None,
            report: FillReport::default(),
        })
    }

    pub(super) fn run(mut self) {
        let result = self.serve();
        let failed = result.is_err();
        self.listener = None;
        self.stream = None;
        if !failed {
            // Closing the descriptors makes the processes ordinary ones, before anybody is told.
            self.spaces.clear();
        }
        let mut status = self.shared.lock();
        status.progress.processes = self.spaces.len();
        status.result = Some(result);
        self.shared.changed.notify_all();
        drop(status);
        // After an error processes must not go on with pages missing: their descriptors stay open until the end, which
        // is theirs or that of who uses us.
        while failed && !self.shared.cancelled.load(Ordering::Acquire) {
            self.drop_gone();
            if self.spaces.is_empty() {
                break;
            }
            // Who asks for something is told by its answer's end.
            while self.inbox.try_recv().is_ok() {}
            let mut fds = [rustix::event::PollFd::new(&*self.wake, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Some(&milliseconds(LOOK_MS)));
            let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        }
        self.spaces.clear();
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
    }

    fn serve(&mut self) -> Result<FillReport> {
        let mut events = Vec::with_capacity(EVENTS);
        let mut turn = Instant::now();
        loop {
            // Only what somebody waits for is put in while the filling is to stand still.
            let held = self.placed && godwit_hold::wanted("fill");
            if held {
                godwit_hold::tell_reached("fill");
            }
            let arrived = self.late.as_ref().is_some_and(Waiting::has_arrived);
            let busy = ((self.has_work() || (arrived && self.placed)) && !held) || !self.deferred.is_empty();
            let wait = milliseconds(if busy { 0 } else { LOOK_MS });
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(kernel("wait for events")(error)),
            }
            if busy {
                self.report.longest_turn = self.report.longest_turn.max(turn.elapsed());
            }
            turn = Instant::now();
            // What criu says decides what faults mean; then faults before anything else.
            let of = |wanted: fn(u64) -> bool| events.iter().map(|e| e.data.u64()).filter(move |key| wanted(*key));
            for key in of(|key| key == STREAM) {
                self.take_message(key)?;
            }
            for key in of(|key| key >= FIRST_SPACE) {
                self.take_events(key)?;
            }
            for key in of(|key| key < STREAM) {
                self.take_message(key)?;
            }
            if self.shared.cancelled.load(Ordering::Acquire) {
                return Err(FillError::Cancelled);
            }
            for _ in 0..self.deferred.len() {
                if let Some((key, address)) = self.deferred.pop_front() {
                    self.serve_fault(key, address)?;
                }
            }
            self.take_late(held)?;
            if self.placed && !held {
                self.fill_a_step(None)?;
            }
            if !busy && self.last_look.elapsed() >= Duration::from_millis(LOOK_MS) {
                self.drop_gone();
                if self.report.processes > 0 && self.spaces.is_empty() && !self.finished {
                    return Err(FillError::Gone);
                }
            }
            self.tell_progress();
            let full = self.late.is_none() && self.spaces.iter().all(|s| s.layout.is_empty());
            if self.finished && !held && full && self.deferred.is_empty() {
                self.kept.drain().for_each(|key| self.store.drop_key(key));
                self.report.left_bytes = self.store.bytes();
                self.report.elapsed = self.began.map(|b| b.elapsed()).unwrap_or_default();
                return Ok(self.report);
            }
        }
    }

    /// Lets go of address spaces that nobody has any more.
    fn drop_gone(&mut self) {
        self.last_look = Instant::now();
        let gone: Vec<_> = self.spaces.iter().filter(|s| s.uffd.is_gone()).map(|s| s.key).collect();
        gone.into_iter().for_each(|key| self.drop_space(key));
    }

    fn has_work(&self) -> bool {
        self.placed && self.spaces.iter().any(|s| s.next(self.late.is_some(), None).is_some())
    }

    fn tell_progress(&self) {
        let mut status = self.shared.lock();
        status.progress.processes = self.spaces.iter().filter(|s| !s.layout.is_empty()).count();
        status.progress.filled_bytes = self.report.filled_bytes;
        status.progress.faults = self.report.faults;
    }

    fn take_message(&mut self, key: u64) -> Result<()> {
        match key {
            WAKE => {
                let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
                while let Ok(command) = self.inbox.try_recv() {
                    match command {
                        Command::Restored { uses, answer } => {
                            let result = self.take_shared(&uses);
                            self.begin();
                            // Nobody waits any more if it took too long.
                            let _ = answer.send(result);
                        }
                        Command::Unattended => {
                            // It may have connected just now.
                            self.take_message(LISTENER)?;
                            if self.listener.is_some() {
                                return Err(FillError::Cancelled);
                            }
                        }
                    }
                }
            }
            LISTENER => {
                let stream = self.listener.as_ref().and_then(|l| l.accept().transpose());
                if let Some(stream) = stream {
                    let stream = stream.map_err(FillError::Listen)?;
                    epoll::add(&self.epoll, &stream, EventData::new_u64(STREAM), EventFlags::IN)
                        .map_err(kernel("watch a descriptor"))?;
                    self.stream = Some(stream);
                    // One criu, one connection.
                    self.listener = None;
                }
            }
            _ => {
                let Some(stream) = &self.stream else { return Ok(()) };
                match receive(stream).map_err(FillError::Protocol)? {
                    Message::Process { inner_pid, uffd } => self.add(inner_pid, Userfaultfd::new(uffd), None)?,
                    Message::Zombie => {}
                    // They must not run: shared memory would read as zero, and nothing would tell.
                    Message::Finished if !self.placed && self.store.has_objects() => {
                        return Err(FillError::SharedUnplaced);
                    }
                    Message::Finished => {
                        self.finished = true;
                        self.begin();
                    }
                    Message::Closed if self.finished => self.stream = None,
                    Message::Closed => return Err(FillError::RestoreFailed),
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self) {
        self.placed = true;
        self.began.get_or_insert_with(Instant::now);
    }

    fn add(&mut self, inner_pid: i32, uffd: Userfaultfd, layout: Option<Layout>) -> Result<()> {
        let key = self.next_key;
        self.next_key += 1;
        epoll::add(&self.epoll, uffd.as_fd(), EventData::new_u64(key), EventFlags::IN)
            .map_err(kernel("watch a process"))?;
        let layout = layout.unwrap_or_else(|| Layout::whole(self.source(Key::Process(inner_pid))));
        self.spaces.push(AddressSpace { key, inner_pid, uffd, layout, step: STEP_BYTES, cursor: 0 });
        self.report.processes += 1;
        Ok(())
    }

    fn source(&self, key: Key) -> Source {
        Source { key, space: self.store.space(key) }
    }

    /// Registers the mappings of shared objects; fills what cannot wait.
    fn take_shared(&mut self, uses: &[SharedUse]) -> Result<SharedReport> {
        let began = Instant::now();
        for shared_use in uses {
            let source = self.source(Key::Object(shared_use.object));
            let Some(space) = self.spaces.iter_mut().find(|s| s.inner_pid == shared_use.inner_pid) else { continue };
            // A mapping that cannot be registered (read-only) sees what others are filled with.
            if space.uffd.register(shared_use.range, crate::sys::uffd::Mode::Missing).is_ok() {
                space.layout.map(shared_use.range, source, shared_use.offset);
            }
        }
        let mut report = SharedReport::default();
        let objects: HashSet<_> = uses.iter().map(|u| (u.object, u.kind == ObjectKind::Anonymous)).collect();
        for (object, can_wait) in objects {
            let source = self.source(Key::Object(object));
            let held = source.space.bytes();
            let mappings: Vec<_> = uses.iter().filter(|u| u.object == object).collect();
            if !can_wait {
                while self.fill_a_step(Some(source.key))? {}
            }
            super::shared::write_rest(&source.space, &mappings, can_wait.then(|| self.covered(source.key)))?;
            let left = source.space.bytes();
            report.filled_bytes += held - left;
            report.lazy_bytes += left;
        }
        report.elapsed = began.elapsed();
        Ok(report)
    }

    /// The parts of a source that some address space will be filled with.
    fn covered(&self, key: Key) -> crate::pages::PageSet {
        self.spaces.iter().flat_map(|s| s.layout.parts_of(key)).collect()
    }

    /// Everything that a process has to say.
    fn take_events(&mut self, key: u64) -> Result<()> {
        for _ in 0..EVENTS {
            let Some(at) = self.spaces.iter().position(|s| s.key == key) else { return Ok(()) };
            let space = &mut self.spaces[at];
            match space.uffd.next_event() {
                Ok(None) => return Ok(()),
                Ok(Some(Event::Fault { address })) => {
                    self.report.faults += 1;
                    self.last_fault = Some(Instant::now());
                    self.serve_fault(key, address)?;
                }
                Ok(Some(Event::Fork { child })) => {
                    // What is missing in one is missing in both.
                    let layout = space.layout.clone();
                    self.kept.extend(layout.keys().filter(|key| matches!(key, Key::Process(_))));
                    let inner_pid = space.inner_pid;
                    self.add(-inner_pid, Userfaultfd::new(child), Some(layout))?;
                }
                Ok(Some(Event::Remap { from, to, bytes })) => {
                    space.layout.shift(PageRange { start: from, end: from + bytes }, to);
                    space.cursor = 0;
                }
                Ok(Some(Event::Remove { range })) => space.layout.cut_private(range),
                Ok(Some(Event::Unmap { range })) => space.layout.cut(range),
                Err(source) => return Err(FillError::Kernel { doing: "tell what a process did", source }),
            }
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // What nobody drew from, and what was kept for several.
        for key in self.kept.drain() {
            self.store.drop_key(key);
        }
    }
}
