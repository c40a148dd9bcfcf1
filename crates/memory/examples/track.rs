//! Tracks the written pages of all processes of a cgroup for a while, as a move does while it copies, and copies nothing:
//! what tracking alone costs a program. `track CGROUP_PROCS_FILE EVERY_MS SECONDS` prints a line of JSON.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::{Pause, Target, Tracker};

/// Nobody is made to stand still: what is measured is the kernel's protection, and soft-dirty kernels need that.
struct Never;

impl Pause for Never {
    fn still(&self, _: &mut dyn FnMut()) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [procs, every_ms, seconds] = words.as_slice() else {
        eprintln!("usage: track CGROUP_PROCS_FILE EVERY_MS SECONDS");
        std::process::exit(2);
    };
    let every = Duration::from_millis(every_ms.parse().expect("EVERY_MS is a number of milliseconds"));
    let end = Instant::now() + Duration::from_secs(seconds.parse().expect("SECONDS is a number"));
    let pids = || -> Vec<i32> {
        let text = std::fs::read_to_string(procs).unwrap_or_else(|error| panic!("{procs}: {error}"));
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    let mut tracker = Tracker::new(Arc::new(Never)).unwrap();
    let (mut rounds, mut pages, mut untracked) = (0u64, 0u64, 0u64);
    let (mut stopped, mut busy) = (Duration::ZERO, Duration::ZERO);
    while Instant::now() < end {
        let began = Instant::now();
        let round = tracker.round(&pids(), Target::Running).unwrap();
        busy += began.elapsed();
        for process in &round.processes {
            stopped = stopped.max(process.stopped.unwrap_or_default());
            untracked += u64::from(process.untracked.is_some());
            // The first finds all that is there.
            pages += if rounds == 0 { 0 } else { process.pages.pages() };
        }
        rounds += 1;
        std::thread::sleep(every);
    }
    println!(
        "{{\"rounds\": {rounds}, \"pages_per_round\": {}, \"round_ms\": {:.2}, \"longest_stop_ms\": {:.2}, \
         \"untracked\": {untracked}}}",
        pages / rounds.saturating_sub(1).max(1),
        busy.as_secs_f64() * 1e3 / rounds.max(1) as f64,
        stopped.as_secs_f64() * 1e3,
    );
}
