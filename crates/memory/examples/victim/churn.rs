//! Threads that write, map, unmap, move and give back memory at random, and fork children that do the same, some of
//! which live only for a moment; private and shared memory of all kinds. Runs until it is killed.

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::libc;

use crate::memory::{PAGE, Random, map, memfd, read, write};

const THREADS: usize = 4;
const SHARED_PAGES: usize = 256;
const AREA_PAGES: usize = 128;
/// Mappings one thread has at most.
const AREAS: usize = 24;
/// Children of children of …
const GENERATIONS: usize = 2;
/// Processes alive at a time.
const PROCESSES: u64 = 7;

/// How many processes there are, in memory they share.
static LIVING: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

fn living() -> &'static AtomicU64 {
    // SAFETY: set before the first use, to a page that is never unmapped and holds zeroes at first.
    unsafe { &*LIVING.load(Ordering::SeqCst) }
}

#[derive(Clone, Copy)]
struct Shared {
    base: *mut u8,
    fd: i32,
}

// SAFETY: addresses of mappings that are never unmapped.
unsafe impl Send for Shared {}

pub fn run(seed: u64) {
    let fd = memfd(SHARED_PAGES);
    // SAFETY: plain system calls on a new segment.
    let sysv = unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, SHARED_PAGES * PAGE, 0o600 | libc::IPC_CREAT);
        let base = libc::shmat(id, std::ptr::null(), 0);
        // It goes away with its last user.
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        base.cast::<u8>()
    };
    let path = format!("/dev/shm/godwit-victim-{}\0", std::process::id());
    // SAFETY: a terminated path; the file is unlinked while open.
    let named = unsafe {
        let fd = libc::open(path.as_ptr().cast(), libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, 0o600);
        assert_eq!(libc::ftruncate(fd, (SHARED_PAGES * PAGE) as i64), 0);
        libc::unlink(path.as_ptr().cast());
        fd
    };
    let shared = [
        Shared { base: map(SHARED_PAGES, true, -1), fd: -1 },
        Shared { base: map(SHARED_PAGES, true, fd), fd },
        Shared { base: sysv, fd: -1 },
        Shared { base: map(SHARED_PAGES, true, named), fd: named },
    ];
    LIVING.store(map(1, true, -1).cast(), Ordering::SeqCst);
    living().store(1, Ordering::SeqCst);
    println!("ready");
    threads(seed, shared, 0);
}

fn threads(seed: u64, shared: [Shared; 4], generation: usize) {
    let threads: Vec<_> = (0..THREADS)
        .map(|n| {
            let seed = seed.wrapping_mul(31).wrapping_add(n as u64 + 1) | 1;
            std::thread::spawn(move || churn(&mut Random(seed), shared, generation))
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

fn churn(random: &mut Random, shared: [Shared; 4], generation: usize) {
    let mut areas: Vec<(*mut u8, usize)> = Vec::new();
    loop {
        std::thread::sleep(Duration::from_micros(random.next() % 600));
        step(random, &mut areas);
        let object = shared[random.below(4)];
        for _ in 0..random.below(3) {
            write(object.base, random.below(SHARED_PAGES), random.below(512), random.next());
        }
        match random.below(400) {
            0..2 if generation < GENERATIONS => fork(random, shared, generation),
            2..8 => brief_child(random, shared),
            8..12 if object.fd >= 0 => write_by_call(random, object.fd),
            12..14 if object.fd >= 0 => map_briefly(random, object.fd),
            // SAFETY: a page of a mapping of ours; its content is given up.
            14 => unsafe {
                libc::madvise(object.base.add(random.below(SHARED_PAGES) * PAGE).cast(), PAGE, libc::MADV_REMOVE);
            },
            // SAFETY: as above; of shared memory only our view is given up.
            15 => unsafe {
                libc::madvise(object.base.cast(), SHARED_PAGES * PAGE, libc::MADV_DONTNEED);
            },
            _ => {}
        }
    }
}

fn step(random: &mut Random, areas: &mut Vec<(*mut u8, usize)>) {
    if areas.is_empty() || (areas.len() < AREAS && random.below(8) == 0) {
        areas.push((map(AREA_PAGES, false, -1), AREA_PAGES));
    }
    let at = random.below(areas.len());
    let (base, pages) = areas[at];
    match random.below(24) {
        // SAFETY: a mapping of this thread alone.
        0 => unsafe {
            libc::munmap(base.cast(), pages * PAGE);
            areas.swap_remove(at);
        },
        // SAFETY: as above.
        1 => unsafe {
            let moved = libc::mremap(base.cast(), pages * PAGE, (pages + 16) * PAGE, libc::MREMAP_MAYMOVE);
            // Fails where a part of it has a protection of its own.
            if moved == libc::MAP_FAILED {
                return;
            }
            areas[at] = (moved.cast(), pages + 16);
            if areas[at].1 > 4 * AREA_PAGES {
                libc::munmap(areas[at].0.cast(), areas[at].1 * PAGE);
                areas.swap_remove(at);
            }
        },
        // SAFETY: as above.
        2 => unsafe {
            let part = random.below(pages);
            libc::madvise(base.add(part * PAGE).cast(), (pages - part).min(9) * PAGE, libc::MADV_DONTNEED);
        },
        // To a place of its own, over what was there: what tracking remembers of the old place must not count.
        // SAFETY: both are mappings of this thread.
        3 if areas.len() > 1 => unsafe {
            let other = (at + 1) % areas.len();
            let (target, target_pages) = areas[other];
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let size = pages.min(target_pages) * PAGE;
            let moved = libc::mremap(base.cast(), pages * PAGE, size, flags, target);
            if moved != libc::MAP_FAILED {
                libc::munmap(target.add(size).cast(), target_pages * PAGE - size);
                areas[other] = (target, size / PAGE);
                areas.swap_remove(at);
            } else {
                // Where only a part is tracked so far, that are two mappings, which cannot be moved at once. Before the
                // kernel finds out, it has unmapped the target, and the end of what was to be moved.
                areas.swap_remove(at.max(other));
                areas.swap_remove(at.min(other));
            }
        },
        // Written, then taken away from itself: still to be carried.
        // SAFETY: as above.
        4 => unsafe {
            let page = base.add(random.below(pages) * PAGE);
            page.cast::<u64>().write_volatile(random.next());
            libc::mprotect(page.cast(), PAGE, [libc::PROT_NONE, libc::PROT_READ][random.below(2)]);
            if random.below(4) > 0 {
                libc::mprotect(base.cast(), pages * PAGE, libc::PROT_READ | libc::PROT_WRITE);
            } else {
                areas.swap_remove(at);
            }
        },
        5 => {
            let page = random.below(pages);
            let _ = read(base, page, 0);
            (0..PAGE / 8).for_each(|n| write(base, page, n, 0));
        }
        _ => {
            for _ in 0..random.below(12) {
                write(base, random.below(pages), random.below(512), random.next());
            }
        }
    }
    if areas.len() == 1 && areas[0].1 > 8 * AREA_PAGES {
        areas.clear();
    }
}

/// A child that churns on; it ends by itself after a while.
fn fork(random: &mut Random, shared: [Shared; 4], generation: usize) {
    let seed = random.next();
    if living().fetch_add(1, Ordering::SeqCst) >= PROCESSES {
        living().fetch_sub(1, Ordering::SeqCst);
        return;
    }
    // SAFETY: the child goes on with this thread alone and touches no lock of others but the allocator's, which fork
    // keeps usable.
    if unsafe { libc::fork() } == 0 {
        let lifetime = Duration::from_millis(100 + seed % 1500);
        let born = Instant::now();
        std::thread::spawn(move || {
            while born.elapsed() < lifetime {
                std::thread::sleep(Duration::from_millis(20));
            }
            living().fetch_sub(1, Ordering::SeqCst);
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        });
        threads(seed | 1, shared, generation + 1);
    }
    reap();
}

/// A child that writes to shared memory and is gone.
fn brief_child(random: &mut Random, shared: [Shared; 4]) {
    let (object, page, value) = (random.below(4), random.below(SHARED_PAGES), random.next());
    if living().fetch_add(1, Ordering::SeqCst) >= 2 * PROCESSES {
        living().fetch_sub(1, Ordering::SeqCst);
        return;
    }
    // SAFETY: the child only writes and exits.
    unsafe {
        if libc::fork() == 0 {
            write(shared[object].base, page, 7, value);
            living().fetch_sub(1, Ordering::SeqCst);
            libc::_exit(0);
        }
    }
    reap();
}

fn reap() {
    // SAFETY: takes nothing.
    unsafe { while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {} }
}

fn write_by_call(random: &mut Random, fd: i32) {
    let bytes = random.next().to_ne_bytes();
    let offset = (random.below(SHARED_PAGES) * PAGE + random.below(PAGE - 8)) as i64;
    // SAFETY: eight bytes of ours.
    unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), offset) };
}

/// A mapping that nobody else ever sees.
fn map_briefly(random: &mut Random, fd: i32) {
    let base = map(SHARED_PAGES, true, fd);
    write(base, random.below(SHARED_PAGES), 3, random.next());
    // SAFETY: mapped above.
    unsafe { libc::munmap(base.cast(), SHARED_PAGES * PAGE) };
}
