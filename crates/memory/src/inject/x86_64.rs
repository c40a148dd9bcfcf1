//! x86_64: how a system call is made and what the registers say.

use nix::libc;

use crate::sys::ptrace::Registers;

pub(crate) const SUPPORTED: bool = true;
/// `syscall`
pub(crate) const INSTRUCTION: &[u8] = &[0x0f, 0x05];
pub(crate) const USERFAULTFD: u64 = libc::SYS_userfaultfd as u64;
pub(crate) const CLOSE: u64 = libc::SYS_close as u64;
/// The code segment of 32-bit code.
const USER32_CS: u64 = 0x23;

/// Registers with which the instruction at `instruction` makes the call.
pub(crate) fn call(saved: &Registers, instruction: u64, number: u64, arguments: [u64; 3]) -> Registers {
    let mut registers = *saved;
    registers.rip = instruction;
    registers.rax = number;
    // Not in a system call: the kernel must not "restart" what it finds in rax.
    registers.orig_rax = u64::MAX;
    [registers.rdi, registers.rsi, registers.rdx] = arguments;
    registers
}

pub(crate) fn result(registers: &Registers) -> i64 {
    registers.rax.cast_signed()
}

pub(crate) fn is_foreign(registers: &Registers) -> bool {
    registers.cs == USER32_CS
}

pub(crate) fn in_system_call(registers: &Registers) -> bool {
    registers.orig_rax.cast_signed() >= 0
}

pub(crate) fn instruction_pointer(registers: &Registers) -> u64 {
    registers.rip
}

pub(crate) fn set_instruction_pointer(registers: &mut Registers, to: u64) {
    registers.rip = to;
}

/// Calls that return EINTR when a thread is stopped, although no signal is delivered to it (signal(7), "Interruption
/// of system calls and library functions by stop signals"), and that have done nothing by then.
const INTERRUPTED_BY_STOPS: [i64; 7] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
];

/// Makes the thread call again where the stop alone has ended its call. Waits begin anew.
pub(crate) fn call_again_if_interrupted(registers: &mut Registers) {
    let number = registers.orig_rax.cast_signed();
    if INTERRUPTED_BY_STOPS.contains(&number) && result(registers) == -i64::from(libc::EINTR) {
        registers.rax = registers.orig_rax;
        registers.rip -= INSTRUCTION.len() as u64;
        registers.orig_rax = u64::MAX;
    }
}
