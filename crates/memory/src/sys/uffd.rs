//! userfaultfd(2): write tracking at the source, filling at the destination. The descriptor belongs to one address
//! space, whoever holds it (ioctl_userfaultfd(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

use crate::pages::PageRange;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFD_API: u64 = 0xaa;

/// UFFD_USER_MODE_ONLY, the one kind of userfaultfd that needs neither a capability nor
/// vm.unprivileged_userfaultfd. Asynchronous write protection never waits for us, so it loses nothing by it.
pub(crate) const USER_MODE_ONLY: u64 = 1;
pub(crate) const FEATURE_EVENT_FORK: u64 = 1 << 1;
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;

#[derive(Clone, Copy)]
pub(crate) enum Mode {
    Missing = 1,
    WriteProtect = 2,
}

/// What a process did to its memory (struct uffd_msg).
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread waits for this page.
    Fault {
        address: u64,
    },
    /// The child's copy of the address space has this descriptor.
    Fork {
        child: OwnedFd,
    },
    Remap {
        from: u64,
        to: u64,
        bytes: u64,
    },
    /// MADV_DONTNEED and the like: reads as zero from now on.
    Remove {
        range: PageRange,
    },
    Unmap {
        range: PageRange,
    },
}

#[derive(Debug)]
pub(crate) struct Userfaultfd(OwnedFd);

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How far a copy or a run of zeroes got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    All,
    /// So many bytes; the address space is being changed, which an event tells about. Try again after it.
    Partly {
        bytes: u64,
    },
    /// The first page is there already.
    Present,
    /// Nothing (or nothing that we were told to fill) is mapped there any more.
    Unmapped,
    /// The process is gone.
    Gone,
}

impl Userfaultfd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// One of this process's own.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        // SAFETY: the call takes flags only and makes a descriptor that nobody else has.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC as u64) };
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        let number = i32::try_from(made).map_err(io::Error::other)?;
        // SAFETY: as above; it is open and ours.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    /// UFFDIO_API: must come first, once.
    pub(crate) fn enable(&self, features: u64) -> io::Result<()> {
        let mut argument = [UFFD_API, features, 0u64];
        self.ioctl(UFFDIO_API, &mut argument)
    }

    /// Registers what is mapped in `range`. Registering again what is registered changes nothing.
    pub(crate) fn register(&self, range: PageRange, mode: Mode) -> io::Result<()> {
        let mut argument = [range.start, range.bytes(), mode as u64, 0];
        self.ioctl(UFFDIO_REGISTER, &mut argument)
    }

    /// Write-protects what is mapped in `range`, also where nothing is in the page table.
    pub(crate) fn write_protect(&self, range: PageRange) -> io::Result<()> {
        let mut argument = [range.start, range.bytes(), 1];
        self.ioctl(UFFDIO_WRITEPROTECT, &mut argument)
    }

    /// Lets threads that wait for pages of `range` look again.
    pub(crate) fn wake(&self, range: PageRange) -> io::Result<()> {
        let mut argument = [range.start, range.bytes()];
        self.ioctl(UFFDIO_WAKE, &mut argument)
    }

    /// Puts `bytes` bytes from `source` at `to`, and wakes who waits for them.
    ///
    /// # Safety
    /// `source` must be readable for `bytes` bytes during the call.
    pub(crate) unsafe fn copy(&self, to: u64, source: *const u8, bytes: u64) -> io::Result<Filled> {
        let mut argument = [to, source as u64, bytes, 0, 0];
        let result = self.ioctl(UFFDIO_COPY, &mut argument);
        outcome(result, argument[4])
    }

    /// Puts zeroes at `range`, and wakes who waits for them.
    pub(crate) fn zero(&self, range: PageRange) -> io::Result<Filled> {
        let mut argument = [range.start, range.bytes(), 0, 0];
        let result = self.ioctl(UFFDIO_ZEROPAGE, &mut argument);
        outcome(result, argument[3])
    }

    /// Whether all processes with this address space are gone.
    pub(crate) fn is_gone(&self) -> bool {
        // The kernel looks for the address space first.
        let nowhere = PageRange { start: 1 << 20, end: (1 << 20) + crate::pages::page_size() };
        self.unprotect(nowhere).is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH))
    }

    /// Whether `range`, a part of one mapping, is registered for write protection. Nothing of it must be protected. A
    /// huge page of which it is a part is split.
    pub(crate) fn is_registered(&self, range: PageRange) -> bool {
        self.unprotect(range).is_ok()
    }

    /// Takes write protection away, which changes nothing where there is none. Wakes nobody, who would only look again.
    fn unprotect(&self, range: PageRange) -> io::Result<()> {
        const WITHOUT_WAKING: u64 = 1 << 1;
        let mut argument = [range.start, range.bytes(), WITHOUT_WAKING];
        self.ioctl(UFFDIO_WRITEPROTECT, &mut argument)
    }

    /// The next event, or `None` if there is none now.
    pub(crate) fn next_event(&self) -> io::Result<Option<Event>> {
        // struct uffd_msg: the event in the first byte, three words from byte 8.
        let mut message = [0u8; 32];
        match rustix::io::read(&self.0, &mut message) {
            Ok(32) => {}
            Ok(_) => return Ok(None),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let word = |n: usize| {
            let at = 8 + 8 * n;
            u64::from_ne_bytes(message[at..at + 8].try_into().unwrap_or_default())
        };
        let range = PageRange { start: word(0), end: word(1) };
        Ok(Some(match message[0] {
            // The word of flags comes first.
            0x12 => Event::Fault { address: word(1) },
            0x13 => {
                let fd = (word(0) & 0xffff_ffff) as i32;
                // SAFETY: reading the event made this descriptor, for us alone.
                Event::Fork { child: unsafe { OwnedFd::from_raw_fd(fd) } }
            }
            0x14 => Event::Remap { from: word(0), to: word(1), bytes: word(2) },
            0x15 => Event::Remove { range },
            0x16 => Event::Unmap { range },
            other => return Err(io::Error::other(format!("unknown userfaultfd event {other:#x}"))),
        }))
    }

    fn ioctl<const WORDS: usize>(&self, request: libc::c_ulong, argument: &mut [u64; WORDS]) -> io::Result<()> {
        // SAFETY: each request above reads and writes a structure of exactly as many words as its caller passes.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// `done` is the kernel's count of bytes, or a negative error number.
fn outcome(result: io::Result<()>, done: u64) -> io::Result<Filled> {
    let Err(error) = result else { return Ok(Filled::All) };
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(Filled::Partly { bytes: u64::try_from(done.cast_signed()).unwrap_or(0) }),
        Some(libc::EEXIST) => Ok(Filled::Present),
        // EINVAL: the range has become shorter than what is asked for, or is no longer registered.
        Some(libc::ENOENT | libc::EINVAL) => Ok(Filled::Unmapped),
        Some(libc::ESRCH) => Ok(Filled::Gone),
        _ => Err(error),
    }
}
