//! The socket by which a restoring criu hands out its processes' userfaultfds (`send_uffd` in its uffd.c): a stream of
//!
//! ```text
//! i32  number of a process in its own pid namespace, then one byte with a descriptor (SCM_RIGHTS)
//! i32  < 0: a zombie; nothing follows
//! i32  0x52535446: the restore is finished, everything runs
//! ```

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// `LAZY_PAGES_SOCK_NAME`
const NAME: &str = "lazy-pages.socket";
/// `LAZY_PAGES_RESTORE_FINISHED`
const FINISHED: i32 = 0x5253_5446;
/// How long the rest of a message may take, in milliseconds: both ends are on this host.
const REST_MS: u64 = 5_000;

pub(super) enum Message {
    Process { inner_pid: i32, uffd: OwnedFd },
    Zombie,
    Finished,
    Closed,
}

/// Where criu that works in `work_directory` connects to.
pub(crate) fn socket_path(work_directory: &Path) -> PathBuf {
    work_directory.join(NAME)
}

/// The listening socket; its name is removed with it.
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens in CRIU's work directory.
    pub(crate) fn bind(work_directory: &Path) -> io::Result<Self> {
        let directory = File::open(work_directory)?;
        let path = socket_path(work_directory);
        let _ = std::fs::remove_file(&path);
        // Names of sockets have 107 bytes at most; this one is short wherever the directory is.
        let short = format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd());
        let listener = UnixListener::bind(short)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(Duration::from_millis(REST_MS)))?;
                Ok(Some(stream))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The next message of a stream that has something to read.
pub(super) fn receive(stream: &UnixStream) -> io::Result<Message> {
    let mut number = [0; 4];
    let mut got = 0;
    while got < number.len() {
        match receive_some(stream, &mut number[got..])? {
            (0, _) if got == 0 => return Ok(Message::Closed),
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (n, _) => got += n,
        }
    }
    match i32::from_ne_bytes(number) {
        FINISHED => Ok(Message::Finished),
        pid if pid <= 0 => Ok(Message::Zombie),
        inner_pid => match receive_some(stream, &mut [0])? {
            (1, Some(uffd)) => Ok(Message::Process { inner_pid, uffd }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a process without a descriptor")),
        },
    }
}

fn receive_some(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let result = loop {
        match recvmsg(stream, &mut [io::IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((result.bytes, fd))
}
