//! The flags of processes' mappings, told without a walk through page tables.
//!
//! Only `/proc/PID/smaps` has them (`VmFlags`), and for its other lines the kernel looks at every page: some 15 ms per
//! GiB, in the middle of a move's downtime, because CRIU wants to know the flags. A program of a few instructions, run by
//! the kernel for each mapping of a process (the iterator `task_vma`), tells them as bits in microseconds. What the bits
//! are called on the kernel that runs is learnt from it once: by mappings of our own, of which we read both.
//!
//! What is served in smaps' place has each mapping's first line, taken from `/proc/PID/maps`, and its `VmFlags`.

mod learn;

use std::io;

use thiserror::Error;

use crate::bpf::{BpfError, Btf, Code, Condition, Hook, Operation, Program, Register, Size, TaskIterator, helper};
use crate::sys::areas;
use learn::{Name, Names, Sample};

/// Tries of learning: this process's other threads map and unmap meanwhile.
const LEARN_TRIES: u32 = 5;
/// Of the kernel's own mapping at the end of the address space, which belongs to no process.
const GATE: &[u8] = b"[vsyscall]";
/// What the program writes for each mapping: start, end, flags.
const RECORD_BYTES: usize = 24;
const FLAGS_LINE: &[u8] = b"VmFlags:";

#[derive(Debug, Error)]
pub enum FlagsError {
    #[error("the kernel's answers for mappings' flags")]
    Bpf(#[from] BpfError),
    #[error("{file} of process {pid} could not be read")]
    Read {
        file: &'static str,
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("which bit has which name in VmFlags could not be learnt: {why}")]
    NotLearnt { why: &'static str },
    #[error("process {pid} has a mapping with flags whose names are not known ({bits:#x})")]
    UnknownBits { pid: i32, bits: u64 },
    #[error("process {pid} has other mappings than its maps say (at {at:#x})")]
    Differs { pid: i32, at: u64 },
}

/// Tells the flags of mappings of any process. Needs CAP_BPF and CAP_PERFMON.
#[derive(Debug)]
pub struct MappingFlags {
    iterator: TaskIterator,
    names: Names,
    /// Flags of [`GATE`], which is no process's own and the same in all.
    gate: Option<Vec<Name>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    flags: u64,
}

impl MappingFlags {
    /// Loads the program and learns the flags' names. Takes some 10 ms; once per process is enough.
    pub fn learn() -> Result<Self, FlagsError> {
        let iterator = load()?;
        let _areas = areas::with_every_flag();
        let mut last = FlagsError::NotLearnt { why: "not tried" };
        for _ in 0..LEARN_TRIES {
            match learn_here(&iterator) {
                Ok((names, gate)) => return Ok(Self { iterator, names, gate }),
                Err(error @ FlagsError::NotLearnt { .. }) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// What `/proc/PID/smaps` of a process that stands still says about its mappings: each one's first line and its
    /// `VmFlags`, nothing else. Microseconds, whatever its memory. An error where anything is in doubt.
    pub fn smaps(&self, pid: i32) -> Result<Vec<u8>, FlagsError> {
        let maps = read(pid, "maps")?;
        let told = mappings(&self.iterator, pid)?;
        let (mut told, mut text) = (told.into_iter().peekable(), Vec::with_capacity(maps.len() * 2));
        for line in maps.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let (start, end) = range(line).ok_or(FlagsError::Differs { pid, at: 0 })?;
            let differs = FlagsError::Differs { pid, at: start };
            let names = match told.next_if(|m| (m.start, m.end) == (start, end)) {
                Some(Mapping { flags, .. }) => {
                    let bits = self.names.unknown(flags);
                    self.names.of(flags).ok_or(FlagsError::UnknownBits { pid, bits })?
                }
                None if line.ends_with(GATE) => self.gate.clone().ok_or(differs)?,
                None => return Err(differs),
            };
            text.extend(line);
            text.push(b'\n');
            text.extend(FLAGS_LINE);
            text.push(b' ');
            // Each name is followed by a space, as in smaps.
            names.iter().for_each(|name| text.extend([name[0], name[1], b' ']));
            text.push(b'\n');
        }
        match told.next() {
            Some(more) => Err(FlagsError::Differs { pid, at: more.start }),
            None => Ok(text),
        }
    }
}

/// The program: for each mapping its start, end and flags, zeroes at the end.
fn load() -> Result<TaskIterator, BpfError> {
    let btf = Btf::of_kernel()?;
    let (context, mapping) = ("bpf_iter__task_vma", "vm_area_struct");
    let end = RECORD_BYTES as i16;
    let mut code = Code::new();
    let write = code.label();
    code.load(Size::U64, Register::R6, Register::R1, btf.offset_of(context, "meta")?).load(
        Size::U64,
        Register::R7,
        Register::R1,
        btf.offset_of(context, "vma")?,
    );
    for word in 0..3 {
        code.store_number(Size::U64, Register::R10, word * 8 - end, 0);
    }
    code.jump_if_number(Register::R7, Condition::Equal, 0, write);
    for (word, field) in (0..).zip(["vm_start", "vm_end", "vm_flags"]) {
        code.load(Size::U64, Register::R1, Register::R7, btf.offset_of(mapping, field)?).store(
            Size::U64,
            Register::R10,
            word * 8 - end,
            Register::R1,
        );
    }
    code.place(write)
        .load(Size::U64, Register::R1, Register::R6, btf.offset_of("bpf_iter_meta", "seq")?)
        .copy(Register::R2, Register::R10)
        .operate_number(Operation::Add, Register::R2, -i32::from(end))
        .set(Register::R3, i32::from(end))
        .call(helper::SEQ_WRITE)
        .set(Register::R0, 0)
        .exit();
    let hook = Hook::Iterator(btf.function("bpf_iter_task_vma")?);
    Program::load("godwit_flags", hook, &code)?.into_task_iterator()
}

fn mappings(iterator: &TaskIterator, pid: i32) -> Result<Vec<Mapping>, BpfError> {
    let told = iterator.over(pid, RECORD_BYTES)?;
    let words = |record: &[u8]| {
        let mut words = record.chunks_exact(8).map(|w| u64::from_ne_bytes(w.try_into().unwrap_or_default()));
        Some(Mapping { start: words.next()?, end: words.next()?, flags: words.next()? })
    };
    Ok(told.chunks_exact(RECORD_BYTES).filter_map(words).collect())
}

/// Names from this process's own mappings; those that other threads change meanwhile do not count.
fn learn_here(iterator: &TaskIterator) -> Result<(Names, Option<Vec<Name>>), FlagsError> {
    let own = std::process::id().cast_signed();
    let before = mappings(iterator, own)?;
    let smaps = read(own, "smaps")?;
    let after = mappings(iterator, own)?;
    let (mut samples, mut gate, mut at) = (Vec::new(), None, None);
    for line in smaps.split(|b| *b == b'\n') {
        if let Some(found) = range(line) {
            at = Some((found, line.ends_with(GATE)));
        } else if let Some(words) = line.strip_prefix(FLAGS_LINE)
            && let Some(((start, end), is_gate)) = at.take()
        {
            let words = words.split(|b| *b == b' ').filter(|w| !w.is_empty());
            let names: Option<Vec<Name>> = words.map(|w| w.try_into().ok()).collect();
            let names = names.ok_or(FlagsError::NotLearnt { why: "a name has not two letters" })?;
            let same = |m: &&Mapping| (m.start, m.end) == (start, end);
            match (before.iter().find(same), after.iter().find(same)) {
                (Some(one), Some(other)) if one == other => samples.push(Sample { bits: one.flags, names }),
                (None, None) if is_gate => gate = Some(names),
                _ => {}
            }
        }
    }
    if samples.is_empty() {
        return Err(FlagsError::NotLearnt { why: "the iterator and smaps agree about no mapping of this process" });
    }
    let names = Names::learn(&samples).ok_or(FlagsError::NotLearnt { why: "what is told contradicts itself" })?;
    Ok((names, gate))
}

fn read(pid: i32, file: &'static str) -> Result<Vec<u8>, FlagsError> {
    std::fs::read(format!("/proc/{pid}/{file}")).map_err(|source| FlagsError::Read { file, pid, source })
}

/// Where the mapping is that a line of maps or smaps begins with; `None` for smaps' other lines.
fn range(line: &[u8]) -> Option<(u64, u64)> {
    let place = std::str::from_utf8(line.split(|b| *b == b' ').next()?).ok()?;
    let (start, end) = place.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}
