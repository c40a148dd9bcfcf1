//! bpf(2): each command behind a function that keeps alive what the kernel reads and writes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const PROG_LOAD: libc::c_int = 5;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const MAP_LOOKUP_AND_DELETE_BATCH: libc::c_int = 25;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;

/// Tries of a load that was interrupted, as by a signal.
const LOAD_TRIES: u32 = 5;
/// Bytes of `union bpf_attr` that are passed; what a command does not know of it must be zero, and is.
const ATTRIBUTE_BYTES: usize = 128;

/// `union bpf_attr`, filled field by field.
#[repr(C, align(8))]
struct Attribute {
    bytes: [u8; ATTRIBUTE_BYTES],
}

impl Attribute {
    fn new() -> Self {
        Self { bytes: [0; ATTRIBUTE_BYTES] }
    }

    fn u32(mut self, at: usize, value: u32) -> Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, at: usize, value: u64) -> Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(at, fd.as_raw_fd().cast_unsigned())
    }

    fn name(mut self, at: usize, name: &str) -> Self {
        // 16 bytes with the zero at the end; letters, digits, dots and underscores only.
        let letters = name.bytes().filter(|b| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'.').take(15);
        self.bytes[at..].iter_mut().zip(letters).for_each(|(to, from)| *to = from);
        self
    }
}

/// # Safety
/// Every address in `attribute` must be valid for what `command` does with it.
unsafe fn bpf(command: libc::c_int, attribute: &mut Attribute) -> io::Result<RawFd> {
    // SAFETY: the kernel reads and writes at most the size passed; the caller vouches for addresses in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attribute, ATTRIBUTE_BYTES) };
    RawFd::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

/// # Safety
/// As [`bpf`]; besides, `command` must be one that answers with a new descriptor. It has close-on-exec.
unsafe fn bpf_fd(command: libc::c_int, attribute: &mut Attribute) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says; what comes back belongs to nobody yet.
    unsafe { bpf(command, attribute).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// What a program is and hangs on, in the numbers of `bpf.h`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProgramType {
    pub program: u32,
    pub attach: u32,
    /// The kernel's function or type it is made for; 0: none.
    pub btf_id: u32,
}

/// Loads `code` (instructions of 8 bytes). The verifier's words come into `log` if it has room for any, ended by a zero.
pub(crate) fn load(kind: ProgramType, name: &str, license: &[u8], code: &[u8], log: &mut [u8]) -> io::Result<OwnedFd> {
    debug_assert!(license.last() == Some(&0) && code.len().is_multiple_of(8));
    let mut attribute = Attribute::new()
        .u32(0, kind.program)
        .u32(4, (code.len() / 8) as u32)
        .u64(8, code.as_ptr() as u64)
        .u64(16, license.as_ptr() as u64)
        .name(48, name)
        .u32(68, kind.attach)
        .u32(108, kind.btf_id);
    if !log.is_empty() {
        attribute = attribute.u32(24, 1).u32(28, log.len() as u32).u64(32, log.as_mut_ptr() as u64);
    }
    let mut tries = 0;
    loop {
        tries += 1;
        // SAFETY: the kernel reads code and license, which outlive the call, and writes at most `log.len()` bytes.
        match unsafe { bpf_fd(PROG_LOAD, &mut attribute) } {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries < LOAD_TRIES => {}
            other => return other,
        }
    }
}

/// Attaches to a tracepoint: by name, or to the one the program was loaded for.
pub(crate) fn open_tracepoint(program: BorrowedFd<'_>, name: Option<&std::ffi::CStr>) -> io::Result<OwnedFd> {
    let mut attribute = Attribute::new().u64(0, name.map_or(0, |n| n.as_ptr() as u64)).fd(8, program);
    // SAFETY: the kernel reads the name, which outlives the call.
    unsafe { bpf_fd(RAW_TRACEPOINT_OPEN, &mut attribute) }
}

/// A link of an iterator over one thread (number in the caller's pid namespace).
pub(crate) fn link_iterator(program: BorrowedFd<'_>, attach: u32, tid: i32) -> io::Result<OwnedFd> {
    // union bpf_iter_link_info, of which task { tid, pid, pid_fd }.
    let info = [tid.cast_unsigned(), 0, 0, 0];
    let mut attribute =
        Attribute::new().fd(0, program).u32(8, attach).u64(16, info.as_ptr() as u64).u32(24, size_of_val(&info) as u32);
    // SAFETY: the kernel reads `info`, which outlives the call.
    unsafe { bpf_fd(LINK_CREATE, &mut attribute) }
}

/// One run of an iterator, to be read like a file.
pub(crate) fn run_iterator(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no addresses.
    unsafe { bpf_fd(ITER_CREATE, &mut Attribute::new().fd(0, link)) }
}

pub(crate) fn create_map(kind: u32, key: u32, value: u32, entries: u32, name: &str) -> io::Result<OwnedFd> {
    let attribute = Attribute::new().u32(0, kind).u32(4, key).u32(8, value).u32(12, entries);
    // SAFETY: no addresses.
    unsafe { bpf_fd(MAP_CREATE, &mut attribute.name(28, name)) }
}

/// The sizes a map was made with, in bytes. Every access is checked against them: the kernel takes pointers only.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapSizes {
    pub key: usize,
    pub value: usize,
}

fn right_sizes(sizes: MapSizes, key: usize, value: usize) -> io::Result<()> {
    if (sizes.key, sizes.value) == (key, value) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Reads one value; false if there is none for this key.
pub(crate) fn map_lookup(map: BorrowedFd<'_>, sizes: MapSizes, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    right_sizes(sizes, key.len(), value.len())?;
    let attribute = Attribute::new().fd(0, map).u64(8, key.as_ptr() as u64);
    // SAFETY: the kernel reads a key and writes a value of the map's sizes, which were checked.
    found(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attribute.u64(16, value.as_mut_ptr() as u64)) })
}

pub(crate) fn map_update(map: BorrowedFd<'_>, sizes: MapSizes, key: &[u8], value: &[u8]) -> io::Result<()> {
    right_sizes(sizes, key.len(), value.len())?;
    let attribute = Attribute::new().fd(0, map).u64(8, key.as_ptr() as u64);
    // SAFETY: the kernel reads a key and a value of the map's sizes, which were checked.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attribute.u64(16, value.as_ptr() as u64)) }.map(drop)
}

/// False if there was none for this key.
pub(crate) fn map_delete(map: BorrowedFd<'_>, sizes: MapSizes, key: &[u8]) -> io::Result<bool> {
    right_sizes(sizes, key.len(), sizes.value)?;
    // SAFETY: the kernel reads a key of the map's size, which was checked.
    found(unsafe { bpf(MAP_DELETE_ELEM, &mut Attribute::new().fd(0, map).u64(8, key.as_ptr() as u64)) })
}

fn found(result: io::Result<RawFd>) -> io::Result<bool> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        other => other.map(|_| true),
    }
}

/// What [`map_take`] took, and whether there may be more.
pub(crate) struct Taken {
    pub count: usize,
    pub more: bool,
}

/// Takes entries out of a hash, as many as fit: `keys` and `values` have room for the same number. `cursor` is zero at
/// the beginning and is to be passed on from call to call.
pub(crate) fn map_take(
    map: BorrowedFd<'_>,
    sizes: MapSizes,
    cursor: &mut Option<u32>,
    keys: &mut [u8],
    values: &mut [u8],
) -> io::Result<Taken> {
    let room = keys.len() / sizes.key;
    right_sizes(MapSizes { key: room * sizes.key, value: room * sizes.value }, keys.len(), values.len())?;
    let before = *cursor;
    let mut after = 0u32;
    let mut attribute = Attribute::new()
        .u64(0, before.as_ref().map_or(0, |c| std::ptr::from_ref(c) as u64))
        .u64(8, &raw mut after as u64)
        .u64(16, keys.as_mut_ptr() as u64)
        .u64(24, values.as_mut_ptr() as u64)
        .u32(32, u32::try_from(room).unwrap_or(u32::MAX))
        .fd(36, map);
    // SAFETY: the kernel reads and writes a hash's cursor of 4 bytes, and at most `room` keys and values.
    let result = unsafe { bpf(MAP_LOOKUP_AND_DELETE_BATCH, &mut attribute) };
    let mut count = [0; 4];
    count.copy_from_slice(&attribute.bytes[32..36]);
    let count = u32::from_ne_bytes(count) as usize;
    *cursor = Some(after);
    match result {
        Ok(_) => Ok(Taken { count, more: true }),
        // The last of them.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Taken { count, more: false }),
        Err(error) => Err(error),
    }
}
