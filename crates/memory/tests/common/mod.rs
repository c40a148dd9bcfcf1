//! A victim program and what the kernel says about it, read without the crate under test.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod held;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_memory::{Content, ObjectId, PageRange, PageReader, PageSet, Pause, Round, Tracker};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

pub const PAGE: usize = 4096;

pub fn root_or_skip() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

pub fn victim_path() -> std::path::PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("examples/victim");
    assert!(path.exists(), "{} is not built: cargo build -p godwit-memory --examples", path.display());
    path
}

/// A running victim, with a process group of its own; killed at the end.
pub struct Victim {
    pub child: Child,
    pub output: BufReader<ChildStdout>,
}

impl Victim {
    pub fn start(arguments: &[&str]) -> Victim {
        let mut command = Command::new(victim_path());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut victim = Victim { child, output };
        assert_eq!(victim.line(), "ready");
        victim
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// All living processes of the group.
    pub fn pids(&self) -> Vec<i32> {
        group(self.pid()).into_iter().filter(|(_, state)| *state != 'Z').map(|(pid, _)| pid).collect()
    }

    /// Stops all of them, and does not come back before they stand still.
    pub fn freeze(&self) -> Vec<i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            killpg(Pid::from_raw(self.pid()), Signal::SIGSTOP).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            let all = group(self.pid());
            if all.iter().all(|(pid, state)| *state == 'Z' || threads_stopped(*pid)) {
                return self.pids();
            }
            assert!(Instant::now() < deadline, "{all:?} do not stop");
        }
    }

    /// What a tracker makes them stand still by.
    pub fn pause(&self) -> Arc<dyn Pause> {
        let leader = self.pid();
        stopping(move || group(leader).into_iter().filter(|(_, state)| *state != 'Z').map(|(pid, _)| pid).collect())
    }

    pub fn thaw(&self) {
        killpg(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        let _ = self.child.wait();
        // Its orphans are in the group too, and nobody here can wait for them.
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && group(self.pid()).iter().any(|(_, state)| *state != 'Z') {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

struct Stopping<F>(F);

/// Makes these processes stand still by SIGSTOP.
pub fn stopping(pids: impl Fn() -> Vec<i32> + Send + Sync + 'static) -> Arc<dyn Pause> {
    Arc::new(Stopping(pids))
}

impl<F: Fn() -> Vec<i32> + Send + Sync> Pause for Stopping<F> {
    fn still(&self, work: &mut dyn FnMut()) -> std::io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let all = |signal| {
            // They may end meanwhile.
            self.0().iter().for_each(|pid| kill(Pid::from_raw(*pid), signal).unwrap_or_default());
        };
        loop {
            all(Signal::SIGSTOP);
            std::thread::sleep(Duration::from_millis(1));
            // Also those that were born meanwhile.
            if self.0().iter().all(|pid| threads_stopped(*pid)) {
                break;
            }
            assert!(Instant::now() < deadline, "{:?} do not stop", self.0());
        }
        work();
        all(Signal::SIGCONT);
        Ok(())
    }
}

fn stat(path: &str) -> Option<(char, i32)> {
    let stat = std::fs::read_to_string(path).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    Some((state, group))
}

fn group(leader: i32) -> Vec<(i32, char)> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| stat(&format!("/proc/{pid}/stat")).filter(|(_, g)| *g == leader).map(|(s, _)| (pid, s)))
        .collect()
}

fn threads_stopped(pid: i32) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    tasks.flatten().all(|t| {
        stat(&format!("{}/stat", t.path().display())).is_none_or(|(state, _)| matches!(state, 'T' | 't' | 'Z' | 'X'))
    })
}

/// What a destination would hold after the rounds it was sent.
#[derive(Default)]
pub struct Model {
    pub processes: HashMap<i32, HashMap<u64, Vec<u8>>>,
    pub objects: HashMap<ObjectId, HashMap<u64, Vec<u8>>>,
    pub bytes_read: u64,
}

impl Model {
    pub fn take(&mut self, tracker: &Tracker, round: &Round) {
        for ended in &round.ended {
            self.processes.remove(ended);
        }
        for id in &round.dropped {
            self.objects.remove(id);
        }
        for process in &round.processes {
            let pages = self.processes.entry(process.inner_pid).or_default();
            if process.reset {
                pages.clear();
            }
            forget(pages, &process.gone);
            self.bytes_read += fill(pages, tracker.read_process(process.pid, process.pages.clone()));
        }
        for object in &round.objects {
            let pages = self.objects.entry(object.id).or_default();
            if object.reset {
                pages.clear();
            }
            forget(pages, &object.gone);
            self.bytes_read += fill(pages, tracker.read_object(object.id, object.pages.clone()).unwrap());
        }
    }

    /// Compares every page with what the frozen processes have; the number of pages that were compared.
    pub fn compare(&self, round: &Round) -> usize {
        let (mut compared, mut wrong) = (0, Vec::new());
        for process in &round.processes {
            let memory = File::open(format!("/proc/{}/mem", process.pid)).unwrap();
            let held = &self.processes[&process.inner_pid];
            let pagemap = File::open(format!("/proc/{}/pagemap", process.pid)).unwrap();
            for address in process.carried.ranges().iter().flat_map(|r| addresses(*r)) {
                let mut page = [0; PAGE];
                let mut entry = [0; 8];
                pagemap.read_exact_at(&mut entry, address / PAGE as u64 * 8).unwrap();
                // In memory or swapped out.
                if u64::from_ne_bytes(entry) >> 62 != 0 {
                    let _ = memory.read_exact_at(&mut page, address);
                    compared += 1;
                } else if !held.contains_key(&address) {
                    continue;
                }
                if !same(held.get(&address), &page) {
                    wrong.push(format!("process {} page {address:x}", process.pid));
                }
            }
            compared += self.compare_objects(process.pid, round, &mut wrong);
        }
        assert!(wrong.is_empty(), "{} of {compared} pages differ: {:?}", wrong.len(), &wrong[..wrong.len().min(20)]);
        compared
    }

    fn compare_objects(&self, pid: i32, round: &Round, wrong: &mut Vec<String>) -> usize {
        let mut compared = 0;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        for line in maps.lines().filter(|l| l.split(' ').nth(1).is_some_and(|p| p.ends_with('s'))) {
            let place = line.split(' ').next().unwrap();
            let mut file = File::open(format!("/proc/{pid}/map_files/{place}")).unwrap();
            let meta = file.metadata().unwrap();
            let id = ObjectId { device: meta.dev(), inode: meta.ino(), sysv: line.contains("/SYSV") };
            assert!(round.objects.iter().any(|o| o.id == id), "nobody carries {line}");
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            for (n, page) in content.chunks(PAGE).enumerate() {
                compared += 1;
                if !same(self.objects[&id].get(&((n * PAGE) as u64)), page) {
                    wrong.push(format!("{id:?} page {n} ({line})"));
                }
            }
        }
        compared
    }
}

pub fn addresses(range: PageRange) -> impl Iterator<Item = u64> {
    (range.start..range.end).step_by(PAGE)
}

fn same(held: Option<&Vec<u8>>, page: &[u8]) -> bool {
    held.map_or_else(|| page.iter().all(|b| *b == 0), |held| held[..page.len()] == *page)
}

fn forget(pages: &mut HashMap<u64, Vec<u8>>, gone: &PageSet) {
    gone.ranges().iter().flat_map(|r| addresses(*r)).for_each(|a| {
        pages.remove(&a);
    });
}

fn fill(pages: &mut HashMap<u64, Vec<u8>>, mut reader: PageReader) -> u64 {
    let (mut buffer, mut pieces, mut bytes) = (vec![0; 256 * PAGE], Vec::new(), 0);
    loop {
        match reader.read(&mut buffer, &mut pieces) {
            Ok(()) => {}
            Err(error) => {
                // It has ended between the round and the reading.
                assert!(matches!(error, godwit_memory::ReadError::Gone { .. }), "{error:?}");
                return bytes;
            }
        }
        if pieces.is_empty() {
            return bytes;
        }
        for piece in &pieces {
            for (n, address) in addresses(piece.range).enumerate() {
                match piece.content {
                    Content::Data { at } => {
                        bytes += PAGE as u64;
                        let at = at + n * PAGE;
                        pages.insert(address, buffer[at..at + PAGE].to_vec());
                    }
                    Content::Zero | Content::Absent => {
                        pages.remove(&address);
                    }
                }
            }
        }
    }
}

pub fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}
