//! A thousand small fleets live through half a day, and every promise is kept in each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicU64, Ordering};

use godwit_sim::{Settings, Summary, run};

const SEEDS: u64 = 1_000;

fn settings(seed: u64) -> Settings {
    // From a handful of hosts that are almost empty to some that are nearly full.
    let hosts = 3 + (seed % 10) as u32;
    Settings { hosts, containers: hosts * (5 + seed as u32 % 14), seed, hours: 12 }
}

#[test]
fn every_promise_is_kept_for_a_thousand_seeds() {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8);
    let summaries: Vec<Summary> = std::thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= SEEDS {
                    return done;
                }
                match run(&settings(seed), |_| {}) {
                    Ok(summary) => done.push(summary),
                    Err(broken) => panic!("seed {seed}, {:?}: {broken}", settings(seed)),
                }
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    // Each kind of thing has happened, so that the promises were put to the test.
    let sum = |count: fn(&Summary) -> u64| summaries.iter().map(count).sum::<u64>();
    assert_eq!(summaries.len() as u64, SEEDS);
    for (what, count) in [
        ("failures", sum(|s| s.counts.hosts_failed)),
        ("partitions", sum(|s| s.counts.hosts_cut_off)),
        ("restarts", sum(|s| s.counts.restarts)),
        ("evacuations that succeeded", sum(|s| s.counts.evacuated)),
        ("moves to make room", sum(|s| s.counts.moves_to_make_room)),
        ("moves to balance", sum(|s| s.counts.moves_to_balance)),
        ("moves that failed", sum(|s| s.counts.moves_failed)),
    ] {
        assert!(count > 100, "only {count} {what}");
    }
    assert!(summaries.iter().any(|s| s.longest_down_ms > 20_000), "nobody waited for a host to be declared dead");
}

#[test]
fn the_same_seed_gives_the_same_to_the_last_byte() {
    let lived = |seed| {
        let mut told = Vec::new();
        let summary = run(&settings(seed), |hour| told.push(hour.clone())).unwrap();
        serde_json::to_string(&(told, summary)).unwrap()
    };
    assert_eq!(lived(7), lived(7));
    assert_ne!(lived(7), lived(17));
}
