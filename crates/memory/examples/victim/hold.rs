//! A process whose memory is filled, step by step as it is told: it says "ready" once its userfaultfd is handed out, and
//! for each line that it reads does what the line says and prints the result. Page N must hold N + 1, [`PAGES`] of them
//! at [`BASE`].

use std::io::{BufRead, Write};

use nix::libc;

use crate::lazy::{FINISHED, hand_out, register_ranges};
use crate::memory::{PAGE, read};

/// Where the memory is, so that the store can be filled before.
pub const BASE: usize = 0x6000_0000_0000;
/// 96 MiB.
pub const PAGES: usize = 96 * 256;

pub fn run(socket: &str, inner_pid: u32) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the place is free, or the call fails.
    let base = unsafe { libc::mmap(BASE as *mut libc::c_void, PAGES * PAGE, protection, flags, -1, 0) };
    assert_eq!(base as usize, BASE, "{}", std::io::Error::last_os_error());
    let base = base.cast::<u8>();
    let uffd = register_ranges(&[(base, PAGES)]);
    let mut stream = Some(hand_out(socket, inner_pid, &uffd));
    drop(uffd);
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let answer = match words.as_slice() {
            ["read", page] => read(base, page.parse().unwrap(), 0).to_string(),
            ["all"] => (0..PAGES).filter(|page| read(base, *page, 0) != *page as u64 + 1).count().to_string(),
            ["finish"] => {
                stream.as_mut().unwrap().write_all(&FINISHED.to_ne_bytes()).unwrap();
                stream = None;
                "finished".to_owned()
            }
            ["close"] => {
                stream = None;
                "closed".to_owned()
            }
            _ => panic!("{line}"),
        };
        println!("{answer}");
    }
}
