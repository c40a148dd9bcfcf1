//! Which pages another process has, as criu reads it: /proc/PID/pagemap by pread(2).

use std::os::unix::fs::FileExt;

/// Prints a figure for each of `pages` pages from `start` on: 1 for one that is there.
pub fn run(pid: &str, start: u64, pages: usize) {
    let pagemap = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut entries = vec![0xff; pages * 8];
    pagemap.read_exact_at(&mut entries, start / godwit_memory::page_size() * 8).unwrap();
    let there = |entry: &[u8]| if u64::from_ne_bytes(entry.try_into().unwrap()) >> 62 == 0 { '0' } else { '1' };
    println!("{}", entries.chunks_exact(8).map(there).collect::<String>());
}
