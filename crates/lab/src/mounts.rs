//! Mount tables: reading them and taking out what belongs to a lab.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

/// Passes over the mount table before what is left is reported: each pass can uncover mounts that
/// the ones taken out had hidden.
const MAX_UNMOUNT_PASSES: usize = 64;

/// One line of a mountinfo file (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub id: u32,
    pub parent: u32,
    /// Which part of the file system is mounted; for a pinned namespace `net:[INODE]` or `mnt:[INODE]`.
    pub root: PathBuf,
    pub target: PathBuf,
    pub filesystem: String,
    /// Options of the file system itself; for cgroup v1 the controllers.
    pub super_options: String,
}

/// Parses the text of a mountinfo file. Lines that do not follow the format are left out.
pub(crate) fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&b| b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let _device = fields.next()?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    // Per-mount options and any number of optional fields, then a lone hyphen.
    fields.by_ref().find(|f| *f == b"-")?;
    let filesystem = String::from_utf8_lossy(fields.next()?).into_owned();
    let _source = fields.next()?;
    let super_options = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(Mount { id, parent, root, target, filesystem, super_options })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if *first == b'\\'
            && let [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] = tail
        {
            out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(out).into()
}

/// The mount table of this process.
pub(crate) fn own() -> io::Result<Vec<Mount>> {
    // The thread's own table: a thread that has left for another mount namespace must see that one.
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// Takes out every mount at or below `directories` from this thread's mount namespace except those
/// at `keep`, the last made first. A busy one is detached.
///
/// Returns what could not be taken out.
pub(crate) fn unmount_below(directories: &[PathBuf], keep: &[PathBuf]) -> Vec<String> {
    let mut problems = Vec::new();
    for _ in 0..MAX_UNMOUNT_PASSES {
        problems.clear();
        let mounts = match own() {
            Ok(mounts) => mounts,
            Err(error) => return vec![format!("cannot read the mount table: {error}")],
        };
        let mut found = false;
        for mount in mounts.iter().rev() {
            let inside = directories.iter().any(|d| mount.target.starts_with(d));
            if !inside || keep.contains(&mount.target) {
                continue;
            }
            found = true;
            if let Err(error) = unmount_one(&mount.target) {
                problems.push(format!("cannot unmount {}: {error}", mount.target.display()));
            }
        }
        if !found {
            return Vec::new();
        }
    }
    problems
}

fn unmount_one(target: &Path) -> Result<(), Errno> {
    match unmount(target, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        // Below a mount that an earlier step of this pass has taken out, or hidden by another one.
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reads_mountinfo_lines() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402\\134x rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                     90 36 0:4 net:[4026532] /run/a.net rw - nsfs nsfs rw\nrubbish\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].target, Path::new("/mnt 2\\x"));
        assert_eq!(mounts[0].filesystem, "ext3");
        assert_eq!(mounts[0].super_options, "rw,errors=continue");
        assert_eq!(mounts[1].root, Path::new("net:[4026532]"));
        assert_eq!((mounts[1].id, mounts[1].parent), (90, 36));
    }
}
