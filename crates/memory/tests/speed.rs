//! What tracking costs the program that is tracked, and how long a round takes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Victim, root_or_skip};
use godwit_memory::{Key, PageStore, Target, Tracker};

/// Memory of the program, in MiB.
const MIB: usize = 1024;
/// Reports of the program in each part of the measurement; one comes every 250 ms.
const REPORTS: usize = 6;
/// What of a thousand writes goes anywhere, and the time between rounds in milliseconds (what copying takes). Tracking
/// costs a fault for each page that is written in a round: the first load writes some 500 MB/s of different pages,
/// which no move could follow, and is here to see the price; the second is a busy store.
const LOADS: [(u32, u64); 4] = [(100, 100), (100, 250), (10, 100), (10, 250)];
/// What the bound holds for.
const BOUND: (u32, u64) = (10, 100);
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
    let mut best = 0.0f64;
    for (cold, between_ms) in LOADS.into_iter().flat_map(|load| [load; TIMES]) {
        let mut victim = Victim::start(&["speed", &MIB.to_string(), &cold.to_string()]);
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
            "{MIB} MiB, {cold} ‰ cold, a round each {between_ms} ms: first round {} pages in {first_time:?} (stopped {:?}), later {pages} pages in {ms:.1} ms; \
             {plain:.0} operations/s alone, {tracked:.0} tracked: {:.1} %",
            first.processes[0].pages.pages(),
            first.processes[0].stopped,
            tracked / plain * 100.0,
        );
        if (cold, between_ms) == BOUND {
            best = best.max(tracked / plain);
        }
    }
    assert!(best >= 0.9, "at best {:.1} % of its speed is left", best * 100.0);
}

/// Says how fast pages are taken in, which must be faster than any network; 1 GiB at the time, the best of three.
#[test]
fn pages_are_taken_in_faster_than_they_arrive() {
    let piece = vec![0x5a; 1 << 20];
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let store = PageStore::new().unwrap();
        let began = Instant::now();
        (0..1024u64).for_each(|n| store.put(Key::Process(1), n << 20, 0, &piece).unwrap());
        best = best.min(began.elapsed());
        assert_eq!(store.bytes(), 1 << 30);
    }
    eprintln!("1 GiB taken in within {best:?}");
    assert!(best < Duration::from_secs(4), "{best:?} for 1 GiB");
}
