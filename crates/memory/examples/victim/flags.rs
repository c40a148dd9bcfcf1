//! Mappings with every flag that an ordinary program can give them.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

use nix::libc;

use crate::memory::PAGE;

fn map(pages: usize, protection: i32, flags: i32, fd: i32) -> Option<*mut libc::c_void> {
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, flags | anonymous, fd, 0) };
    (at != libc::MAP_FAILED).then_some(at)
}

/// Maps, says "ready" and waits to be killed. `sealed`: one of them by mseal(2).
pub fn run(directory: &str, sealed: bool) {
    let (ordinary, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
    for advice in [
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_MERGEABLE,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
    ] {
        let at = map(3, ordinary, private, -1).unwrap();
        // The one in the middle: three mappings. SAFETY: ours, and nothing in it is used.
        assert_eq!(unsafe { libc::madvise(at.byte_add(PAGE), PAGE, advice) }, 0, "advice {advice}");
    }
    // SAFETY: ours.
    assert_eq!(unsafe { libc::madvise(map(2, ordinary, private, -1).unwrap(), PAGE, libc::MADV_DONTDUMP) }, 0);
    let locked = map(2, ordinary, private, -1).unwrap();
    // SAFETY: ours.
    assert_eq!(unsafe { libc::mlock(locked, PAGE) }, 0);
    map(2, libc::PROT_NONE, private | libc::MAP_NORESERVE, -1).unwrap();
    map(2, libc::PROT_READ | libc::PROT_EXEC, private, -1).unwrap();
    map(2, ordinary, private | libc::MAP_GROWSDOWN, -1).unwrap();
    map(2, ordinary, libc::MAP_SHARED, -1).unwrap();
    // Where the kernel has them.
    map(2, ordinary, 0x08, -1);
    map(512, ordinary, private | libc::MAP_NORESERVE | libc::MAP_HUGETLB, -1);
    for name in ["a b", "new\nline", "\u{e4}\u{20ac}", "gone"] {
        let path = format!("{directory}/{name}");
        std::fs::write(&path, vec![7; 2 * PAGE]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        map(2, libc::PROT_READ, private, file.as_raw_fd()).unwrap();
        map(2, ordinary, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
    }
    std::fs::remove_file(format!("{directory}/gone")).unwrap();
    if sealed {
        let at = map(2, ordinary, private, -1).unwrap();
        // SAFETY: ours, for as long as this process lives.
        let result = unsafe { libc::syscall(462, at, PAGE, 0) };
        println!("{}", if result == 0 { "sealed" } else { "cannot seal" });
    }
    println!("ready");
    loop {
        std::thread::park();
    }
}

/// Prints the file twice, opened as CRIU does it; a line of dashes after each.
pub fn read_smaps(pid: &str) {
    let directory = CString::new(format!("/proc/{pid}")).unwrap();
    // SAFETY: the names end with a zero.
    let directory = unsafe { libc::openat(libc::AT_FDCWD, directory.as_ptr(), libc::O_PATH) };
    for _ in 0..2 {
        // SAFETY: as above; what is opened belongs to nobody yet.
        let mut file = unsafe { File::from_raw_fd(libc::openat(directory, c"smaps".as_ptr(), libc::O_RDONLY)) };
        let mut text = Vec::new();
        file.read_to_end(&mut text).unwrap();
        println!("{}---", String::from_utf8_lossy(&text));
    }
}
