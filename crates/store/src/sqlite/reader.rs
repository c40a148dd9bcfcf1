//! Threads that read. SQLite blocks, so no read runs on the caller's thread.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::database;
use crate::error::{OpenError, StoreFault};

/// Threads, each with its own connection.
const READER_THREADS: usize = 2;
/// Reads that wait for a thread; further callers wait before queueing.
const READ_QUEUE_REQUESTS: usize = 256;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;
type Queue = Arc<Mutex<Receiver<Option<(Job, OwnedSemaphorePermit)>>>>;

/// The queue to the reading threads.
pub(super) struct Readers {
    path: PathBuf,
    /// `None` tells one thread to end.
    jobs: Sender<Option<(Job, OwnedSemaphorePermit)>>,
    room: Arc<Semaphore>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Readers {
    pub(super) fn start(path: &Path) -> Result<Self, OpenError> {
        let (jobs, queue) = channel();
        let queue: Queue = Arc::new(Mutex::new(queue));
        let readers = Self {
            path: path.to_owned(),
            jobs,
            room: Arc::new(Semaphore::new(READ_QUEUE_REQUESTS)),
            threads: Mutex::new(Vec::with_capacity(READER_THREADS)),
        };
        for number in 0..READER_THREADS {
            let connection = database::reader_connection(path)?;
            let queue = Arc::clone(&queue);
            let thread = std::thread::Builder::new()
                .name(format!("store-read-{number}"))
                .spawn(move || serve(&queue, connection))
                .map_err(|source| {
                    readers.stop();
                    OpenError::Thread { path: path.to_owned(), source }
                })?;
            readers.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(readers)
    }

    /// Runs `read` on one of the threads.
    pub(super) async fn run<T, E>(
        &self,
        read: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreFault>,
    {
        let permit = Arc::clone(&self.room).acquire_owned().await.map_err(|_| StoreFault::Closed)?;
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // Who asked may have gone away.
            if !reply.is_closed() {
                let _ = reply.send(read(connection));
            }
        });
        self.jobs.send(Some((job, permit))).map_err(|_| StoreFault::Closed)?;
        match answer.await {
            Ok(result) => result.map_err(|error| database::fault(&self.path, error).into()),
            Err(_) => Err(StoreFault::Closed.into()),
        }
    }

    /// Ends the threads after what is queued, and waits for them. Later reads are refused.
    pub(super) fn stop(&self) {
        self.room.close();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for _ in &threads {
            let _ = self.jobs.send(None);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn serve(queue: &Queue, mut connection: Connection) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(Some((job, permit))) => {
                job(&mut connection);
                drop(permit);
            }
            Ok(None) | Err(_) => return,
        }
    }
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").field("path", &self.path).finish_non_exhaustive()
    }
}
