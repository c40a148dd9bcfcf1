//! mallopt(3), malloc_trim(3).

/// Arenas of a process that moves containers: one for its steady work, one for what is busy beside it.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

/// Bounds the pools that the C library's allocator keeps. Left alone it has up to eight for each processor, and each
/// keeps what the largest move on any of its threads once needed: tens of MiB for less than one in use. To be called
/// early: pools that are there stay. Does nothing where the C library knows no such bound.
pub fn bound_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer, and changes only how many pools are made from now on.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives memory of this process that was freed back to the system. Takes a millisecond or two, in which other threads
/// may wait for memory; does nothing where the C library has no such call.
pub fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer and touches nothing but memory that was freed; any thread may call it at any time.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
