//! Works on its memory like a store under load, and says each 250 ms how much it got done, per second that no other
//! program took the processor from it. To be stopped, or to wait in the kernel, counts against it.

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
        let (began, waited) = (Instant::now(), waited_for_processor());
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
        let time = began.elapsed().saturating_sub(waited_for_processor() - waited);
        println!("{}", done as f64 / time.as_secs_f64());
    }
}

/// How long this program was ready to run while others did (the second number of schedstat, in nanoseconds).
fn waited_for_processor() -> Duration {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0))
}
