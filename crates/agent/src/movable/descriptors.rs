//! What processes have open, by `/proc/PID/fd` and, for the few kinds whose flags matter, `/proc/PID/fdinfo`.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, openat, readlinkat_raw, statat};

use super::{Reasons, command};

/// Open files looked at in one container, at the most.
const MAX_FDS: usize = 200_000;
/// Longest path of an open file that is looked at, in bytes; the kernel tells no longer ones.
const MAX_PATH_BYTES: usize = 4096;
/// The flags are at the beginning of an fdinfo; its first bytes.
const FDINFO_BYTES: usize = 512;
/// Names of open files that are read at once, in bytes.
const LIST_BYTES: usize = 8192;
/// A deleted file that is still open travels among CRIU's images up to this size, in bytes: `ghost_limit` of a dump.
const MAX_DELETED_BYTES: u64 = 1 << 30;
/// Bytes in one of stat's blocks.
const BLOCK_BYTES: u64 = 512;

/// The anonymous inodes that CRIU carries. All others it refuses, also those of kernels to come.
const CARRIED: [&[u8]; 7] =
    [b"[eventfd]", b"[eventpoll]", b"[signalfd]", b"[timerfd]", b"inotify", b"[inotify]", b"[pidfd]"];

/// Adds what the processes have open that CRIU cannot carry.
pub fn look(pids: &[u32], reasons: &mut Reasons) {
    let mut room = MAX_FDS;
    for pid in pids {
        look_at_process(*pid, &mut room, reasons);
        if room == 0 {
            reasons.container(format!("more than {MAX_FDS} files are open, too many to look at all of them"));
            return;
        }
    }
}

fn look_at_process(pid: u32, room: &mut usize, reasons: &mut Reasons) {
    let Ok(directory) = open_directory(&format!("/proc/{pid}/fd")) else { return };
    let mut infos = None;
    let mut path = [MaybeUninit::uninit(); MAX_PATH_BYTES];
    let mut buffer = [MaybeUninit::uninit(); LIST_BYTES];
    let mut list = RawDir::new(&directory, &mut buffer);
    while let Some(Ok(item)) = list.next() {
        if item.file_name().to_bytes().starts_with(b".") {
            continue;
        }
        if *room == 0 {
            return;
        }
        *room -= 1;
        let Ok((target, _)) = readlinkat_raw(&directory, item.file_name(), &mut path[..]) else { continue };
        let mut flags = || flags_of(pid, &mut infos, item.file_name());
        let what = match target {
            pipe if pipe.starts_with(b"pipe:") && flags().contains(OFlags::DIRECT) => {
                Some("holds a pipe in packet mode (O_DIRECT), which CRIU cannot carry".to_owned())
            }
            // In an fd of a process O_EXCL says that it stands for one thread.
            pidfd if is_pidfd(pidfd) && flags().contains(OFlags::EXCL) => {
                Some("holds a pidfd of one thread, which CRIU cannot carry".to_owned())
            }
            deleted if deleted.ends_with(b" (deleted)") => too_large(&directory, item.file_name(), deleted),
            other => cannot_carry(other),
        };
        if let Some(what) = what {
            reasons.process(pid, &what);
        }
    }
}

fn is_pidfd(target: &[u8]) -> bool {
    target.starts_with(b"pidfd:") || target == b"anon_inode:[pidfd]"
}

fn open_directory(path: &str) -> Result<OwnedFd, rustix::io::Errno> {
    openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Flags of one open file; none if it is closed by now.
fn flags_of(pid: u32, infos: &mut Option<OwnedFd>, name: &CStr) -> OFlags {
    if infos.is_none() {
        *infos = open_directory(&format!("/proc/{pid}/fdinfo")).ok();
    }
    let read = |infos: &OwnedFd| {
        let file = openat(infos, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = [0; FDINFO_BYTES];
        let length = rustix::io::read(&file, &mut text[..]).ok()?;
        Some(parse_flags(&String::from_utf8_lossy(&text[..length])))
    };
    infos.as_ref().and_then(read).unwrap_or_else(OFlags::empty)
}

fn parse_flags(fdinfo: &str) -> OFlags {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    OFlags::from_bits_retain(flags.unwrap_or(0))
}

/// A deleted file that is too large to travel with what CRIU writes. Memory that has a file's form has ways of its own.
fn too_large(directory: impl AsFd, name: &CStr, target: &[u8]) -> Option<String> {
    if target.starts_with(b"/memfd:") || target.starts_with(b"/SYSV") || target.starts_with(b"/dev/zero ") {
        return None;
    }
    let stat = statat(directory, name, AtFlags::empty()).ok()?;
    let bytes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK_BYTES);
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    (regular && bytes > MAX_DELETED_BYTES).then(|| {
        let (size, most) = (godwit_model::Bytes(bytes), godwit_model::Bytes(MAX_DELETED_BYTES));
        format!("holds {}, which has {size}; {most} is the most that is carried", String::from_utf8_lossy(target))
    })
}

fn cannot_carry(target: &[u8]) -> Option<String> {
    if target.starts_with(b"/dev/fuse") {
        return Some("holds a FUSE device, which CRIU cannot carry".to_owned());
    }
    let kind = target.strip_prefix(b"anon_inode:")?;
    if CARRIED.contains(&kind) {
        return None;
    }
    let name = String::from_utf8_lossy(kind);
    Some(format!("holds {}, which CRIU cannot carry", with_article(name.trim_matches(['[', ']']))))
}

/// `an io_uring`, `a userfaultfd`.
fn with_article(kind: &str) -> String {
    let vowel = kind.starts_with(['a', 'e', 'i', 'o']);
    format!("{} {kind}", if vowel { "an" } else { "a" })
}

/// Who has a file open with O_DIRECT, or may have one. A device that was given a page to write to before the page was
/// protected can write to it after it was read, which no page table tells.
pub fn direct_io(pids: &[u32]) -> Option<String> {
    let mut looked = 0;
    for pid in pids {
        let list = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(list) => list,
            // It has ended.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Some(format!("what process {} has open cannot be seen: {error}", command(*pid))),
        };
        for item in list.flatten() {
            looked += 1;
            if looked > MAX_FDS {
                return Some(format!("more than {MAX_FDS} files are open, too many to look for O_DIRECT"));
            }
            let Some(file) = std::fs::read_link(item.path()).ok().filter(|target| target.is_absolute()) else {
                continue;
            };
            let info = format!("/proc/{pid}/fdinfo/{}", item.file_name().to_string_lossy());
            if std::fs::read_to_string(info).is_ok_and(|info| parse_flags(&info).contains(OFlags::DIRECT)) {
                let who = command(*pid);
                return Some(format!("process {who} has {} open past the page cache (O_DIRECT)", file.display()));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> Vec<String> {
        let mut reasons = Reasons::default();
        look(&[std::process::id()], &mut reasons);
        reasons.sentences()
    }

    #[test]
    fn a_file_past_the_page_cache_is_seen() {
        let pid = std::process::id();
        let ordinary = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(direct_io(&[pid]), None);
        // Not every file system takes the flag.
        let direct = rustix::fs::open("/proc/self/exe", OFlags::DIRECT, Mode::empty());
        if let Ok(_direct) = direct {
            assert!(direct_io(&[pid]).unwrap().contains("O_DIRECT"));
        }
        drop(ordinary);
    }

    #[test]
    fn a_pipe_in_packet_mode_is_seen_however_it_came_to_be_one() {
        let ordinary = rustix::pipe::pipe().unwrap();
        assert_eq!(found(), Vec::<String>::new());
        rustix::fs::fcntl_setfl(&ordinary.1, OFlags::DIRECT).unwrap();
        let said = found();
        assert!(said.len() == 1 && said[0].contains("packet mode"), "{said:?}");
        drop(ordinary);
        let made_so = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::DIRECT).unwrap();
        assert_eq!(found().len(), 1);
        drop(made_so);
        assert_eq!(found(), Vec::<String>::new());
    }

    #[test]
    fn ordinary_anonymous_files_are_carried_and_unknown_ones_are_not() {
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).unwrap();
        let inotify = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::empty()).unwrap();
        let timer =
            rustix::time::timerfd_create(rustix::time::TimerfdClockId::Monotonic, rustix::time::TimerfdFlags::empty())
                .unwrap();
        let own = rustix::process::getpid();
        let pidfd = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).unwrap();
        let memory = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::empty()).unwrap();
        assert_eq!(found(), Vec::<String>::new());
        drop((eventfd, epoll, inotify, timer, pidfd, memory));
        let said = cannot_carry(b"anon_inode:[io_uring]").unwrap();
        assert_eq!(said, "holds an io_uring, which CRIU cannot carry");
        for kind in ["[userfaultfd]", "bpf-prog", "[fanotify]", "[perf_event]", "seccomp notify", "[of the future]"] {
            assert!(cannot_carry(format!("anon_inode:{kind}").as_bytes()).is_some(), "{kind}");
        }
    }

    #[test]
    fn a_deleted_file_is_carried_up_to_a_size() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(MAX_DELETED_BYTES * 2).unwrap();
        assert_eq!(found(), Vec::<String>::new(), "it has no blocks");
        // On a file system that gives blocks without writing them.
        let disk = tempfile::tempfile_in("/var/tmp").unwrap();
        let length = MAX_DELETED_BYTES + (1 << 20);
        if rustix::fs::fallocate(&disk, rustix::fs::FallocateFlags::empty(), 0, length).is_ok() {
            let said = found();
            assert!(said.len() == 1 && said[0].contains("is the most that is carried"), "{said:?}");
        }
    }

    /// 200 processes with 100 open files each. The limit is far above what it takes, and far below what would be felt:
    /// a look is repeated after a hundred times as long.
    #[test]
    fn many_open_files_are_looked_at_in_little_time() {
        const PROCESSES: usize = 200;
        const EACH: usize = 100;
        let own: Vec<_> = (0..EACH / 4).map(|_| rustix::pipe::pipe().unwrap()).collect();
        let files: Vec<_> = (0..EACH / 2).map(|_| std::fs::File::open("/proc/self/exe").unwrap()).collect();
        let pids = vec![std::process::id(); PROCESSES];
        let mut reasons = Reasons::default();
        let begun = std::time::Instant::now();
        look(&pids, &mut reasons);
        let took = begun.elapsed();
        println!("{} files in {took:?}", PROCESSES * EACH);
        drop((own, files));
        assert!(took < std::time::Duration::from_secs(5), "{took:?}");
    }
}
