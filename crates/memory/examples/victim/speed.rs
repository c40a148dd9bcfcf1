//! Works on its memory like a store under load, and says each 250 ms how much it got done.

use std::time::{Duration, Instant};

use crate::memory::{PAGE, Random, map, read, write};

const REPORT: Duration = Duration::from_millis(250);
/// Reads and computing for each write.
const READS: usize = 40;

/// `cold_permille` of the writes go anywhere, the others to a fiftieth of the memory.
pub fn run(mib: usize, cold_permille: usize) {
    let pages = mib * 256;
    let base = map(pages, false, -1);
    (0..pages).for_each(|page| write(base, page, page, page as u64 + 1));
    println!("ready");
    let mut random = Random(7);
    let mut sum = 0u64;
    loop {
        let began = Instant::now();
        let mut done = 0u64;
        while began.elapsed() < REPORT {
            for _ in 0..64 {
                for _ in 0..READS {
                    sum = sum.wrapping_add(read(base, random.below(pages), random.below(PAGE / 8)));
                }
                let spread = if random.below(1000) < cold_permille { pages } else { pages / 50 };
                write(base, random.below(spread), random.below(PAGE / 8), sum);
                done += 1;
            }
        }
        println!("{}", done as f64 / began.elapsed().as_secs_f64());
    }
}
