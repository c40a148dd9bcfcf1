//! The system calls no safe wrapper covers, each behind a safe function that says what it needs.

pub(crate) mod areas;
pub(crate) mod bpf;
pub(crate) mod file;
pub(crate) mod heap;
pub(crate) mod mapping;
pub(crate) mod pagemap;
pub(crate) mod ptrace;
pub(crate) mod ring;
pub(crate) mod softdirty;
pub(crate) mod uffd;
pub(crate) mod vm;
