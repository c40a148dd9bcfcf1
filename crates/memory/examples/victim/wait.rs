//! Programs that wait in a system call, and say how that ended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::libc;

const WAIT: Duration = Duration::from_millis(700);

/// Waits [`WAIT`] in a system call of a kind; prints its result, its error and how long it took in milliseconds.
pub fn run(kind: &str) {
    println!("ready");
    let time = libc::timespec { tv_sec: 0, tv_nsec: WAIT.as_nanos() as i64 };
    let ms = WAIT.as_millis() as i32;
    let mut remaining = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let began = Instant::now();
    // SAFETY: every pointer is to a live value of the type its call takes.
    let result = unsafe {
        match kind {
            "nanosleep" => i64::from(libc::nanosleep(&raw const time, &raw mut remaining)),
            "poll" => {
                let mut none: [libc::pollfd; 0] = [];
                i64::from(libc::poll(none.as_mut_ptr(), 0, ms))
            }
            "ppoll" => {
                let mut mask = std::mem::zeroed();
                libc::sigemptyset(&raw mut mask);
                let mut none: [libc::pollfd; 0] = [];
                i64::from(libc::ppoll(none.as_mut_ptr(), 0, &raw const time, &raw const mask))
            }
            "epoll" => {
                let epoll = libc::epoll_create1(0);
                let mut event = std::mem::zeroed();
                i64::from(libc::epoll_wait(epoll, &raw mut event, 1, ms))
            }
            "futex" => {
                let word = 0u32;
                let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
                libc::syscall(libc::SYS_futex, &raw const word, op, 0, &raw const time)
            }
            "read" => {
                let mut ends = [0; 2];
                libc::pipe(ends.as_mut_ptr());
                let writer = ends[1];
                std::thread::spawn(move || {
                    std::thread::sleep(WAIT);
                    // SAFETY: one byte of ours.
                    libc::write(writer, c"x".as_ptr().cast(), 1);
                });
                let mut byte = 0u8;
                libc::read(ends[0], (&raw mut byte).cast(), 1) as i64
            }
            "run" => {
                // Not in a system call at all: the registers of a computation.
                let (mut sum, mut turns) = (0u64, 0u64);
                while began.elapsed() < WAIT {
                    sum = (0..1000u64).fold(sum, |s, n| std::hint::black_box(s.rotate_left(7) ^ n));
                    turns += 1;
                }
                let again = (0..turns).fold(0u64, |s, _| (0..1000u64).fold(s, |s, n| s.rotate_left(7) ^ n));
                i64::from(sum != again)
            }
            _ => panic!("unknown wait {kind}"),
        }
    };
    let error = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
    println!("{result} {error} {}", began.elapsed().as_millis());
}

static SEEN: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: i32) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

/// Counts a queued signal that is only let in during ppoll; SIGTERM ends it and prints the count.
pub fn count_signals() {
    // SAFETY: the handler touches one atomic; the sets are initialised before use.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut());
        let (mut blocked, mut open): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigemptyset(&raw mut open);
        libc::sigaddset(&raw mut open, libc::SIGTERM);
        libc::sigemptyset(&raw mut blocked);
        libc::sigaddset(&raw mut blocked, libc::SIGTERM);
        libc::sigaddset(&raw mut blocked, libc::SIGRTMIN());
        libc::sigprocmask(libc::SIG_SETMASK, &raw const blocked, std::ptr::null_mut());
        println!("ready");
        loop {
            let limit = libc::timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            libc::ppoll(std::ptr::null_mut(), 0, &raw const limit, &raw const open);
            let mut pending = std::mem::zeroed();
            libc::sigpending(&raw mut pending);
            let more = libc::sigismember(&raw const pending, libc::SIGRTMIN()) == 1;
            if !more && libc::sigismember(&raw const pending, libc::SIGTERM) == 1 {
                break;
            }
        }
        let mut now = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, std::ptr::null(), &raw mut now);
        let mask_kept = libc::sigismember(&raw const now, libc::SIGRTMIN()) == 1;
        println!("{} {mask_kept}", SEEN.load(Ordering::SeqCst));
    }
}
