//! Small programs that the kernel runs for us (BPF), assembled here from a few instructions, and what they stand on:
//! the kernel's own description of its types (BTF, `/sys/kernel/btf/vmlinux`), maps, links.
//!
//! ```text
//!   Btf::of_kernel ─▶ offsets, ids ─▶ Code ─▶ Program::load ─▶ attach() ─▶ Link: runs until it is dropped
//!                                                         └──▶ TaskIterator: `over()` reads what it writes
//! ```
//!
//! Everything here needs CAP_BPF with CAP_PERFMON, or CAP_SYS_ADMIN. A kernel without BPF or BTF, or one that refuses,
//! is an error that says so; who uses this has another way.

mod btf;
mod code;
mod map;
mod program;
mod ring;

use std::io;

use thiserror::Error;

pub use btf::{Btf, TypeId};
pub use code::{Code, Condition, Label, Operation, Register, Size, helper};
pub use map::{Entries, Map, MapKind};
pub use program::{Hook, Link, Program, TaskIterator};
pub use ring::Ring;

#[derive(Debug, Error)]
pub enum BpfError {
    #[error("this kernel does not describe its types ({path}; CONFIG_DEBUG_INFO_BTF)")]
    NoTypes {
        path: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel's description of its types is not understood: {why}")]
    Types { why: String },
    #[error("this kernel has no {what}")]
    Missing { what: String },
    #[error("the kernel refuses the BPF program {name}: {said}")]
    Refused {
        name: String,
        /// The verifier's last words; empty where it was not asked.
        said: String,
        #[source]
        source: io::Error,
    },
    #[error("BPF program {name}: {why}")]
    Code { name: String, why: &'static str },
    #[error("going through a process came to no end after {bytes} bytes (BPF)")]
    Endless { bytes: usize },
    #[error("{doing} failed (BPF)")]
    Kernel {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

impl BpfError {
    fn kernel(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { doing, source }
    }
}
