//! Writes to single pages all over its memory: far more runs of pages than the kernel tells at once.

use nix::libc;

use crate::memory::{PAGE, Random, map, read, write};

/// Where it counts its writes.
const COUNTER: usize = 0x5000_0000_0000;

pub fn run(mib: usize) {
    let pages = mib * 256;
    let base = map(pages, false, -1);
    (0..pages).for_each(|page| write(base, page, page, 1));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the place is free, or the call fails.
    let counter = unsafe { libc::mmap(COUNTER as *mut libc::c_void, PAGE, protection, flags, -1, 0) };
    assert_eq!(counter as usize, COUNTER, "{}", std::io::Error::last_os_error());
    let (counter, mut writes) = (counter.cast(), 0);
    write(counter, 0, 0, writes);
    println!("ready");
    let mut random = Random(99);
    loop {
        // Every second page only, so that no two runs touch.
        let page = random.below(pages) & !1;
        write(base, page, page, read(base, page, page) + 1);
        writes += 1;
        write(counter, 0, 0, writes);
        // Slow enough that many pages are clean when a scan begins.
        (0..60).for_each(|_| std::hint::spin_loop());
    }
}
