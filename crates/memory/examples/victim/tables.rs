//! Writes whole page tables full of shared memory and lets go of them: the content stays, what told of the writes does not.

use nix::libc;

use crate::memory::{PAGE, Random, map, write};

/// What one page table covers, in pages.
const TABLE: usize = 512;
const TABLES: usize = 8;

pub fn run(seed: u64) {
    let base = map((TABLES + 1) * TABLE, true, -1);
    // SAFETY: within the mapping, which has one table more than is used.
    let base = unsafe { base.add(base.align_offset(TABLE * PAGE)) };
    (0..TABLES * TABLE).for_each(|page| write(base, page, 0, 1));
    println!("ready");
    let mut random = Random(seed);
    loop {
        let (first, value) = (random.below(TABLES) * TABLE, random.next());
        (first..first + TABLE).for_each(|page| write(base, page, 1, value));
        // SAFETY: pages of ours. The kernel lets go of a page table without entries (CONFIG_PT_RECLAIM, Linux 6.14).
        unsafe { libc::madvise(base.add(first * PAGE).cast(), TABLE * PAGE, libc::MADV_DONTNEED) };
        // Most are as they were when a round begins.
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
