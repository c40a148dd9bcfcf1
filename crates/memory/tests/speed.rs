//! What tracking costs the program that is tracked, and how long a round takes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Victim, root_or_skip};
use godwit_memory::{Target, Tracker};

/// Memory of the program, in MiB.
const MIB: usize = 1024;
/// Reports of the program in each part of the measurement; one comes every 250 ms.
const REPORTS: usize = 6;
/// Between two rounds, in milliseconds: what copying takes. The cost is a fault for each page that is written in a
/// round, so it falls with the time between rounds.
const BETWEEN_ROUNDS_MS: [u64; 3] = [100, 250, 1000];
/// What a move may do while it copies.
const BOUND_MS: u64 = 250;
/// Comparisons for each; the machine is shared, and each has its own two halves.
const TIMES: usize = 2;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn a_tracked_program_keeps_its_speed() {
    if !root_or_skip() {
        return;
    }
    let mut victim = Victim::start(&["speed", &MIB.to_string()]);
    let mut best = 0.0f64;
    for between_ms in BETWEEN_ROUNDS_MS.into_iter().flat_map(|ms| [ms; TIMES]) {
        let plain = median((0..REPORTS).map(|_| victim.line().parse().unwrap()).collect());
        let mut tracker = Tracker::new().unwrap();
        let began = Instant::now();
        let first = tracker.round(&[victim.pid()], Target::Running).unwrap();
        let first_time = began.elapsed();
        let pid = victim.pid();
        let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = end.clone();
        let rounds = std::thread::spawn(move || {
            let (mut pages, mut times) = (Vec::new(), Vec::new());
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(between_ms));
                let began = Instant::now();
                let round = tracker.round(&[pid], Target::Running).unwrap();
                times.push(began.elapsed().as_secs_f64() * 1e3);
                pages.push(round.processes[0].pages.pages() as f64);
            }
            (median(pages), median(times))
        });
        // The first report covers time before the tracking.
        victim.line();
        let tracked = median((0..REPORTS).map(|_| victim.line().parse().unwrap()).collect());
        end.store(true, std::sync::atomic::Ordering::Relaxed);
        let (pages, ms) = rounds.join().unwrap();
        eprintln!(
            "{MIB} MiB, a round each {between_ms} ms: first round {} pages in {first_time:?} (stopped {:?}), later {pages} pages in {ms:.1} ms; \
             {plain:.0} operations/s alone, {tracked:.0} tracked: {:.1} %",
            first.processes[0].pages.pages(),
            first.processes[0].stopped,
            tracked / plain * 100.0,
        );
        if between_ms == BOUND_MS {
            best = best.max(tracked / plain);
        }
    }
    assert!(best >= 0.9, "at best {:.1} % of its speed is left", best * 100.0);
}
