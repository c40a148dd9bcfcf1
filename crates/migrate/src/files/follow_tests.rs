//! Rounds that read what the kernel tells, on the file system that temporary files are on.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use godwit_memory::bpf::BpfError;
use godwit_memory::{FileWatch, WatchError};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::tests::{Pair, Through, settle};
use super::*;

const BLOCK: u64 = 4096;

/// A pair of trees and the means to follow the first; `None`, told why, where this machine has none.
fn followed_or_skip() -> Option<(Pair, FileWatch)> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let pair = Pair::new(true);
    let tried = FileWatch::new().and_then(|mut watch| watch.place(pair.from.path()).map(|_| watch));
    match tried {
        Ok(watch) => Some((pair, watch)),
        Err(
            error @ (WatchError::Bpf(BpfError::NoTypes { .. } | BpfError::Missing { .. }) | WatchError::Unfit { .. }),
        ) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

fn round(pair: &mut Pair, watch: &mut FileWatch, frozen: bool) -> ScanStats {
    let following = Following::begin(watch, frozen).unwrap();
    let stats = pair.scanner.round(&HashSet::new(), Some(following), &mut Through(&mut pair.writer)).unwrap();
    pair.writer.end_round().unwrap();
    stats
}

#[test]
fn of_a_big_file_only_what_was_written_is_read() {
    let Some((mut pair, mut watch)) = followed_or_skip() else { return };
    let name = pair.from.path().join("big");
    let size = 64 << 20;
    std::fs::write(&name, vec![7; size as usize]).unwrap();
    settle();
    assert_eq!(round(&mut pair, &mut watch, false).bytes_sent, size);
    let file = OpenOptions::new().write(true).open(&name).unwrap();
    let change = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for frozen in [false, true] {
        let other = [u8::from(frozen)];
        file.write_all_at(&other, 5 << 20).unwrap();
        file.write_all_at(&other, size - 1).unwrap();
        fallocate(&file, change, (20 << 20) + u64::from(frozen) * BLOCK, BLOCK).unwrap();
        let stats = round(&mut pair, &mut watch, frozen);
        // Each at most the largest piece that the kernel keeps in one.
        assert!(stats.bytes_sent >= 2 * BLOCK && stats.bytes_read < 16 << 20, "{stats:?}");
        pair.assert_same();
    }
    // Its times alone are no reason to read it.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&name, mode).unwrap();
    let stats = round(&mut pair, &mut watch, true);
    assert!(stats.entries_sent == 1 && stats.bytes_sent == 0 && stats.bytes_read < 1 << 20, "{stats:?}");
    pair.assert_same();
}

#[test]
fn a_successor_with_the_same_name_is_another_file() {
    let Some((mut pair, mut watch)) = followed_or_skip() else { return };
    let name = pair.from.path().join("file");
    for byte in 0..20u8 {
        // Numbers of inodes are used again at once, and so may be the blocks on the disk.
        let _ = std::fs::remove_file(&name);
        std::fs::write(&name, vec![byte; 1 << 20]).unwrap();
        if byte % 3 == 0 {
            settle();
        }
        round(&mut pair, &mut watch, false);
        assert!(std::fs::read(pair.to.path().join("file")).unwrap() == vec![byte; 1 << 20], "{byte}");
    }
}

/// Gives two files each other's names as soon as it has been told of the first.
struct Swapping<'a> {
    inner: Through<'a>,
    root: PathBuf,
    swaps: u32,
}

fn swap(root: &Path) {
    for (from, to) in [("a", "x"), ("b", "a"), ("x", "b")] {
        std::fs::rename(root.join(from), root.join(to)).unwrap();
    }
}

impl Sink for Swapping<'_> {
    fn entry(&mut self, entry: Entry) -> bool {
        if entry.path == b"a" {
            swap(&self.root);
            self.swaps += 1;
        }
        self.inner.entry(entry)
    }
    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> bool {
        self.inner.data(offset, bytes)
    }
    fn remove(&mut self, tree: &str, path: Vec<u8>) -> bool {
        self.inner.remove(tree, path)
    }
}

/// One round sees the same file under two names; what is written to it afterwards is told once only.
#[test]
fn a_file_that_changes_its_name_in_the_middle_of_a_round_is_followed() {
    let Some((mut pair, mut watch)) = followed_or_skip() else { return };
    let root = pair.from.path().to_owned();
    for name in ["a", "b"] {
        std::fs::write(root.join(name), name.repeat(1 << 20)).unwrap();
    }
    settle();
    round(&mut pair, &mut watch, false);
    let write = |at| File::options().write(true).open(root.join("a")).unwrap().write_all_at(b"x", at).unwrap();
    write(1000);
    let following = Following::begin(&mut watch, false).unwrap();
    let mut sink = Swapping { inner: Through(&mut pair.writer), root: root.clone(), swaps: 0 };
    pair.scanner.round(&HashSet::new(), Some(following), &mut sink).unwrap();
    assert_eq!(sink.swaps, 1);
    swap(&root);
    write(500_000);
    round(&mut pair, &mut watch, true);
    pair.assert_same();
}

/// Writes bytes through a mapping that stays: `offset value` in, an empty line out.
const MAPPED_WRITER: &str = "import mmap,sys
f=open(sys.argv[1],'r+b');m=mmap.mmap(f.fileno(),0)
for line in sys.stdin:
    at,value=map(int,line.split());m[at]=value;print(flush=True)";

struct MappedWriter {
    child: Child,
    told: BufReader<std::process::ChildStdout>,
}

impl MappedWriter {
    fn start(file: &Path) -> Self {
        let mut python = Command::new("python3");
        python.arg("-c").arg(MAPPED_WRITER).arg(file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = python.spawn().unwrap();
        let told = BufReader::new(child.stdout.take().unwrap());
        Self { child, told }
    }

    fn write(&mut self, at: u64, value: u8) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{at} {value}").unwrap();
        assert_eq!(self.told.read_line(&mut String::new()).unwrap(), 1);
    }
}

impl Drop for MappedWriter {
    fn drop(&mut self) {
        self.child.stdin.take();
        self.child.wait().unwrap();
    }
}

/// Changes files in every way there is, by numbers that look like chance (xorshift).
struct Changer {
    root: PathBuf,
    state: u64,
    mapped: MappedWriter,
}

const MAPPED_BYTES: u64 = 2 << 20;
const LONGEST: u64 = 3 << 20;

impl Changer {
    fn new(root: &Path, seed: u64) -> Self {
        for name in ["a", "b", "c", "d"] {
            std::fs::write(root.join(name), vec![1; 1 << 20]).unwrap();
        }
        std::fs::write(root.join("mapped"), vec![1; MAPPED_BYTES as usize]).unwrap();
        let mapped = MappedWriter::start(&root.join("mapped"));
        Self { root: root.to_owned(), state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, mapped }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % end
    }

    fn step(&mut self) {
        let name = ["a", "b", "c", "d"][self.below(4) as usize];
        let path = self.root.join(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        let (at, value) = (self.below(LONGEST), self.below(256) as u8);
        let blocks = at / BLOCK * BLOCK;
        let length = self.below(20_000) + 1;
        match self.below(16) {
            0..=3 => file.write_all_at(&vec![value; length as usize], at).unwrap(),
            4 => file.write_all_at(&vec![value; length as usize], size.min(LONGEST)).unwrap(),
            5 => file.set_len(at).unwrap(),
            6 => {
                file.set_len(at.min(size)).unwrap();
                file.set_len(size).unwrap();
            }
            7 => fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length).unwrap(),
            8 => fallocate(&file, FallocateFlags::ZERO_RANGE, at, length).unwrap(),
            // Only in the middle of a file, and not every file system can.
            9 if blocks + 2 * BLOCK < size => {
                let _ = fallocate(&file, FallocateFlags::COLLAPSE_RANGE, blocks, BLOCK);
            }
            10 => {
                let other = ["a", "b", "c", "d"][self.below(4) as usize];
                let other = self.root.join(other);
                std::fs::rename(&path, self.root.join("moved")).unwrap();
                let _ = std::fs::rename(&other, &path);
                std::fs::rename(self.root.join("moved"), &other).unwrap();
            }
            11 => {
                std::fs::remove_file(&path).unwrap();
                std::fs::write(&path, vec![value; 1 << 20]).unwrap();
            }
            12 => {
                if std::fs::remove_file(self.root.join("link")).is_err() {
                    std::fs::hard_link(&path, self.root.join("link")).unwrap();
                }
            }
            13 => {
                let flags = OFlags::DIRECT.bits().cast_signed();
                let direct = OpenOptions::new().write(true).custom_flags(flags).open(&path).unwrap();
                let room = vec![value; 3 * BLOCK as usize];
                let aligned = room.as_ptr().align_offset(BLOCK as usize);
                direct.write_all_at(&room[aligned..][..BLOCK as usize], blocks).unwrap();
            }
            14 => {
                // A modification time that was before.
                let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
                file.write_all_at(&[value], at.min(size)).unwrap();
                file.set_times(times).unwrap();
            }
            _ => self.mapped.write(at % MAPPED_BYTES, value),
        }
    }
}

/// Rounds beside somebody who writes; once nobody does, one more makes both trees the same, byte for byte.
#[test]
fn whatever_is_done_to_files_while_rounds_run_arrives() {
    // Each takes some hundred steps and about ten rounds.
    for seed in 1..=12 {
        let Some((mut pair, mut watch)) = followed_or_skip() else { return };
        let mut changer = Changer::new(pair.from.path(), seed);
        settle();
        round(&mut pair, &mut watch, false);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| {
                for _ in 0..400 {
                    changer.step();
                }
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) && !changing.is_finished() {
                round(&mut pair, &mut watch, false);
            }
            changing.join().unwrap();
        });
        round(&mut pair, &mut watch, true);
        pair.assert_same();
    }
}

/// The same with rounds between single steps, where nothing but the step can be the reason.
#[test]
fn each_way_to_change_a_file_is_seen() {
    let Some((mut pair, mut watch)) = followed_or_skip() else { return };
    let mut changer = Changer::new(pair.from.path(), 99);
    settle();
    round(&mut pair, &mut watch, false);
    for step in 0..200 {
        changer.step();
        if step % 5 == 0 {
            settle();
        }
        round(&mut pair, &mut watch, false);
        pair.assert_same();
    }
}

/// A file that nothing was told of any more is read whole: nothing that was missed stays missed.
#[test]
fn a_round_without_the_kernels_word_reads_everything() {
    let Some((mut pair, mut watch)) = followed_or_skip() else { return };
    let name = pair.from.path().join("file");
    std::fs::write(&name, vec![7; 1 << 20]).unwrap();
    settle();
    round(&mut pair, &mut watch, false);
    drop(watch);
    File::options().write(true).open(&name).unwrap().write_all_at(b"x", 600_000).unwrap();
    let stats = pair.scanner.round(&HashSet::new(), None, &mut Through(&mut pair.writer)).unwrap();
    pair.writer.end_round().unwrap();
    assert_eq!(stats.bytes_sent, BLOCK);
    pair.assert_same();
}
