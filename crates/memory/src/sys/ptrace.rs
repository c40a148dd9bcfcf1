//! ptrace(2), with the requests no wrapper has. All must be made by the thread that seized.

use std::io;
use std::mem::MaybeUninit;

use nix::libc;

const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const GET_SYSCALL_USER_DISPATCH: libc::c_uint = 0x4211;
const NT_PRSTATUS: usize = 1;
const EVENT_STOP: i32 = 128;

/// The thread's filter does not apply while it is seized with this (CONFIG_CHECKPOINT_RESTORE, CAP_SYS_ADMIN).
pub(crate) const O_SUSPEND_SECCOMP: usize = 1 << 21;
/// Stops at system calls can be told from signals.
pub(crate) const O_TRACESYSGOOD: usize = 1;

pub(crate) type Registers = libc::user_regs_struct;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// By [`interrupt`], or in a group stop.
    Interrupted,
    SystemCall,
    /// A signal is about to be delivered.
    Signal(i32),
    Gone,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Rseq {
    /// Address of the thread's `struct rseq`; 0 if it has none.
    pub pointer: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
    pad: u32,
}

/// # Safety
/// `data` must be what the request takes: a plain number, or a pointer valid for what the request reads or writes.
unsafe fn request(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the caller vouches for `data`; addresses in the other process are checked by the kernel.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn seize(tid: i32, options: usize) -> io::Result<()> {
    // SAFETY: the options are a number.
    unsafe { request(libc::PTRACE_SEIZE, tid, 0, options) }
}

pub(crate) fn interrupt(tid: i32) -> io::Result<()> {
    // SAFETY: takes nothing.
    unsafe { request(libc::PTRACE_INTERRUPT, tid, 0, 0) }
}

/// Lets the thread go on; `signal` is delivered to it (0: none).
pub(crate) fn go_on(tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: the signal is a number.
    unsafe { request(libc::PTRACE_CONT, tid, 0, signal as usize) }
}

/// Lets the thread go on up to the next entry to or exit from a system call.
pub(crate) fn go_to_system_call(tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: the signal is a number.
    unsafe { request(libc::PTRACE_SYSCALL, tid, 0, signal as usize) }
}

pub(crate) fn detach(tid: i32) -> io::Result<()> {
    // SAFETY: takes nothing.
    unsafe { request(libc::PTRACE_DETACH, tid, 0, 0) }
}

pub(crate) fn registers(tid: i32) -> io::Result<Registers> {
    let mut registers = MaybeUninit::<Registers>::zeroed();
    let mut vector = libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size_of::<Registers>() };
    // SAFETY: the kernel writes at most `iov_len` bytes to `registers`.
    unsafe { request(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, &raw mut vector as usize)? };
    // A 32-bit program's set is shorter; its bytes would be misread.
    if vector.iov_len != size_of::<Registers>() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    // SAFETY: all bytes were set, and any value is valid for registers.
    Ok(unsafe { registers.assume_init() })
}

pub(crate) fn set_registers(tid: i32, registers: &Registers) -> io::Result<()> {
    let base = std::ptr::from_ref(registers).cast_mut().cast();
    let mut vector = libc::iovec { iov_base: base, iov_len: size_of::<Registers>() };
    // SAFETY: the kernel only reads `registers` for SETREGSET.
    unsafe { request(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw mut vector as usize) }
}

/// The signals the thread blocks; where a system call has replaced them for its duration, the ones to come back.
pub(crate) fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: the kernel writes 8 bytes, the size passed as address.
    unsafe { request(GETSIGMASK, tid, size_of::<u64>(), &raw mut mask as usize)? };
    Ok(mask)
}

pub(crate) fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads 8 bytes, the size passed as address.
    unsafe { request(SETSIGMASK, tid, size_of::<u64>(), &raw const mask as usize) }
}

/// The thread's registration for restartable sequences (rseq(2)); `None` where the kernel cannot tell.
pub(crate) fn rseq(tid: i32) -> Option<Rseq> {
    let mut rseq = Rseq { pointer: 0, size: 0, signature: 0, flags: 0, pad: 0 };
    // SAFETY: the kernel writes at most the size passed as address.
    unsafe { request(GET_RSEQ_CONFIGURATION, tid, size_of::<Rseq>(), &raw mut rseq as usize).ok()? };
    Some(rseq)
}

/// Whether the thread's system calls are turned into signals (prctl PR_SET_SYSCALL_USER_DISPATCH).
pub(crate) fn system_calls_are_dispatched(tid: i32) -> bool {
    // struct ptrace_sud_config: mode, selector, offset, len.
    let mut config = [0u64; 4];
    // SAFETY: the kernel writes at most the size passed as address.
    let known = unsafe { request(GET_SYSCALL_USER_DISPATCH, tid, size_of_val(&config), config.as_mut_ptr() as usize) };
    known.is_ok() && config[0] != 0
}

/// The thread's next stop. With `block` it is waited for, else `None` if it has not stopped yet.
pub(crate) fn next_stop(tid: i32, block: bool) -> io::Result<Option<Stop>> {
    let mut status = 0;
    let options = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    // SAFETY: the kernel writes one int.
    let found = unsafe { libc::waitpid(tid, &raw mut status, options) };
    if found == 0 {
        return Ok(None);
    }
    if found < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EINTR) => Ok(None),
            // A thread that is not its process's first is reaped by the kernel when its process ends.
            Some(libc::ECHILD) => Ok(Some(Stop::Gone)),
            _ => Err(error),
        };
    }
    Ok(Some(if !libc::WIFSTOPPED(status) {
        Stop::Gone
    } else if status >> 16 == EVENT_STOP {
        Stop::Interrupted
    } else if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
        Stop::SystemCall
    } else {
        Stop::Signal(libc::WSTOPSIG(status))
    }))
}

/// Lets the calling thread run before all threads of ordinary priority, where that is allowed. It must sleep or wait
/// most of the time.
pub(crate) fn run_first() {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameter outlives the call; 0 is the calling thread. A refusal leaves the priority as it was.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}
