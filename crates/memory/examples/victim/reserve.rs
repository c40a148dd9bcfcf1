//! Much address space, little memory.

use nix::libc;

use crate::memory::{PAGE, map, write};

/// Reserves so many GiB, and writes to one page in the middle if it is `touched`; four written pages are elsewhere.
pub fn run(gib: usize, touched: bool) {
    let bytes = gib << 30;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    // One page, not a huge one.
    // SAFETY: advice on the mapping made above.
    unsafe { libc::madvise(base, bytes, libc::MADV_NOHUGEPAGE) };
    if touched {
        write(base.cast(), bytes / PAGE / 2, 0, 1);
    }
    let small = map(4, false, -1);
    (0..4).for_each(|page| write(small, page, 0, 1));
    println!("ready");
    loop {
        std::thread::park();
    }
}
