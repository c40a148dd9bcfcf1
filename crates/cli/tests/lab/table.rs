//! The fault table: each phase of a move, hit by each fault that can happen in it.
//!
//! A cell starts a move, waits until it stands still in the phase (`godwit-hold`), lets the fault happen, lets the move
//! go on, repairs what an init system or a person would, and then asserts what `cell` lists. `./dev test faults` runs all
//! cells; without being asked for more, one cell of each phase runs.

mod cell;
mod faults;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Instant;

use cell::Yard;
use faults::Fault;

/// Which cells run: `all`, or `PHASE:FAULT` separated by spaces, each half of which may be `*`.
const VARIABLE: &str = "GODWIT_FAULTS";
/// Labs at the same time: a cell mostly waits.
const LABS: usize = 2;
/// Characters of a column of the table.
const WIDTH: usize = 11;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Prepare,
    Copy,
    Freeze,
    Dump,
    Restore,
    HandOver,
    Activate,
    Fill,
    Release,
}

/// Whose process stands still in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
    Controller,
}

impl Phase {
    const ALL: [Self; 9] = [
        Self::Prepare,
        Self::Copy,
        Self::Freeze,
        Self::Dump,
        Self::Restore,
        Self::HandOver,
        Self::Activate,
        Self::Fill,
        Self::Release,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::Freeze => "freeze",
            Self::Dump => "dump",
            Self::Restore => "restore",
            Self::HandOver => "hand-over",
            Self::Activate => "activate",
            Self::Fill => "fill",
            Self::Release => "release",
        }
    }

    /// Who stands still, and the name of the point.
    fn hold(self) -> (Side, &'static str) {
        match self {
            // Everything is made at the destination, and nobody knows yet.
            Self::Prepare => (Side::Destination, "prepare"),
            // The first round of files and memory is over there.
            Self::Copy => (Side::Source, "copy"),
            // Frozen and muted, nothing dumped.
            Self::Freeze => (Side::Source, "freeze"),
            // CRIU has its hands on the processes.
            Self::Dump => (Side::Source, "dump-post-dump"),
            // The source has said its last word, CRIU has made the namespaces.
            Self::Restore => (Side::Destination, "restore"),
            // All is restored, and the store does not say so yet.
            Self::HandOver => (Side::Controller, "hand-over"),
            // Owned by the destination, where nothing has run yet.
            Self::Activate => (Side::Destination, "activate"),
            // It runs, with pages missing.
            Self::Fill => (Side::Destination, "fill"),
            // It runs there, and the source still has all of it.
            Self::Release => (Side::Source, "release"),
        }
    }
}

/// What became of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The move was taken back; the same process runs on.
    Back,
    /// The same process runs at the destination.
    Moved,
    /// As `Back`, but connections that were in use are broken.
    Torn,
    /// The fault has ended the container itself; its restart policy has started it again.
    Anew,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Back => "back",
            Self::Moved => "moved",
            Self::Torn => "torn",
            Self::Anew => "anew",
        }
    }
}

type Cell = (Phase, Fault);

#[test]
fn every_phase_survives_its_faults() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let asked = std::env::var(VARIABLE).unwrap_or_default();
    let mut wanted: Vec<Cell> = wanted_cells(&asked);
    assert!(!wanted.is_empty(), "{VARIABLE}={asked} names no cell that can happen");
    // The longest first, so that the labs end at the same time.
    wanted.sort_by_key(|(_, fault)| !fault.takes_long());
    let queue = Mutex::new(VecDeque::from(wanted));
    let results = Mutex::new(Vec::new());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for lab in 0..LABS.min(queue.lock().unwrap().len()) {
            let (queue, results) = (&queue, &results);
            scope.spawn(move || work(lab, queue, results));
        }
    });
    let results = results.into_inner().unwrap();
    print!("{}", table(&results));
    println!("{} cells in {:.0} s", results.len(), begun.elapsed().as_secs_f64());
    let failed: Vec<String> = results
        .iter()
        .filter_map(|((phase, fault), r)| Some(format!("{}:{}: {}", phase.name(), fault.name(), r.as_ref().err()?)))
        .collect();
    assert!(failed.is_empty(), "{} cells failed:\n{}", failed.len(), failed.join("\n"));
}

/// Those that can happen.
fn cells() -> impl Iterator<Item = Cell> {
    let all = Phase::ALL.into_iter().flat_map(|phase| Fault::ALL.map(|fault| (phase, fault)));
    all.filter(|(phase, fault)| fault.cannot_hit(*phase).is_none())
}

/// A cell that is named several times runs as often.
fn wanted_cells(asked: &str) -> Vec<Cell> {
    let is = |pattern: &str, name: &str| pattern == "*" || pattern == name;
    match asked {
        "" => faults::REPRESENTATIVE.to_vec(),
        "all" => cells().collect(),
        some => {
            let named = some.split_whitespace().filter_map(|one| one.split_once(':'));
            named
                .flat_map(|(p, f)| cells().filter(move |(phase, fault)| is(p, phase.name()) && is(f, fault.name())))
                .collect()
        }
    }
}

type Outcomes = Mutex<Vec<(Cell, Result<String, String>)>>;

/// Cells, one after the other in one lab; one that fails gets the next ones a new lab.
fn work(lab: usize, queue: &Mutex<VecDeque<Cell>>, results: &Outcomes) {
    let mut yard = None;
    for count in 0.. {
        let Some(cell) = queue.lock().unwrap().pop_front() else { break };
        let tag = format!("t{lab}-{count}");
        let done = catch_unwind(AssertUnwindSafe(|| yard.get_or_insert_with(|| Yard::new(&tag)).cell(cell)));
        let done = done.map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
            // The logs are kept.
            text.split("\n--- ").next().unwrap_or_default().to_owned()
        });
        let told = done.as_ref().map_or_else(|e| format!("FAILED: {e}"), Clone::clone);
        eprintln!("{:>9} {:<11} {told}", cell.0.name(), cell.1.name());
        if done.is_err()
            && let Some(yard) = yard.take()
        {
            yard.keep_logs();
        }
        results.lock().unwrap().push((cell, done));
    }
    if let Some(yard) = yard {
        yard.down();
    }
}

/// Rows are phases, columns faults.
fn table(results: &[(Cell, Result<String, String>)]) -> String {
    let line = |cells: Vec<String>| {
        let row: String = cells.iter().map(|cell| format!("{cell:<WIDTH$}")).collect();
        format!("{}\n", row.trim_end())
    };
    let head = std::iter::once(String::new()).chain(Fault::ALL.map(|f| f.name().to_owned())).collect();
    let mut text = line(head);
    for phase in Phase::ALL {
        let cell = |fault: Fault| {
            if let Some(why) = fault.cannot_hit(phase) {
                return format!("- {}", why.mark());
            }
            match results.iter().find(|(cell, _)| *cell == (phase, fault)) {
                Some((_, Ok(told))) => told.split(';').next().unwrap_or_default().to_owned(),
                Some((_, Err(_))) => "FAILED".to_owned(),
                None => "(not run)".to_owned(),
            }
        };
        text += &line(std::iter::once(phase.name().to_owned()).chain(Fault::ALL.map(cell)).collect());
    }
    text += "\nback: the move was taken back, the same process runs on at the source. moved: the same process runs at the\n\
             destination. anew: the fault has ended the container itself, its restart policy started it again. torn: as\n\
             back, but connections in use are broken: CRIU had them in repair mode, and with it gone the processes ran on\n\
             before that could be ended. The number: seconds from the fault until `ps` told the truth (cut: while the link was still cut).\n";
    for fault in Fault::ALL {
        text += &format!("{}: {}\n", fault.name(), fault.explained());
    }
    for why in faults::Why::ALL {
        text += &format!("- {}: {}\n", why.mark(), why.explained());
    }
    text
}
