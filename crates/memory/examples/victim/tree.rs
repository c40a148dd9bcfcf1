//! A tree of processes that checks itself: every page of private and shared memory has content that follows from its
//! number and a counter. Each process writes what it finds to its line of a report file.
//!
//! Line N of the report (128 bytes each): `turns errors longest_us`: the longest it took to look at four places.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use nix::libc;

use crate::memory::{Random, map, memfd, read, write};

const CHILDREN: usize = 3;
const PAUSE_US: u128 = 60_000;
pub const LINE: usize = 128;

pub fn run(report: &str, private_mib: usize, shared_mib: usize) {
    // SAFETY: a new session: nothing of the terminal or the test is left in the tree.
    unsafe { libc::setsid() };
    let pages = shared_mib * 256;
    let fd = memfd(pages.div_ceil(8).max(1));
    // SAFETY: plain system calls on a new segment.
    let sysv = unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, pages.div_ceil(8).max(1) * 4096, 0o600 | libc::IPC_CREAT);
        libc::shmat(id, std::ptr::null(), 0).cast::<u8>()
    };
    let small = pages.div_ceil(8).max(1);
    let shared = [(map(pages, true, -1), pages), (map(small, true, fd), small), (sysv, small)];
    for (base, pages) in shared {
        (0..pages).for_each(|page| write(base, page, page, expected(page, 9)));
    }
    let mut number = 0;
    for child in 1..=CHILDREN {
        // SAFETY: there is one thread.
        if unsafe { libc::fork() } == 0 {
            number = child;
            break;
        }
    }
    // The first has most, its children a share: so that sizes differ.
    let own = if number == 0 { private_mib * 256 } else { private_mib * 256 / 8 };
    check_forever(report, number, own, &shared);
}

fn expected(page: usize, salt: usize) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(salt as u64)
}

fn check_forever(report: &str, number: usize, own: usize, shared: &[(*mut u8, usize); 3]) {
    let base = map(own, false, -1);
    for page in 0..own {
        write(base, page, page, expected(page, number));
        write(base, page, page + 1, 0);
    }
    // A quarter is given back, a hole that must read as zero.
    let hole = own / 4..own / 2;
    // SAFETY: part of the mapping above.
    unsafe {
        libc::madvise(base.add(hole.start * 4096).cast(), hole.len() * 4096, libc::MADV_DONTNEED);
    }
    let file = std::fs::OpenOptions::new().write(true).open(report).unwrap();
    let mut random = Random(number as u64 + 77);
    let (mut turns, mut errors, mut longest, mut counter) = (0u64, 0u64, 0u128, vec![0u64; own]);
    let mut last = Instant::now();
    loop {
        for _ in 0..2000 {
            let before = Instant::now();
            let page = random.below(own);
            let want = if hole.contains(&page) { 0 } else { expected(page, number) };
            errors += u64::from(read(base, page, page) != want);
            errors += u64::from(read(base, page, page + 1) != counter[page]);
            if page.is_multiple_of(16) {
                counter[page] += 1;
                write(base, page, page + 1, counter[page]);
            }
            let (object, pages) = shared[random.below(3)];
            let page = random.below(pages);
            errors += u64::from(read(object, page, page) != expected(page, 9));
            write(object, page, page + 1 + number, turns);
            // A pause that long is the move itself: what counts is what comes after it.
            let took = before.elapsed().as_micros();
            longest = if took > PAUSE_US { 0 } else { longest.max(took) };
        }
        turns += 1;
        let took = last.elapsed().as_micros();
        longest = if took > PAUSE_US { 0 } else { longest };
        last = Instant::now();
        let line = format!("{turns} {errors} {longest}\n");
        let line = format!("{line:<width$}", width = LINE);
        file.write_all_at(line.as_bytes(), (number * LINE) as u64).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
