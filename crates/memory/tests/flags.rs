//! Flags of mappings, told by the kernel's iterator, against its smaps.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::process::Command;
use std::time::Instant;

use common::Victim;
use godwit_memory::bpf::BpfError;
use godwit_memory::{FlagsError, MappingFlags, PageFilter, Round, Target, Tracker};

/// `None`, told why, where this kernel has no BPF for anybody.
fn learn_or_skip() -> Option<MappingFlags> {
    if !common::root_or_skip() {
        return None;
    }
    match MappingFlags::learn() {
        Ok(flags) => Some(flags),
        Err(FlagsError::Bpf(error @ BpfError::NoTypes { .. })) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

/// The kernel's smaps, without the lines that cost it a walk.
fn real(pid: i32) -> Vec<u8> {
    let smaps = std::fs::read(format!("/proc/{pid}/smaps")).unwrap();
    let is_kept = |line: &&[u8]| {
        let word = line.split(|b| *b == b' ').next().unwrap();
        word == b"VmFlags:" || !word.ends_with(b":")
    };
    smaps.split_inclusive(|b| *b == b'\n').filter(is_kept).flatten().copied().collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn it_says_what_smaps_says_of_every_flag() {
    let Some(flags) = learn_or_skip() else { return };
    let directory = tempfile::tempdir().unwrap();
    let victim = Victim::start(&["flags", directory.path().to_str().unwrap(), "false"]);
    let (told, real) = (flags.smaps(victim.pid()).unwrap(), text(&real(victim.pid())));
    assert_eq!(text(&told), real);
    // Those that CRIU looks for and this program can ask for on any machine: nothing was compared with nothing.
    let line = |flag: &str| real.lines().any(|l| l.starts_with("VmFlags:") && l.split(' ').any(|w| w == flag));
    for flag in ["gd", "lo", "nr", "sr", "rr", "dc", "dd", "mg", "hg", "nh", "wf", "io", "pf"] {
        assert!(line(flag), "no mapping has {flag}:\n{real}");
    }
    assert!(real.contains("new\\012line") && real.contains("gone (deleted)"), "{real}");
    // As in a move: a userfaultfd follows its writes.
    let mut tracker = Tracker::new(victim.pause()).unwrap();
    tracker.round(&[victim.pid()], Target::Running).unwrap();
    let begun = Instant::now();
    let told = flags.smaps(victim.pid()).unwrap();
    eprintln!("{} mappings told in {:?}", real.lines().count() / 2, begun.elapsed());
    let real = text(&self::real(victim.pid()));
    assert_eq!(text(&told), real);
    assert!(real.contains(" uw "), "{real}");
}

#[test]
fn a_flag_that_was_not_learnt_is_an_error() {
    let Some(flags) = learn_or_skip() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(common::victim_path());
    command.args(["flags", directory.path().to_str().unwrap(), "true"]).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = String::new();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut said).unwrap();
    std::io::BufRead::read_line(&mut output, &mut String::new()).unwrap();
    let told = flags.smaps(child.id().cast_signed());
    child.kill().unwrap();
    child.wait().unwrap();
    if said.trim() == "sealed" {
        assert!(matches!(told, Err(FlagsError::UnknownBits { .. })), "{told:?}");
    } else {
        assert!(told.is_ok(), "{told:?}");
    }
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let Some(flags) = learn_or_skip() else { return };
    let mut child = Command::new("/bin/true").spawn().unwrap();
    let pid = child.id().cast_signed();
    child.wait().unwrap();
    assert!(matches!(flags.smaps(pid), Err(FlagsError::Read { .. })));
}

/// As CRIU opens it, by the library that is loaded into it.
#[test]
fn what_is_served_is_read_once_and_only_of_that_process() {
    let directory = tempfile::tempdir().unwrap();
    let filter = PageFilter::install(directory.path()).unwrap();
    let mut victim = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
    let pid = victim.id().cast_signed();
    filter.serve_smaps(pid, b"served\n").unwrap();
    filter.serve_smaps(pid + 1, b"of another\n").unwrap();
    filter.leave_out(&Round::default()).unwrap();
    let read = |environment: bool| {
        let mut command = Command::new(common::victim_path());
        if environment {
            command.envs(filter.environment());
        }
        let output = command.args(["read-smaps", &pid.to_string()]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = text(&output.stdout);
        text.split("---\n").map(str::to_owned).collect::<Vec<_>>()
    };
    let without = read(false);
    assert!(without[0].contains("VmFlags:") && without[1].contains("VmFlags:"), "{without:?}");
    let with = read(true);
    assert_eq!(with[0], "served\n");
    assert!(with[1].contains("VmFlags:"), "{with:?}");
    let again = read(true);
    assert!(again[0].contains("VmFlags:"), "{again:?}");
    victim.kill().unwrap();
    victim.wait().unwrap();
}
