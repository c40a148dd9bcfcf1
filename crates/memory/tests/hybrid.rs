//! The whole way, with the real CRIU, on one machine: rounds while running, a dump without memory, a restore that is
//! filled by us. The programs check themselves throughout.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{root_or_skip, victim_path};
use godwit_memory::{
    Content, FillReport, Filler, FillerProcess, Key, MappingFlags, ObjectKind, PageFilter, PageReader, PageSet,
    PageStore, Round, SharedReport, SharedUse, Target, Tracker,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Processes of the tree.
const PROCESSES: usize = 4;
/// Bytes of a line of the report (examples/victim/tree.rs).
const LINE: usize = 128;

fn criu() -> Command {
    let path = std::env::var("GODWIT_CRIU").unwrap_or_else(|_| "/opt/godwit/criu/criu".to_owned());
    Command::new(path)
}

/// A tree of programs that check themselves, and CRIU's directories, on a tmpfs. All ends with it.
struct World {
    directory: tempfile::TempDir,
    root: i32,
}

impl World {
    #[allow(clippy::zombie_processes, reason = "reaped by number, also after CRIU has made it anew")]
    fn start(private_mib: usize, shared_mib: usize) -> World {
        let directory = tempfile::Builder::new().prefix("godwit-memory-").tempdir_in("/dev/shm").unwrap();
        for name in ["images", "work"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let report = directory.path().join("report");
        std::fs::write(&report, vec![b' '; PROCESSES * LINE]).unwrap();
        let mut command = Command::new(victim_path());
        // CRIU carries SysV segments with their namespace only.
        // SAFETY: unshare(2) is a plain system call, allowed between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC)?));
        }
        let child = command
            .args(["tree", report.to_str().unwrap(), &private_mib.to_string(), &shared_mib.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        World { directory, root: child.id().cast_signed() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pids(&self) -> Vec<i32> {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.root)).unwrap();
        std::iter::once(self.root).chain(children.split_whitespace().map(|p| p.parse().unwrap())).collect()
    }

    /// For each process: turns, errors, longest wait for memory in microseconds.
    fn report(&self) -> Vec<[u64; 3]> {
        let text = std::fs::read(self.path("report")).unwrap();
        let numbers = |line: &[u8]| {
            let line = String::from_utf8_lossy(line).into_owned();
            let mut words = line.split_whitespace().map(|w| w.parse().unwrap_or(0));
            [0; 3].map(|_| words.next().unwrap_or(0))
        };
        text.chunks(LINE).map(numbers).collect()
    }

    /// Waits until each process has made `turns` more, and none has found an error.
    fn wait_for_turns(&self, turns: u64) {
        let before = self.report();
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let now = self.report();
            assert!(now.iter().all(|r| r[1] == 0), "the programs found wrong content: {now:?}");
            if before.iter().zip(&now).all(|(b, n)| n[0] >= b[0] + turns) {
                return;
            }
            assert!(Instant::now() < deadline, "they stand still: {before:?} then {now:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn signal_all(&self, signal: Signal) {
        for pid in self.pids() {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    fn log(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.path("work").join(name)).unwrap_or_default();
        text.lines().rev().take(25).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    fn image_bytes(&self) -> u64 {
        std::fs::read_dir(self.path("images")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if Path::new(&format!("/proc/{}", self.root)).exists() {
            self.signal_all(Signal::SIGKILL);
        }
        let _ = nix::sys::wait::waitpid(Pid::from_raw(self.root), None);
    }
}

/// What a destination is sent after a round.
fn send(tracker: &Tracker, round: &Round, number: u16, store: &PageStore) -> u64 {
    let mut bytes = 0;
    for process in &round.processes {
        let key = Key::Process(process.inner_pid);
        if process.reset {
            store.drop_key(key);
        }
        forget(store, key, &process.gone, number);
        bytes += copy(store, key, number, tracker.read_process(process.pid, process.pages.clone()));
    }
    for object in &round.objects {
        let key = Key::Object(object.id);
        if object.reset {
            store.drop_key(key);
        }
        forget(store, key, &object.gone, number);
        bytes += copy(store, key, number, tracker.read_object(object.id, object.pages.clone()).unwrap());
    }
    bytes
}

fn forget(store: &PageStore, key: Key, gone: &PageSet, number: u16) {
    gone.ranges().iter().for_each(|range| store.forget(key, *range, number).unwrap());
}

fn copy(store: &PageStore, key: Key, number: u16, mut reader: PageReader) -> u64 {
    let (mut buffer, mut pieces, mut bytes) = (vec![0; 1 << 20], Vec::new(), 0);
    loop {
        reader.read(&mut buffer, &mut pieces).unwrap();
        if pieces.is_empty() {
            return bytes;
        }
        for piece in &pieces {
            match piece.content {
                Content::Data { at } => {
                    let length = piece.range.bytes() as usize;
                    store.put(key, piece.range.start, number, &buffer[at..at + length]).unwrap();
                    bytes += length as u64;
                }
                Content::Zero | Content::Absent => store.forget(key, piece.range, number).unwrap(),
            }
        }
    }
}

/// Where shared content belongs; numbers stay the same on one machine.
fn uses(last: &Round) -> Vec<SharedUse> {
    let kinds: HashMap<_, ObjectKind> = last.objects.iter().map(|o| (o.id, o.kind)).collect();
    let each = last.processes.iter().flat_map(|p| p.shared.iter().map(move |m| (p, m)));
    each.map(|(process, m)| SharedUse {
        inner_pid: process.inner_pid,
        pid: process.pid,
        range: m.range,
        object: m.object,
        kind: kinds[&m.object],
        offset: m.offset,
    })
    .collect()
}

struct Figures {
    sent: Vec<u64>,
    /// To read and store what the first round sends: nearly everything.
    first_copy: Duration,
    /// Objects whose content had to be compared in the last round.
    compared: usize,
    last_round: Duration,
    last_copy: Duration,
    dump: Duration,
    image_bytes: u64,
    restore: Duration,
    shared: SharedReport,
    fill: FillReport,
    /// Longest time a program waited for memory after the restore, in microseconds.
    longest_access_us: u64,
}

fn dump(world: &World, filter: &PageFilter) -> Duration {
    let began = Instant::now();
    let output = criu()
        .envs(filter.environment())
        .args(["dump", "-t", &world.root.to_string(), "--images-dir"])
        .arg(world.path("images"))
        .arg("--work-dir")
        .arg(world.path("work"))
        // As in a move: the processes stay, stopped.
        .args(["--leave-stopped", "-o", "dump.log", "-v2"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}\n{}", world.log("dump.log"));
    began.elapsed()
}

/// Restores; `held` is called while the processes are held. How long criu took, without that.
fn restore(world: &World, held: impl FnOnce()) -> Duration {
    // Stands in for the notifications of CRIU's RPC: at post-restore it says so, and waits.
    let script = world.path("script");
    let [says, waits] = ["says", "waits"].map(|name| world.path(name));
    let text = format!(
        "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = post-restore ] || exit 0\n: > {}\n\
         while [ ! -e {} ]; do sleep 0.001; done\n",
        says.display(),
        waits.display()
    );
    std::fs::write(&script, text).unwrap();
    Command::new("chmod").arg("755").arg(&script).status().unwrap();
    let began = Instant::now();
    let mut child = criu()
        .args(["restore", "--lazy-pages", "-d", "--action-script"])
        .arg(&script)
        .arg("--images-dir")
        .arg(world.path("images"))
        .arg("--work-dir")
        .arg(world.path("work"))
        .args(["-o", "restore.log", "-v2"])
        .spawn()
        .unwrap();
    while !says.exists() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}\n{}", world.log("restore.log"));
        assert!(began.elapsed() < Duration::from_secs(60), "{}", world.log("restore.log"));
        std::thread::sleep(Duration::from_micros(200));
    }
    let reached = began.elapsed();
    held();
    let began = Instant::now();
    std::fs::write(&waits, "").unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{}", world.log("restore.log"));
    reached + began.elapsed()
}

/// Where the filler runs.
enum Place {
    Here,
    Process,
    /// In a process that is left alone as soon as the restore is through, with this much still to come.
    Alone {
        left_bytes: u64,
    },
}

enum AnyFiller {
    Here(Filler),
    Process(FillerProcess),
}

impl AnyFiller {
    fn start(place: &Place, world: &World, store: Arc<PageStore>) -> AnyFiller {
        if matches!(place, Place::Here) {
            return AnyFiller::Here(Filler::listen(&world.path("work"), store).unwrap());
        }
        let mut command = Command::new(victim_path());
        command.arg("filler").arg(world.path("work"));
        let filler = FillerProcess::start(command, &world.path("work")).unwrap();
        let (bytes, began) = (store.bytes(), Instant::now());
        filler.load(store).unwrap();
        eprintln!("{} MiB handed over in {:?}", bytes >> 20, began.elapsed());
        AnyFiller::Process(filler)
    }

    fn restored(&self, uses: Vec<SharedUse>) -> SharedReport {
        match self {
            AnyFiller::Here(filler) => filler.restored(uses).unwrap(),
            AnyFiller::Process(filler) => filler.restored(uses).unwrap(),
        }
    }

    fn wait(&self) -> FillReport {
        let limit = Duration::from_secs(60);
        let report = match self {
            AnyFiller::Here(filler) => filler.wait(limit).unwrap(),
            AnyFiller::Process(filler) => filler.wait(limit).unwrap(),
        };
        report.expect("everything is filled")
    }
}

fn wait_for_end(pid: i32) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < deadline, "{pid} does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn carried_past_criu(private_mib: usize, shared_mib: usize, place: &Place) -> Figures {
    // Restored processes are adopted by the nearest reaper: us, so that they can be waited for.
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let world = World::start(private_mib, shared_mib);
    world.wait_for_turns(2);
    let store = Arc::new(PageStore::new().unwrap());
    let filter = PageFilter::install(world.directory.path()).unwrap();
    let pids = world.pids();
    let mut tracker = Tracker::new(common::stopping(move || pids.clone())).unwrap();
    let (mut sent, mut first_copy) = (Vec::new(), Duration::ZERO);
    for number in 0..4 {
        let round = tracker.round(&world.pids(), Target::Running).unwrap();
        assert!(round.processes.iter().all(|p| p.untracked.is_none()), "{round:?}");
        let began = Instant::now();
        sent.push(send(&tracker, &round, number, &store));
        if number == 0 {
            first_copy = began.elapsed();
        }
    }
    world.signal_all(Signal::SIGSTOP);
    while !world.pids().iter().all(|pid| stopped(*pid)) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let began = Instant::now();
    let last = tracker.round(&world.pids(), Target::Frozen).unwrap();
    eprintln!("round alone {:?}", began.elapsed());
    let served = serve_flags(&world, &filter);
    filter.leave_out(&last).unwrap();
    let last_round = began.elapsed();
    let began = Instant::now();
    sent.push(send(&tracker, &last, 4, &store));
    let last_copy = began.elapsed();
    let before = world.report();
    let dump = dump(&world, &filter);
    assert!(served.iter().all(|path| !path.exists()), "criu has read smaps of the kernel: {served:?}");
    drop(tracker);
    // Their numbers must be free again.
    world.signal_all(Signal::SIGKILL);
    for process in &last.processes {
        nix::sys::wait::waitpid(Pid::from_raw(process.pid), None).unwrap();
    }
    let held_bytes = store.bytes();
    let mut filler = Some(AnyFiller::start(place, &world, Arc::clone(&store)));
    let (mut shared, mut alone) = (SharedReport::default(), None);
    let restore = restore(&world, || {
        shared = filler.as_ref().unwrap().restored(uses(&last));
        if let (Place::Alone { left_bytes }, Some(AnyFiller::Process(process))) = (place, &filler) {
            let filled = process.progress().unwrap().filled_bytes;
            assert!(filled + left_bytes <= held_bytes, "{filled} of {held_bytes} bytes are filled already");
            alone = Some(process.pid());
            filler = None;
        }
    });
    world.signal_all(Signal::SIGCONT);
    let fill = filler.as_ref().map(AnyFiller::wait).unwrap_or_default();
    alone.into_iter().for_each(wait_for_end);
    let longest = |report: Vec<[u64; 3]>| report.iter().map(|r| r[2]).max().unwrap();
    world.wait_for_turns(60);
    let longest_access_us = longest(world.report());
    assert!(world.report().iter().zip(&before).all(|(now, then)| now[0] > then[0]));
    drop(filler);
    assert_eq!((store.bytes(), fill.left_bytes), (0, 0), "all pages are consumed");
    let registered = world.pids().into_iter().any(|pid| {
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        smaps.lines().any(|l| l.starts_with("VmFlags:") && l.contains(" um"))
    });
    assert!(!registered, "the processes are ordinary ones again");
    let image_bytes = world.image_bytes();
    for o in &last.objects {
        eprintln!("{:?} compared {} pages {} of {}", o.kind, o.compared, o.pages.pages(), o.size_bytes / 4096);
    }
    let compared = last.objects.iter().filter(|o| o.compared).count();
    Figures {
        sent,
        first_copy,
        compared,
        last_round,
        last_copy,
        dump,
        image_bytes,
        restore,
        shared,
        fill,
        longest_access_us,
    }
}

/// Flags of mappings in smaps' place; the files that criu is to read, and take away.
fn serve_flags(world: &World, filter: &PageFilter) -> Vec<PathBuf> {
    let flags = MappingFlags::learn().inspect_err(|error| eprintln!("criu reads smaps: {error}"));
    let Ok(flags) = flags else { return Vec::new() };
    let serve = |pid: i32| {
        filter.serve_smaps(pid, &flags.smaps(pid).unwrap()).unwrap();
        let path = world.path(&format!("leave-out.list.{pid}"));
        assert!(path.exists(), "{}", path.display());
        path
    };
    world.pids().into_iter().map(serve).collect()
}

fn stopped(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") T "))
}

fn show(name: &str, figures: &Figures) {
    let mib = |bytes: u64| bytes >> 20;
    let sent: Vec<_> = figures.sent.iter().map(|bytes| mib(*bytes)).collect();
    let (fill, shared) = (&figures.fill, &figures.shared);
    eprintln!(
        "{name}: rounds {sent:?} MiB, {:?} to copy the first, last {:?} ({} objects compared) + {:?} to copy; dump {:?}, {} KiB of images; restore {:?}; \
         shared {} MiB in {:?}, {} MiB later; filled {} MiB in {:?}, {} faults ({} zero), longest turn {:?}; \
         programs waited for memory {} µs at most",
        figures.first_copy,
        figures.last_round,
        figures.compared,
        figures.last_copy,
        figures.dump,
        figures.image_bytes >> 10,
        figures.restore,
        mib(shared.filled_bytes),
        shared.elapsed,
        mib(shared.lazy_bytes),
        mib(fill.filled_bytes),
        fill.elapsed,
        fill.faults,
        fill.zero_faults,
        fill.longest_turn,
        figures.longest_access_us,
    );
}

#[test]
fn memory_goes_past_criu_and_nothing_is_lost() {
    if !root_or_skip() {
        return;
    }
    let small = carried_past_criu(64, 16, &Place::Process);
    show("64 MiB private, 16 MiB shared", &small);
    assert!(small.image_bytes < 4 << 20, "the image has {} bytes", small.image_bytes);
    assert_eq!(small.fill.unplaced_pages, 0);
    let large = carried_past_criu(1024, 256, &Place::Process);
    show("1 GiB private, 256 MiB shared", &large);
    assert!(large.image_bytes < small.image_bytes * 2, "{} bytes, small {}", large.image_bytes, small.image_bytes);
}

#[test]
fn nothing_is_lost_with_the_filler_in_this_process() {
    if root_or_skip() {
        show("64 MiB private, 16 MiB shared, filled from here", &carried_past_criu(64, 16, &Place::Here));
    }
}

#[test]
fn nothing_is_lost_without_the_agent() {
    if root_or_skip() {
        let alone = carried_past_criu(256, 64, &Place::Alone { left_bytes: 64 << 20 });
        show("256 MiB private, 64 MiB shared, left alone", &alone);
    }
}
