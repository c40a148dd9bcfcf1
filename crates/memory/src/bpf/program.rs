//! Programs in the kernel, and what makes them run.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use super::{BpfError, Code, TypeId};
use crate::sys::bpf::{self, ProgramType};

/// Some of the kernel's functions for programs ask for a licence they may be used under.
const LICENSE: &[u8] = b"Dual MIT/GPL\0";
/// Room for the verifier's words about a program it refuses, in bytes; a few instructions need far less.
const LOG_BYTES: usize = 64 << 10;
/// Of these the last lines say what is wrong.
const LOG_LINES: usize = 8;
/// What one run of an iterator may tell, in bytes.
const MAX_TOLD_BYTES: usize = 64 << 20;
/// Asked for at once, in bytes; less than the kernel's own buffer (eight pages), so that no record is ever cut.
const READ_BYTES: usize = 16 << 10;

const RAW_TRACEPOINT: u32 = 17;
const TRACING: u32 = 26;
const ATTACH_TRACEPOINT: u32 = 23;
const ATTACH_ITERATOR: u32 = 28;

/// What a program is made for.
#[derive(Debug, Clone)]
pub enum Hook {
    /// A tracepoint by name: the context has its arguments as plain numbers of 64 bits.
    RawTracepoint(CString),
    /// A tracepoint ([`super::Btf::tracepoint`]): the context's arguments have types, and fields of what they point to
    /// can be loaded.
    Tracepoint(TypeId),
    /// One of the kernel's iterators, by its function (`bpf_iter_NAME`).
    Iterator(TypeId),
}

/// A loaded program. It does nothing before it is attached.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    hook: Hook,
}

/// The program runs at every event as long as this lives.
#[derive(Debug)]
pub struct Link {
    _fd: OwnedFd,
}

/// An iterator's program, to be run over one thread at a time.
#[derive(Debug)]
pub struct TaskIterator {
    program: OwnedFd,
}

impl Program {
    /// Loads a program; if the kernel refuses it, the error has what the verifier said.
    pub fn load(name: &str, hook: Hook, code: &Code) -> Result<Self, BpfError> {
        let code = code.assemble().map_err(|why| BpfError::Code { name: name.to_owned(), why })?;
        let kind = match &hook {
            Hook::RawTracepoint(_) => ProgramType { program: RAW_TRACEPOINT, attach: 0, btf_id: 0 },
            Hook::Tracepoint(id) => ProgramType { program: TRACING, attach: ATTACH_TRACEPOINT, btf_id: id.number() },
            Hook::Iterator(id) => ProgramType { program: TRACING, attach: ATTACH_ITERATOR, btf_id: id.number() },
        };
        let loaded = bpf::load(kind, name, LICENSE, &code, &mut []).or_else(|_| {
            // Once more, for what the verifier has to say.
            let mut log = vec![0; LOG_BYTES];
            bpf::load(kind, name, LICENSE, &code, &mut log).map_err(|source| {
                let said = log.split(|b| *b == 0).next().unwrap_or_default();
                BpfError::Refused { name: name.to_owned(), said: last_lines(&String::from_utf8_lossy(said)), source }
            })
        });
        Ok(Self { fd: loaded?, hook })
    }

    /// Attaches a program for a tracepoint.
    pub fn attach(&self) -> Result<Link, BpfError> {
        let name = match &self.hook {
            Hook::RawTracepoint(name) => Some(name.as_c_str()),
            Hook::Tracepoint(_) => None,
            Hook::Iterator(_) => {
                return Err(BpfError::Missing { what: "event for an iterator: it is run".to_owned() });
            }
        };
        let fd = bpf::open_tracepoint(self.fd.as_fd(), name).map_err(BpfError::kernel("attaching to a tracepoint"))?;
        Ok(Link { _fd: fd })
    }

    /// The iterator this program was loaded for.
    pub fn into_task_iterator(self) -> Result<TaskIterator, BpfError> {
        match self.hook {
            Hook::Iterator(_) => Ok(TaskIterator { program: self.fd }),
            _ => Err(BpfError::Missing { what: "iterator for an event's program".to_owned() }),
        }
    }
}

impl TaskIterator {
    /// What the program writes ([`super::helper::SEQ_WRITE`]) when it is run over the thread `tid`, a number in the
    /// caller's pid namespace. Nothing if there is no such thread.
    ///
    /// The program must write records of `record` bytes, none of them all zero but one at the end, when it is called
    /// without an object: the kernel begins the last part of an iteration over one thread again for who reads on (6.18).
    pub fn over(&self, tid: i32, record: usize) -> Result<Vec<u8>, BpfError> {
        let link = bpf::link_iterator(self.program.as_fd(), ATTACH_ITERATOR, tid);
        let link = link.map_err(BpfError::kernel("making ready to go through a process"))?;
        let run = bpf::run_iterator(link.as_fd()).map_err(BpfError::kernel("beginning to go through a process"))?;
        let (mut run, mut told, mut part) = (File::from(run), Vec::new(), vec![0; READ_BYTES]);
        while told.len() < MAX_TOLD_BYTES {
            let count = run.read(&mut part).map_err(BpfError::kernel("going through a process"))?;
            told.extend(&part[..count]);
            let whole = told.len().is_multiple_of(record).then(|| told.len().checked_sub(record)).flatten();
            if let Some(last) = whole
                && told[last..].iter().all(|byte| *byte == 0)
            {
                told.truncate(last);
                return Ok(told);
            }
            if count == 0 {
                break;
            }
        }
        Err(BpfError::Endless { bytes: told.len() })
    }
}

fn last_lines(text: &str) -> String {
    // The last lines but the statistics count what was looked at.
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("processed ") && !l.is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("; ")
}
