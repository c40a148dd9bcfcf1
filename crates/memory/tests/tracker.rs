//! The tracker against programs that do everything to their memory, on the real kernel.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{Model, Victim, root_or_skip, signal};
use godwit_memory::{Means, Round, Target, TrackError, Tracker};
use nix::sys::signal::Signal;

/// Rounds while the program runs, before the last one.
const ROUNDS: usize = 25;

fn nothing_is_lost(seed: u64) {
    if !root_or_skip() {
        return;
    }
    let victim = Victim::start(&["churn", &seed.to_string()]);
    let mut tracker = Tracker::new(victim.pause()).unwrap();
    let mut model = Model::default();
    let (mut longest_stop, mut longest_pause, mut compared, mut stops) = (Duration::ZERO, Duration::ZERO, 0, 0);
    let began = Instant::now();
    for _ in 0..ROUNDS {
        let round = tracker.round(&victim.pids(), Target::Running).unwrap();
        for process in &round.processes {
            if let Some(error) = &process.untracked {
                eprintln!("not tracked: {error}");
            }
            stops += usize::from(process.stopped.is_some());
            longest_stop = longest_stop.max(process.stopped.unwrap_or_default());
        }
        longest_pause = longest_pause.max(round.paused);
        compared += round.objects.iter().filter(|o| o.compared).count();
        model.take(&tracker, &round);
        std::thread::sleep(Duration::from_millis(20));
    }
    let pids = victim.freeze();
    let last = tracker.round(&pids, Target::Frozen).unwrap();
    model.take(&tracker, &last);
    let pages = model.compare(&last);
    assert!(pages > 3 * 1024, "the program has ended");
    eprintln!(
        "seed {seed}: {} processes, {pages} pages equal; read {} MiB in {ROUNDS} rounds and {:?}; {stops} stops, \
         longest {longest_stop:?}; longest pause {longest_pause:?}; {compared} objects compared; by {}",
        last.processes.len(),
        model.bytes_read >> 20,
        began.elapsed(),
        tracker.means().unwrap(),
    );
    // The next attempt after a failed one: the program goes on, and tracking is still right.
    victim.thaw();
    std::thread::sleep(Duration::from_millis(50));
    let again = tracker.round(&victim.pids(), Target::Running).unwrap();
    model.take(&tracker, &again);
    let last = tracker.round(&victim.freeze(), Target::Frozen).unwrap();
    model.take(&tracker, &last);
    model.compare(&last);
}

#[test]
fn no_page_is_lost_whatever_a_program_does_1() {
    nothing_is_lost(1);
}

#[test]
fn no_page_is_lost_whatever_a_program_does_2() {
    nothing_is_lost(20_261_124);
}

#[test]
fn no_page_is_lost_whatever_a_program_does_3() {
    nothing_is_lost(0x00c0_ffee);
}

/// Where examples/victim/scatter.rs counts its writes.
const COUNTER: u64 = 0x5000_0000_0000;
/// So many writes to 8192 pages hit some 1780 different ones.
const WRITES: u64 = 2_000;

/// Waits until the program has written that much more, however little it gets to run.
fn wait_for_writes(victim: &Victim) {
    let memory = std::fs::File::open(format!("/proc/{}/mem", victim.pid())).unwrap();
    let written = || {
        let mut number = [0; 8];
        memory.read_exact_at(&mut number, COUNTER).unwrap();
        u64::from_ne_bytes(number)
    };
    let (before, deadline) = (written(), Instant::now() + Duration::from_secs(30));
    while written() < before + WRITES {
        assert!(Instant::now() < deadline, "the program does not run");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// One look at such memory takes the kernel several turns, between which the program goes on writing.
#[test]
fn what_is_written_between_two_turns_of_a_scan_is_told() {
    if !root_or_skip() {
        return;
    }
    let victim = Victim::start(&["scatter", "64"]);
    let (mut tracker, mut model) = (Tracker::new(victim.pause()).unwrap(), Model::default());
    // Of soft-dirty bits no scan tells; and memory is huge pages at first, of which a write marks the whole.
    let means = tracker.means();
    let enough = |round: &Round, time: usize| {
        if means == Some(Means::SoftDirty) && time == 0 {
            return;
        }
        let runs = round.processes[0].pages.ranges().len();
        assert!(runs > 1024, "{runs} runs do not fill the kernel's buffer of 512 twice");
    };
    for time in 0..10 {
        for again in 0..3 {
            let round = tracker.round(&victim.pids(), Target::Running).unwrap();
            // The first of all finds one run: everything.
            if (time, again) != (0, 0) {
                enough(&round, time);
            }
            model.take(&tracker, &round);
            wait_for_writes(&victim);
        }
        let last = tracker.round(&victim.freeze(), Target::Frozen).unwrap();
        enough(&last, time);
        model.take(&tracker, &last);
        model.compare(&last);
        victim.thaw();
        wait_for_writes(&victim);
    }
}

#[test]
fn what_is_written_and_let_go_of_with_its_page_table_is_told() {
    if !root_or_skip() {
        return;
    }
    let victim = Victim::start(&["tables", "7"]);
    let (mut tracker, mut model) = (Tracker::new(victim.pause()).unwrap(), Model::default());
    for _ in 0..10 {
        for _ in 0..5 {
            let round = tracker.round(&victim.pids(), Target::Running).unwrap();
            model.take(&tracker, &round);
            std::thread::sleep(Duration::from_millis(8));
        }
        let last = tracker.round(&victim.freeze(), Target::Frozen).unwrap();
        model.take(&tracker, &last);
        assert!(model.compare(&last) > 8 * 512, "the program has ended");
        let [object] = last.objects.as_slice() else { panic!("{} objects", last.objects.len()) };
        assert!(!object.compared, "nothing was learnt of page tables: its content was compared");
        victim.thaw();
    }
}

/// What is reserved only is not looked at page by page.
#[test]
fn address_space_without_memory_costs_little_or_is_refused() {
    if !root_or_skip() {
        return;
    }
    // 1.3 ms per GiB if it were read.
    let victim = Victim::start(&["reserve", "65536", "false"]);
    let mut tracker = Tracker::new(victim.pause()).unwrap();
    for _ in 0..2 {
        let began = Instant::now();
        let round = tracker.round(&[victim.pid()], Target::Running).unwrap();
        let process = &round.processes[0];
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        assert!(process.carried.bytes() > 64 << 40 && process.pages.bytes() < 64 << 20, "{}", process.pages.bytes());
    }
    let victim = Victim::start(&["reserve", "1024", "true"]);
    let mut tracker = Tracker::new(victim.pause()).unwrap();
    let round = tracker.round(&[victim.pid()], Target::Running);
    match tracker.means().unwrap() {
        Means::Protection => assert!(round.unwrap().processes[0].carried.bytes() > 1 << 40),
        Means::SoftDirty => {
            let error = round.unwrap_err();
            assert!(matches!(error, TrackError::Sparse { gib: 1000.., .. }), "{error}");
        }
    }
}

/// What a call that goes on with the time it has left, or one that starts its whole time anew, is interrupted for: the
/// first until it has ended, which it never does if it started anew; the second for less than it waits.
const UNTIL_IT_ENDS: Duration = Duration::from_secs(10);
const FOR_A_WHILE: Duration = Duration::from_millis(550);

/// Arms a process again and again while it waits, for that long at most; what its system call says and how long it took
/// in milliseconds.
fn interrupted_while(kind: &str, limit: Duration) -> (i64, i64, i64) {
    let mut victim = Victim::start(&["wait", kind]);
    let end = Instant::now() + limit;
    let (mut longest, mut times) = (Duration::ZERO, 0);
    while Instant::now() < end {
        let mut tracker = Tracker::new(victim.pause()).unwrap();
        let round = tracker.round(&[victim.pid()], Target::Running).unwrap();
        let Some(process) = round.processes.first() else { break };
        // It ends under the tracker's hands once.
        let Some(stopped) = process.stopped else { continue };
        assert!(process.untracked.is_none(), "{:?}", process.untracked);
        longest = longest.max(stopped);
        times += 1;
    }
    let line = victim.line();
    eprintln!("{kind}: armed {times} times, longest stop {longest:?}: {line}");
    let numbers: Vec<i64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
    (numbers[0], numbers[1], numbers[2])
}

#[test]
fn a_system_call_goes_on_where_it_was() {
    if !root_or_skip() {
        return;
    }
    for kind in ["nanosleep", "poll", "futex", "read"] {
        let (result, error, ms) = interrupted_while(kind, UNTIL_IT_ENDS);
        match kind {
            // 110 is ETIMEDOUT.
            "futex" => assert_eq!((result, error), (-1, 110), "{kind}"),
            "read" => assert_eq!((result, error), (1, 0), "{kind}"),
            _ => assert_eq!((result, error), (0, 0), "{kind}"),
        }
        let limit = UNTIL_IT_ENDS.as_millis() as i64;
        assert!((690..limit).contains(&ms), "{kind} took {ms} ms instead of 700, though it was interrupted only");
    }
    // ppoll and epoll start their whole time anew by the kernel's rules for signals that need no handler; `run` computes
    // everything once more. How long that takes is the machine's affair.
    for kind in ["ppoll", "epoll", "run"] {
        let (result, error, ms) = interrupted_while(kind, FOR_A_WHILE);
        assert_eq!((result, error), (0, 0), "{kind}");
        assert!(ms >= 690, "{kind} took {ms} ms instead of 700");
    }
}

#[test]
fn no_signal_is_lost_while_a_thread_is_borrowed() {
    if !root_or_skip() {
        return;
    }
    let mut victim = Victim::start(&["signals"]);
    let pid = victim.pid();
    let sender = std::thread::spawn(move || {
        for _ in 0..3000 {
            // SAFETY: a number to a process that this test has started.
            let sent = unsafe { nix::libc::kill(pid, nix::libc::SIGRTMIN()) };
            assert_eq!(sent, 0);
            std::thread::sleep(Duration::from_micros(150));
        }
    });
    let mut times = 0;
    while !sender.is_finished() {
        let mut tracker = Tracker::new(victim.pause()).unwrap();
        let round = tracker.round(&[pid], Target::Running).unwrap();
        assert!(round.processes[0].untracked.is_none(), "{:?}", round.processes[0].untracked);
        times += 1;
    }
    sender.join().unwrap();
    signal(pid, Signal::SIGTERM);
    assert_eq!(victim.line(), "3000 true", "armed {times} times");
    eprintln!("3000 signals, armed {times} times");
}

#[test]
fn a_stopped_process_can_be_armed_and_stays_stopped() {
    if !root_or_skip() {
        return;
    }
    let mut victim = Victim::start(&["wait", "nanosleep"]);
    victim.freeze();
    let mut tracker = Tracker::new(victim.pause()).unwrap();
    let round = tracker.round(&[victim.pid()], Target::Running).unwrap();
    assert!(round.processes[0].stopped.is_some(), "{:?}", round.processes[0].untracked);
    std::thread::sleep(Duration::from_millis(50));
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", victim.pid())).unwrap();
    assert!(stat.contains(") T "), "{stat}");
    victim.thaw();
    assert!(victim.line().starts_with("0 0 "));
}

#[test]
fn nothing_is_left_behind() {
    if !root_or_skip() {
        return;
    }
    let victim = Victim::start(&["churn", "5"]);
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let inside = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", victim.pid())).unwrap().flatten();
        fds.filter(|f| std::fs::read_link(f.path()).is_ok_and(|l| l.to_string_lossy().contains("userfaultfd"))).count()
    };
    let before = (count("fd"), count("task"));
    for _ in 0..5 {
        let mut tracker = Tracker::new(victim.pause()).unwrap();
        tracker.round(&victim.pids(), Target::Running).unwrap();
        tracker.round(&victim.pids(), Target::Running).unwrap();
        assert_eq!(inside(), 0);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((count("fd"), count("task")), before);
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", victim.pid())).unwrap();
    let registered = smaps.lines().filter(|l| l.starts_with("VmFlags:") && l.contains(" uw")).count();
    assert_eq!(registered, 0, "mappings still tracked");
}
