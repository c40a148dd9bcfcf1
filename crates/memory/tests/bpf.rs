//! Programs that this kernel runs for us.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::process::Command;

use godwit_memory::bpf::{
    BpfError, Btf, Code, Condition, Hook, Map, MapKind, Operation, Program, Register, Size, helper,
};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// The kernel's types; `None`, told why, where this kernel has no BPF for anybody.
fn types_or_skip() -> Option<Btf> {
    if !common::root_or_skip() {
        return None;
    }
    match Btf::of_kernel() {
        Ok(btf) => Some(btf),
        Err(error @ BpfError::NoTypes { .. }) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Every task that is forked, by its number, into a map.
#[test]
fn a_tracepoint_with_types_tells_of_a_child() {
    let Some(btf) = types_or_skip() else { return };
    let map = Map::create(MapKind::Hash, "forked", 4, 8, 4096).unwrap();
    let mut code = Code::new();
    // The context: parent, child.
    code.load(Size::U64, Register::R6, Register::R1, 8)
        .load(Size::U32, Register::R6, Register::R6, btf.offset_of("task_struct", "tgid").unwrap())
        .store(Size::U32, Register::R10, -4, Register::R6)
        .store_number(Size::U64, Register::R10, -16, 7)
        .set_map(Register::R1, &map)
        .copy(Register::R2, Register::R10)
        .operate_number(Operation::Add, Register::R2, -4)
        .copy(Register::R3, Register::R10)
        .operate_number(Operation::Add, Register::R3, -16)
        .set(Register::R4, 0)
        .call(helper::MAP_UPDATE_ELEM)
        .set(Register::R0, 0)
        .exit();
    let hook = Hook::Tracepoint(btf.tracepoint("sched_process_fork").unwrap());
    let link = Program::load("forks", hook, &code).unwrap().attach().unwrap();
    let mut child = Command::new("/bin/true").spawn().unwrap();
    let pid = child.id().to_ne_bytes();
    child.wait().unwrap();
    let told = map.take_all().unwrap();
    assert!(told.iter().any(|entry| entry == (&pid[..], &7u64.to_ne_bytes()[..])), "{pid:?} is not in {told:?}");
    drop(link);
    assert_eq!(map.get(&pid).unwrap(), None);
}

/// A count of events in an array, by a tracepoint whose arguments are plain numbers.
#[test]
fn a_raw_tracepoint_counts() {
    if types_or_skip().is_none() {
        return;
    }
    let map = Map::create(MapKind::Array, "count", 4, 8, 1).unwrap();
    let mut code = Code::new();
    let none = code.label();
    code.store_number(Size::U32, Register::R10, -4, 0)
        .set_map(Register::R1, &map)
        .copy(Register::R2, Register::R10)
        .operate_number(Operation::Add, Register::R2, -4)
        .call(helper::MAP_LOOKUP_ELEM)
        .jump_if_number(Register::R0, Condition::Equal, 0, none)
        .set(Register::R1, 1)
        .atomically(Operation::Add, Size::U64, Register::R0, 0, Register::R1)
        .place(none)
        .set(Register::R0, 0)
        .exit();
    let count = || u64::from_ne_bytes(map.get(&[0; 4]).unwrap().unwrap().try_into().unwrap());
    let program = Program::load("exits", Hook::RawTracepoint(c"sched_process_exit".into()), &code).unwrap();
    assert_eq!(count(), 0);
    let link = program.attach().unwrap();
    for _ in 0..3 {
        Command::new("/bin/true").status().unwrap();
    }
    drop(link);
    assert!(count() >= 3, "{}", count());
}

#[test]
fn what_is_put_into_a_hash_comes_out_once() {
    if types_or_skip().is_none() {
        return;
    }
    // More than one call takes.
    const ENTRIES: u32 = 40_000;
    let map = Map::create(MapKind::Hash, "numbers", 4, 8, ENTRIES).unwrap();
    for n in 0..ENTRIES {
        map.put(&n.to_ne_bytes(), &u64::from(n).to_ne_bytes()).unwrap();
    }
    assert!(map.put(&ENTRIES.to_ne_bytes(), &[0; 8]).is_err(), "a full map took one more");
    assert!(map.put(&[0; 3], &[0; 8]).is_err() && map.get(&[0; 5]).is_err(), "a key of another size was taken");
    assert!(map.remove(&5u32.to_ne_bytes()).unwrap() && !map.remove(&5u32.to_ne_bytes()).unwrap());
    let taken = map.take_all().unwrap();
    let number = |k: &[u8]| u32::from_ne_bytes(k.try_into().unwrap());
    let told = taken.iter().map(|(k, v)| (number(k), u64::from_ne_bytes(v.try_into().unwrap())));
    let mut told: Vec<_> = told.collect();
    told.sort_unstable();
    assert!(told.into_iter().eq((0..ENTRIES).filter(|n| *n != 5).map(|n| (n, u64::from(n)))));
    assert_eq!(map.take_all().unwrap().iter().count(), 0);
}

#[test]
fn an_iterator_goes_through_one_process() {
    let Some(btf) = types_or_skip() else { return };
    let offset = |structure, field| btf.offset_of(structure, field).unwrap();
    let mut code = Code::new();
    let end = code.label();
    code.load(Size::U64, Register::R6, Register::R1, offset("bpf_iter__task_vma", "meta"))
        .load(Size::U64, Register::R7, Register::R1, offset("bpf_iter__task_vma", "vma"))
        .store_number(Size::U64, Register::R10, -8, 0)
        .jump_if_number(Register::R7, Condition::Equal, 0, end)
        .load(Size::U64, Register::R2, Register::R7, offset("vm_area_struct", "vm_start"))
        .store(Size::U64, Register::R10, -8, Register::R2)
        .place(end)
        .load(Size::U64, Register::R1, Register::R6, offset("bpf_iter_meta", "seq"))
        .copy(Register::R2, Register::R10)
        .operate_number(Operation::Add, Register::R2, -8)
        .set(Register::R3, 8)
        .call(helper::SEQ_WRITE)
        .set(Register::R0, 0)
        .exit();
    let hook = Hook::Iterator(btf.function("bpf_iter_task_vma").unwrap());
    let iterator = Program::load("starts", hook, &code).unwrap().into_task_iterator().unwrap();
    let victim = common::Victim::start(&["wait", "poll"]);
    victim.freeze();
    let told = iterator.over(victim.pid(), 8).unwrap();
    let told: Vec<u64> = told.chunks(8).map(|w| u64::from_ne_bytes(w.try_into().unwrap())).collect();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", victim.pid())).unwrap();
    let starts = maps.lines().filter(|l| !l.ends_with("[vsyscall]"));
    let starts: Vec<u64> = starts.map(|l| u64::from_str_radix(l.split('-').next().unwrap(), 16).unwrap()).collect();
    assert_eq!(told, starts);
    assert!(starts.len() > 5);
    // More than one read takes; neighbours differ, so that they stay apart.
    for n in 0..5000 {
        let protection = if n % 2 == 0 { ProtFlags::READ } else { ProtFlags::empty() };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        unsafe { mmap_anonymous(std::ptr::null_mut(), common::PAGE, protection, MapFlags::PRIVATE).unwrap() };
    }
    let told = iterator.over(std::process::id().cast_signed(), 8).unwrap();
    let told: Vec<u64> = told.chunks(8).map(|w| u64::from_ne_bytes(w.try_into().unwrap())).collect();
    assert!(told.len() > 5000 && told.is_sorted_by(|a, b| a < b), "{} told", told.len());
    assert_eq!(iterator.over(i32::MAX, 8).unwrap(), [0u8; 0]);
}

#[test]
fn a_program_that_is_refused_says_why() {
    if types_or_skip().is_none() {
        return;
    }
    let mut code = Code::new();
    // R5 was never set.
    code.copy(Register::R0, Register::R5).exit();
    let hook = Hook::RawTracepoint(c"sched_process_exit".into());
    let error = Program::load("wrong", hook, &code).unwrap_err();
    assert!(matches!(&error, BpfError::Refused { said, .. } if said.contains("R5 !read_ok")), "{error}");
    code = Code::new();
    code.set(Register::R0, 0).exit();
    let nowhere = Program::load("nowhere", Hook::RawTracepoint(c"no_such_event".into()), &code).unwrap();
    assert!(matches!(nowhere.attach(), Err(BpfError::Kernel { .. })));
    assert!(nowhere.into_task_iterator().is_err());
}
