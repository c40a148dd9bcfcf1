//! Restartable sequences (rseq(2)): a thread that was stopped inside one must go on at its abort address. The kernel
//! sees to that on the way back to the thread, but looks at where our registers say it is, finds it outside, and
//! forgets the sequence. So we do it, in the registers that go back.

use super::arch;
use crate::pages::PageRange;
use crate::sys::ptrace::{self, Registers};

/// Offset of `rseq_cs`, the pointer to the running sequence's description, in struct rseq.
const SEQUENCE_OFFSET: u64 = 8;

pub(crate) fn abort_if_inside(pid: i32, tid: i32, mut registers: Registers) -> Registers {
    if arch::in_system_call(&registers) {
        return registers;
    }
    let Some(rseq) = ptrace::rseq(tid).filter(|r| r.pointer != 0) else { return registers };
    let Some([sequence]) = words(pid, rseq.pointer + SEQUENCE_OFFSET) else { return registers };
    if sequence == 0 {
        return registers;
    }
    // struct rseq_cs: version and flags, start_ip, post_commit_offset, abort_ip.
    let Some([_, start, length, abort]) = words(pid, sequence) else { return registers };
    if arch::instruction_pointer(&registers).wrapping_sub(start) < length {
        arch::set_instruction_pointer(&mut registers, abort);
    }
    registers
}

fn words<const N: usize>(pid: i32, address: u64) -> Option<[u64; N]> {
    let mut bytes = vec![0; N * 8];
    let range = PageRange { start: address, end: address + bytes.len() as u64 };
    let read = crate::sys::vm::read(pid, &[range], &mut bytes).ok()?;
    let mut words = [0; N];
    for (word, chunk) in words.iter_mut().zip(bytes[..read].chunks_exact(8)) {
        *word = u64::from_ne_bytes(chunk.try_into().ok()?);
    }
    (read == bytes.len()).then_some(words)
}
