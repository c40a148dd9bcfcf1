//! Memory made and changed with plain system calls.

use nix::libc;

pub const PAGE: usize = 4096;

/// A stream of numbers from a seed (xorshift64*): the same seed, the same program.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// New memory of `pages` pages, private or of a descriptor.
pub fn map(pages: usize, shared: bool, fd: i32) -> *mut u8 {
    let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, kind | anonymous, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    at.cast()
}

pub fn memfd(pages: usize) -> i32 {
    // SAFETY: a valid name; the descriptor is new.
    let fd = unsafe { libc::memfd_create(c"victim".as_ptr(), 0) };
    // SAFETY: the descriptor is ours.
    assert_eq!(unsafe { libc::ftruncate(fd, (pages * PAGE) as i64) }, 0);
    fd
}

/// Writes a number into a page.
pub fn write(base: *mut u8, page: usize, offset: usize, value: u64) {
    // SAFETY: callers pass pages of mappings they have made. Volatile: others, and other processes, look on.
    unsafe { base.add(page * PAGE + offset % (PAGE / 8) * 8).cast::<u64>().write_volatile(value) };
}

pub fn read(base: *mut u8, page: usize, offset: usize) -> u64 {
    // SAFETY: as in `write`.
    unsafe { base.add(page * PAGE + offset % (PAGE / 8) * 8).cast::<u64>().read_volatile() }
}
