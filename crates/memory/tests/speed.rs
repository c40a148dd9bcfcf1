//! What tracking costs the program that is tracked, and how long a round takes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Victim, root_or_skip};
use godwit_memory::{Key, PageStore, Target, Tracker};

/// Memory of the program, in MiB.
const MIB: usize = 1024;
/// Reports of the program in each turn; one comes every 250 ms.
const REPORTS: usize = 2;
/// What of a thousand writes goes anywhere, and the time between rounds in milliseconds (what copying takes). Tracking
/// costs a fault for each page that is written in a round: the first load writes some 500 MB/s of different pages,
/// which no move could follow, and is here to see the price; the second is a busy store.
const LOADS: [(u32, u64); 4] = [(100, 100), (100, 250), (10, 250), (10, 100)];
/// What the bound holds for.
const BOUND: (u32, u64) = (10, 100);
/// Tracked turns for what is bounded and for the others; before and after each is one without tracking.
const TURNS: (usize, usize) = (16, 4);

/// Three quarters are less. What else runs on the machine makes a turn fast or slow at random; more than the median,
/// because it costs the tracked program twice: the tracker, too, must get to run.
fn upper_quartile(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() * 3 / 4]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the program does in a turn, in operations per second: all of it, so that no round of tracking falls outside.
fn turn(victim: &mut Victim) -> f64 {
    // The first report covers time before the turn.
    victim.line();
    (0..REPORTS).map(|_| victim.line().parse::<f64>().unwrap()).sum::<f64>() / REPORTS as f64
}

/// A turn with a round each `between_ms`.
fn tracked_turn(victim: &mut Victim, between_ms: u64) -> (f64, String) {
    let pid = victim.pid();
    let mut tracker = Tracker::new(victim.pause()).unwrap();
    let began = Instant::now();
    let first = tracker.round(&[pid], Target::Running).unwrap();
    let first_time = began.elapsed();
    let end = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let rounds = threads.spawn(|| {
            let (mut pages, mut times) = (Vec::new(), Vec::new());
            while !end.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(between_ms));
                let began = Instant::now();
                let round = tracker.round(&[pid], Target::Running).unwrap();
                times.push(began.elapsed().as_secs_f64() * 1e3);
                pages.push(round.processes[0].pages.pages() as f64);
            }
            (median(pages), median(times))
        });
        let speed = turn(victim);
        end.store(true, Ordering::Relaxed);
        let (pages, ms) = rounds.join().unwrap();
        let (all, stopped) = (first.processes[0].pages.pages(), first.processes[0].stopped);
        let text = format!(
            "first round {all} pages in {first_time:?} (stopped {stopped:?}), later {pages} pages in {ms:.1} ms"
        );
        (speed, text)
    })
}

#[test]
fn a_tracked_program_keeps_its_speed() {
    if !root_or_skip() {
        return;
    }
    for (cold, between_ms) in LOADS {
        let bounded = (cold, between_ms) == BOUND;
        let mut victim = Victim::start(&["speed", &MIB.to_string(), &cold.to_string()]);
        let (mut ratios, mut speeds, mut rounds) = (Vec::new(), Vec::new(), String::new());
        let mut before = turn(&mut victim);
        for _ in 0..if bounded { TURNS.0 } else { TURNS.1 } {
            let (tracked, text) = tracked_turn(&mut victim, between_ms);
            let after = turn(&mut victim);
            let plain = f64::midpoint(before, after);
            before = after;
            ratios.push(tracked / plain);
            speeds.push(plain);
            rounds = text;
        }
        let (typical, left) = (median(ratios.clone()), upper_quartile(ratios));
        eprintln!(
            "{MIB} MiB, {cold} ‰ cold, a round each {between_ms} ms: {rounds}; \
             {:.0} operations/s alone, of which tracking leaves {:.1} % typically, {:.1} % in the best quarter",
            median(speeds),
            typical * 100.0,
            left * 100.0
        );
        assert!(!bounded || left >= 0.9, "{:.1} % of its speed is left", left * 100.0);
    }
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
