//! What the kernel does for one file: write it back, tell where it is on the disk.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::libc;

/// `_IOWR('f', 11, struct fiemap)`.
const FIEMAP: libc::c_ulong = 0xc020_660b;
/// Extents told by one call, 56 bytes each.
const EXTENTS: usize = 512;

pub(crate) const LAST: u32 = 0x1;
/// Not on the disk yet, or nobody can say where.
pub(crate) const UNKNOWN: u32 = 0x2;
pub(crate) const DELAYED: u32 = 0x4;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RawExtent {
    pub logical: u64,
    pub physical: u64,
    pub length: u64,
    reserved: [u64; 2],
    pub flags: u32,
    more_reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
    extents: [RawExtent; EXTENTS],
}

/// The file's extents from `start` on, at most [`EXTENTS`] of them. Fails where the file system does not tell
/// (`EOPNOTSUPP`).
pub(crate) fn extents(file: &File, start: u64) -> io::Result<Vec<RawExtent>> {
    let mut request = Request {
        start,
        length: u64::MAX - start,
        flags: 0,
        mapped: 0,
        room: EXTENTS as u32,
        reserved: 0,
        extents: [RawExtent::default(); EXTENTS],
    };
    // SAFETY: the kernel writes at most `room` extents behind the head, which is what there is.
    if unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request.extents[..(request.mapped as usize).min(EXTENTS)].to_vec())
}

/// Writes changed pages within `bytes` to the disk and waits for it: every page there that was dirty when this began has
/// been clean in between. The disk may still have them in its own cache.
pub(crate) fn write_back(file: &File, bytes: Range<u64>) -> io::Result<()> {
    // With all three the kernel waits for pages that are on their way already, and writes them once more.
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (start, length) = (i64::try_from(bytes.start), i64::try_from(bytes.end.saturating_sub(bytes.start)));
    let (Ok(start), Ok(length)) = (start, length) else { return Err(io::ErrorKind::InvalidInput.into()) };
    // To the kernel a length of zero is all there is.
    if length == 0 {
        return Ok(());
    }
    // SAFETY: no addresses.
    if unsafe { libc::sync_file_range(file.as_raw_fd(), start, length, how) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
