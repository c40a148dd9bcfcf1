//! process_vm_readv(2).

use std::io;

use nix::libc;

use crate::pages::PageRange;

/// Ranges one call takes (UIO_MAXIOV).
pub(crate) const MAX_RANGES: usize = 1024;

/// Copies `ranges` of process `pid` one after the other into `buffer`, whose length is their sum. Gives back how many
/// bytes were copied: fewer when a page cannot be read. At most [`MAX_RANGES`] ranges.
pub(crate) fn read(pid: i32, ranges: &[PageRange], buffer: &mut [u8]) -> io::Result<usize> {
    debug_assert!(ranges.len() <= MAX_RANGES);
    debug_assert_eq!(ranges.iter().map(|r| r.bytes()).sum::<u64>(), buffer.len() as u64);
    let remote: Vec<libc::iovec> = ranges
        .iter()
        .map(|r| libc::iovec { iov_base: r.start as *mut libc::c_void, iov_len: r.bytes() as usize })
        .collect();
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the kernel writes only into `buffer`, which is exclusively ours for the call; addresses of the other
    // process are checked by the kernel.
    let copied = unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}
