//! Architectures for which borrowing a thread is not written yet.
//!
//! On aarch64 the kernel prepares the restart of an interrupted system call before a tracer sees the thread, and keeps
//! what it needs to undo that on its own stack; a timed wait could then be restarted from its beginning, which the way
//! used here does not notice.

use crate::sys::ptrace::Registers;

pub(crate) const SUPPORTED: bool = false;
pub(crate) const INSTRUCTION: &[u8] = &[0];
pub(crate) const USERFAULTFD: u64 = 0;
pub(crate) const CLOSE: u64 = 0;

pub(crate) fn call(saved: &Registers, _instruction: u64, _number: u64, _arguments: [u64; 3]) -> Registers {
    *saved
}

pub(crate) fn result(_registers: &Registers) -> i64 {
    -1
}

pub(crate) fn is_foreign(_registers: &Registers) -> bool {
    true
}

pub(crate) fn in_system_call(_registers: &Registers) -> bool {
    false
}

pub(crate) fn instruction_pointer(_registers: &Registers) -> u64 {
    0
}

pub(crate) fn set_instruction_pointer(_registers: &mut Registers, _to: u64) {}

pub(crate) fn call_again_if_interrupted(_registers: &mut Registers) {}
