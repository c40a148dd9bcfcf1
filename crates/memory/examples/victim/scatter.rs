//! Writes to single pages all over its memory: far more runs of pages than the kernel tells at once.

use crate::memory::{Random, map, read, write};

pub fn run(mib: usize) {
    let pages = mib * 256;
    let base = map(pages, false, -1);
    (0..pages).for_each(|page| write(base, page, page, 1));
    println!("ready");
    let mut random = Random(99);
    loop {
        // Every second page only, so that no two runs touch.
        let page = random.below(pages) & !1;
        write(base, page, page, read(base, page, page) + 1);
        // Slow enough that many pages are clean when a scan begins.
        (0..60).for_each(|_| std::hint::spin_loop());
    }
}
