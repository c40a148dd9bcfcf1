//! The system call filter of every container.
//!
//! One filter program (seccomp(2), classic BPF), so that each refusal can have its own errno and
//! a move has one program to carry. Order of decisions:
//!
//! | call | answer | why |
//! |---|---|---|
//! | another architecture's table (x32, i386) | killed / ENOSYS | no second, unchecked table |
//! | [`table::ALLOWED`] | allowed | what the usual default profile grants without privileges |
//! | `clone`, `unshare` with CLONE_NEW* | EPERM | nested namespaces are attack surface and cannot be carried |
//! | `clone3` | ENOSYS | its flags are behind a pointer; libraries fall back to `clone` |
//! | `socket` other than unix, IPv4, IPv6, netlink | EAFNOSUPPORT | packet, vsock, alg and others: host reach, cannot be carried |
//! | `socket`, IPv4 and IPv6, other than TCP, UDP, UDP-Lite, ICMP (MPTCP, SCTP, SMC, …) | EPROTONOSUPPORT | cannot be carried; Go and others fall back to TCP |
//! | `socket`, IPv4 and IPv6, of type SEQPACKET (SCTP by its other name) | ESOCKTNOSUPPORT | cannot be carried |
//! | `setsockopt` TCP_ULP (TLS in the kernel) | ENOENT | its keys cannot be carried; libraries encrypt themselves |
//! | `setsockopt` TCP_MD5SIG, TCP_AO | ENOPROTOOPT | their keys cannot be carried: the connection would die |
//! | `prctl` PR_SET_MDWE, PR_SET_SYSCALL_USER_DISPATCH | EINVAL | the first keeps CRIU out, the second is lost; as on older kernels |
//! | `personality` other than the usual five values | EPERM | weakens address randomisation |
//! | `ioctl` TIOCSTI, TIOCLINUX | EPERM | types into a terminal the program does not own |
//! | `seccomp` with a listener | EPERM | the listener's descriptor cannot be carried |
//! | [`table::REFUSED`] | EPERM | mount, bpf, perf, keys, modules, kexec, clocks, userfaultfd, … |
//! | everything else: io_uring, mq_*, landlock, pkeys, memfd_secret, future calls | ENOSYS | programs fall back as on a kernel without it |

pub mod table;

use nix::libc::{self, c_long, sock_filter};

/// AUDIT_ARCH_*: machine number with the 64-bit and little-endian flags.
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xC000_00B7;

/// x32 calls carry this bit in their number.
#[cfg(target_arch = "x86_64")]
const X32_BIT: u32 = 0x4000_0000;

/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}.
const NAMESPACE_FLAGS: u32 = 0x7E02_0000;
/// Also CLONE_NEWTIME, whose bit belongs to the exit signal in `clone`.
const NAMESPACE_FLAGS_UNSHARE: u32 = NAMESPACE_FLAGS | 0x80;

/// IPPROTO_{IP,ICMP,TCP,UDP,ICMPV6,UDPLITE}; raw sockets, of any protocol, need a capability that no container has.
const INET_PROTOCOLS: [u32; 6] = [0, 1, 6, 17, 58, 136];
/// The bits of `socket`'s type that are the type; above them are flags.
const SOCKET_TYPE_MASK: u32 = 0xF;
/// TCP_ULP.
const TCP_UPPER_LAYER: u32 = 31;
/// TCP_{MD5SIG,MD5SIG_EXT,AO_ADD_KEY,AO_DEL_KEY,AO_INFO}.
const TCP_KEYS: [u32; 5] = [14, 32, 38, 39, 40];
/// PR_SET_SYSCALL_USER_DISPATCH, PR_SET_MDWE.
const PROCESS_MODES: [u32; 2] = [59, 65];
const SECCOMP_FILTER_FLAG_NEW_LISTENER: u32 = 8;
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541C;
/// PER_LINUX, PER_LINUX32, UNAME26, PER_LINUX32 | UNAME26, and the query.
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF];

// Offsets in struct seccomp_data.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;

/// Offset of the low half of argument `index` (little-endian). The kernel looks at no more of
/// the arguments that are compared here.
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

const fn errno(code: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | (code as u32 & libc::SECCOMP_RET_DATA)
}

/// The filter as the kernel takes it.
pub fn program() -> Vec<sock_filter> {
    let mut code = Assembler::default();
    code.load(OFFSET_ARCH);
    code.unless_equal_return(AUDIT_ARCH, libc::SECCOMP_RET_KILL_PROCESS);
    code.load(OFFSET_NUMBER);
    #[cfg(target_arch = "x86_64")]
    code.if_at_least_return(X32_BIT, errno(libc::ENOSYS));
    for number in table::ALLOWED.iter().chain(table::ALLOWED_HERE) {
        code.if_equal_return(*number as u32, ALLOW);
    }
    for number in table::REFUSED.iter().chain(table::REFUSED_HERE) {
        code.if_equal_return(*number as u32, errno(libc::EPERM));
    }
    code.case(libc::SYS_clone, |code| {
        code.load(argument(0));
        code.if_any_bit_return(NAMESPACE_FLAGS, errno(libc::EPERM));
        code.ret(ALLOW);
    });
    code.case(libc::SYS_unshare, |code| {
        code.load(argument(0));
        code.if_any_bit_return(NAMESPACE_FLAGS_UNSHARE, errno(libc::EPERM));
        code.ret(ALLOW);
    });
    code.case(libc::SYS_socket, |code| {
        code.load(argument(0));
        code.if_equal_return(libc::AF_UNIX as u32, ALLOW);
        code.if_equal_return(libc::AF_NETLINK as u32, ALLOW);
        code.unless_any_equal_return(&[libc::AF_INET as u32, libc::AF_INET6 as u32], errno(libc::EAFNOSUPPORT));
        code.load(argument(1));
        code.and(SOCKET_TYPE_MASK);
        code.if_equal_return(libc::SOCK_SEQPACKET as u32, errno(libc::ESOCKTNOSUPPORT));
        code.load(argument(2));
        for protocol in INET_PROTOCOLS {
            code.if_equal_return(protocol, ALLOW);
        }
        // A raw socket of another protocol is refused by the kernel, for want of a capability; so are they all here.
        code.ret(errno(libc::EPROTONOSUPPORT));
    });
    code.case(libc::SYS_setsockopt, |code| {
        code.load(argument(1));
        code.unless_any_equal_return(&[libc::IPPROTO_TCP as u32], ALLOW);
        code.load(argument(2));
        code.if_equal_return(TCP_UPPER_LAYER, errno(libc::ENOENT));
        for option in TCP_KEYS {
            code.if_equal_return(option, errno(libc::ENOPROTOOPT));
        }
        code.ret(ALLOW);
    });
    code.case(libc::SYS_prctl, |code| {
        code.load(argument(0));
        for mode in PROCESS_MODES {
            code.if_equal_return(mode, errno(libc::EINVAL));
        }
        code.ret(ALLOW);
    });
    code.case(libc::SYS_personality, |code| {
        code.load(argument(0));
        for value in PERSONALITIES {
            code.if_equal_return(value, ALLOW);
        }
        code.ret(errno(libc::EPERM));
    });
    code.case(libc::SYS_ioctl, |code| {
        code.load(argument(1));
        code.if_equal_return(TIOCSTI, errno(libc::EPERM));
        code.if_equal_return(TIOCLINUX, errno(libc::EPERM));
        code.ret(ALLOW);
    });
    code.case(libc::SYS_seccomp, |code| {
        code.load(argument(1));
        code.if_any_bit_return(SECCOMP_FILTER_FLAG_NEW_LISTENER, errno(libc::EPERM));
        code.ret(ALLOW);
    });
    code.ret(errno(libc::ENOSYS));
    code.0
}

#[derive(Default)]
struct Assembler(Vec<sock_filter>);

impl Assembler {
    fn push(&mut self, code: u32, jt: u8, jf: u8, k: u32) {
        // Instruction codes are 16 bits wide; the constants come as 32.
        self.0.push(sock_filter { code: code as u16, jt, jf, k });
    }

    fn load(&mut self, offset: u32) {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    }

    fn ret(&mut self, action: u32) {
        self.push(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    }

    fn if_equal_return(&mut self, value: u32, action: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, value);
        self.ret(action);
    }

    fn unless_equal_return(&mut self, value: u32, action: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, value);
        self.ret(action);
    }

    /// Goes on where the accumulator is one of a few values.
    fn unless_any_equal_return(&mut self, values: &[u32], action: u32) {
        for (index, value) in values.iter().enumerate() {
            // Past the comparisons that follow, and past the return.
            let skip = u8::try_from(values.len() - index).unwrap_or(u8::MAX);
            self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, skip, 0, *value);
        }
        self.ret(action);
    }

    fn and(&mut self, mask: u32) {
        self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, mask);
    }

    #[cfg(target_arch = "x86_64")]
    fn if_at_least_return(&mut self, value: u32, action: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, value);
        self.ret(action);
    }

    fn if_any_bit_return(&mut self, mask: u32, action: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, mask);
        self.ret(action);
    }

    /// Instructions for one call; they must end in a return, for the number is lost by then.
    fn case(&mut self, number: c_long, body: impl FnOnce(&mut Assembler)) {
        let mut inner = Assembler::default();
        body(&mut inner);
        // A body is some twenty instructions, far from the 255 a jump can skip.
        let skip = u8::try_from(inner.0.len()).unwrap_or(u8::MAX);
        self.push(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, number as u32);
        self.0.append(&mut inner.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program on a call as the kernel would.
    fn answer(number: c_long, arguments: [u32; 3]) -> u32 {
        let program = program();
        let load = |offset| match offset {
            OFFSET_NUMBER => number as u32,
            OFFSET_ARCH => AUDIT_ARCH,
            offset => arguments[((offset - 16) / 8) as usize],
        };
        let (mut at, mut accumulator) = (0, 0);
        for _ in 0..4096 {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let taken = match u32::from(code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = load(k);
                    continue;
                }
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => {
                    accumulator &= k;
                    continue;
                }
                code if code & 0xF0 == libc::BPF_JEQ => accumulator == k,
                code if code & 0xF0 == libc::BPF_JGE => accumulator >= k,
                _ => accumulator & k != 0,
            };
            at += usize::from(if taken { jt } else { jf });
        }
        panic!("no return");
    }

    #[test]
    fn each_rule_of_the_table_answers() {
        assert_eq!(answer(libc::SYS_read, [0; 3]), ALLOW);
        assert_eq!(answer(libc::SYS_clone, [libc::SIGCHLD as u32, 0, 0]), ALLOW);
        assert_eq!(answer(libc::SYS_clone, [libc::CLONE_NEWUSER as u32, 0, 0]), errno(libc::EPERM));
        assert_eq!(answer(libc::SYS_clone3, [0; 3]), errno(libc::ENOSYS));
        assert_eq!(answer(libc::SYS_unshare, [libc::CLONE_FILES as u32, 0, 0]), ALLOW);
        assert_eq!(answer(libc::SYS_unshare, [0x80, 0, 0]), errno(libc::EPERM));
        assert_eq!(answer(libc::SYS_socket, [2, 1, 0]), ALLOW);
        let (mptcp, sctp, smc) = (262, 132, 256);
        for protocol in [mptcp, sctp, smc] {
            assert_eq!(answer(libc::SYS_socket, [2, 1, protocol]), errno(libc::EPROTONOSUPPORT));
            assert_eq!(answer(libc::SYS_socket, [10, 1, protocol]), errno(libc::EPROTONOSUPPORT));
        }
        let seqpacket = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u32;
        assert_eq!(answer(libc::SYS_socket, [10, seqpacket, 0]), errno(libc::ESOCKTNOSUPPORT));
        assert_eq!(answer(libc::SYS_socket, [1, seqpacket, 0]), ALLOW);
        assert_eq!(answer(libc::SYS_socket, [10, 2, 58]), ALLOW);
        // Netlink's protocols are numbers of their own.
        assert_eq!(answer(libc::SYS_socket, [16, 3, 15]), ALLOW);
        assert_eq!(answer(libc::SYS_setsockopt, [3, 6, TCP_UPPER_LAYER]), errno(libc::ENOENT));
        assert_eq!(answer(libc::SYS_setsockopt, [3, 6, TCP_KEYS[0]]), errno(libc::ENOPROTOOPT));
        assert_eq!(answer(libc::SYS_setsockopt, [3, 6, 1]), ALLOW);
        assert_eq!(answer(libc::SYS_setsockopt, [3, 1, TCP_UPPER_LAYER]), ALLOW);
        assert_eq!(answer(libc::SYS_prctl, [65, 1, 0]), errno(libc::EINVAL));
        assert_eq!(answer(libc::SYS_prctl, [15, 0, 0]), ALLOW);
        assert_eq!(answer(libc::SYS_socket, [40, 1, 0]), errno(libc::EAFNOSUPPORT));
        assert_eq!(answer(libc::SYS_io_uring_setup, [0; 3]), errno(libc::ENOSYS));
        assert_eq!(answer(libc::SYS_userfaultfd, [0; 3]), errno(libc::EPERM));
        assert_eq!(answer(libc::SYS_personality, [0x40000, 0, 0]), errno(libc::EPERM));
        assert_eq!(answer(libc::SYS_ioctl, [0, TIOCSTI, 0]), errno(libc::EPERM));
        assert_eq!(answer(9_999, [0; 3]), errno(libc::ENOSYS));
    }

    #[test]
    fn no_call_is_in_two_lists_and_the_program_fits() {
        let mut all: Vec<c_long> = [table::ALLOWED, table::ALLOWED_HERE, table::REFUSED, table::REFUSED_HERE].concat();
        let with_rules = [
            libc::SYS_clone,
            libc::SYS_unshare,
            libc::SYS_socket,
            libc::SYS_setsockopt,
            libc::SYS_prctl,
            libc::SYS_personality,
            libc::SYS_ioctl,
            libc::SYS_seccomp,
        ];
        all.extend(with_rules);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(program().len() < 4096);
    }
}
