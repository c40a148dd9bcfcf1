//! Connections that CRIU has let go of without a word.
//!
//! To copy a TCP connection CRIU puts its socket into repair mode (tcp_repair), in which it neither sends nor receives.
//! A CRIU that is killed in the middle of a dump leaves it there, and the connection would be dead for ever without
//! anybody noticing. Whoever reads from or writes to the socket before it is put right gets EPERM: the processes run from
//! the instant in which CRIU is gone, which nobody can prevent.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use nix::sys::socket::{getsockopt, setsockopt, sockopt::TcpRepair};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Puts all TCP sockets of these processes back to work; how many were in repair mode. Blocks.
pub fn end(pids: &[u32]) -> usize {
    let mut seen = HashSet::new();
    pids.iter().map(|pid| end_in(*pid, &mut seen)).sum()
}

/// What cannot be looked at belongs to a process that has ended.
fn end_in(pid: u32, seen: &mut HashSet<std::path::PathBuf>) -> usize {
    let pidfd = Pid::from_raw(pid.cast_signed()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let (Some(pidfd), Ok(list)) = (pidfd, std::fs::read_dir(format!("/proc/{pid}/fd"))) else { return 0 };
    let mut ended = 0;
    for item in list.flatten() {
        let Ok(target) = std::fs::read_link(item.path()) else { continue };
        let Some(number) = item.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        if !target.to_string_lossy().starts_with("socket:[") || !seen.insert(target) {
            continue;
        }
        if let Ok(socket) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
            ended += usize::from(put_back(&socket));
        }
    }
    ended
}

fn put_back(socket: &OwnedFd) -> bool {
    // Other kinds of sockets do not know the option.
    if !getsockopt(socket, TcpRepair).is_ok_and(|mode| mode != 0) {
        return false;
    }
    match setsockopt(socket, TcpRepair, &0) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%error, "a connection stays in repair mode");
            false
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_socket_in_repair_mode_goes_on() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        setsockopt(&ours, TcpRepair, &1).unwrap();
        theirs.write_all(b"x").unwrap();
        assert!(ours.read(&mut [0]).is_err());
        assert_eq!(end(&[std::process::id()]), 1);
        let mut read = [0];
        ours.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"x");
        assert_eq!(end(&[std::process::id()]), 0);
    }
}
