//! Forks of tracked processes, seen the moment they happen.
//!
//! Which pages a process writes is told by its own page tables. A child that writes to shared memory and exits between
//! two rounds takes its page tables with it; so shared memory must know that there was such a child. The kernel holds a
//! fork until its event has been read, which is all that the thread here does, besides counting. (The child's tracking,
//! which would come with the event, is dropped: the next round arms it like every new process.)

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

use crate::sys::uffd::{Event, Userfaultfd};

/// Events taken from the kernel by one call.
const EVENTS: usize = 64;
const END: u64 = 0;

/// A watched address space; its forks are no longer counted once this is dropped.
pub(crate) struct Watched {
    shared: Arc<Shared>,
    key: u64,
    forks: Arc<AtomicU64>,
    pub uffd: Arc<Userfaultfd>,
}

impl Watched {
    /// Forks since the watch began.
    pub(crate) fn forks(&self) -> u64 {
        self.forks.load(Ordering::Acquire)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.shared.epoll, self.uffd.as_fd());
        self.shared.lock().remove(&self.key);
    }
}

type Spaces = HashMap<u64, (Arc<Userfaultfd>, Arc<AtomicU64>)>;

struct Shared {
    epoll: OwnedFd,
    spaces: Mutex<Spaces>,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Spaces> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread and what it watches.
pub(crate) struct ForkWatch {
    shared: Arc<Shared>,
    end: OwnedFd,
    thread: Option<JoinHandle<()>>,
    next_key: u64,
}

impl ForkWatch {
    pub(crate) fn start() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &end, EventData::new_u64(END), EventFlags::IN)?;
        let shared = Arc::new(Shared { epoll, spaces: Mutex::default() });
        let watching = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("godwit-forks".to_owned()).spawn(move || run(&watching))?;
        Ok(Self { shared, end, thread: Some(thread), next_key: END + 1 })
    }

    /// Watches an address space whose userfaultfd tells about forks.
    pub(crate) fn watch(&mut self, uffd: Userfaultfd) -> io::Result<Watched> {
        let (uffd, forks, key) = (Arc::new(uffd), Arc::new(AtomicU64::new(0)), self.next_key);
        self.next_key += 1;
        self.shared.lock().insert(key, (Arc::clone(&uffd), Arc::clone(&forks)));
        let watched = Watched { shared: Arc::clone(&self.shared), key, forks, uffd };
        epoll::add(&self.shared.epoll, watched.uffd.as_fd(), EventData::new_u64(key), EventFlags::IN)?;
        Ok(watched)
    }
}

impl Drop for ForkWatch {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut events = Vec::with_capacity(EVENTS);
    loop {
        events.clear();
        match epoll::wait(&shared.epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "forks of tracked processes are no longer seen");
                return;
            }
        }
        for event in &events {
            let key = event.data.u64();
            if key == END {
                return;
            }
            let space = shared.lock().get(&key).cloned();
            let Some((uffd, forks)) = space else { continue };
            // Counted before the child can run: reading the event lets it.
            forks.fetch_add(1, Ordering::AcqRel);
            match uffd.next_event() {
                Ok(Some(Event::Fork { child })) => drop(child),
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "forks of a tracked process are no longer seen");
                    let _ = epoll::delete(&shared.epoll, uffd.as_fd());
                }
            }
        }
    }
}
