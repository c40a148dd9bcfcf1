//! What a process has mapped, and who carries it in a move: we or CRIU.
//!
//! We carry what can be large, can be tracked, and can be left out of CRIU's dump; CRIU keeps the rest:
//!
//! | mapping | who | why |
//! |---|---|---|
//! | private anonymous: heap, stacks, also read-only and PROT_NONE; huge pages by THP | we | CRIU restores exactly these by userfaultfd ("lazy") |
//! | shared anonymous, memfd, SysV, files on tmpfs | we, once per object | CRIU's dump finds their data by lseek(SEEK_DATA) |
//! | the same with F_SEAL_WRITE or F_SEAL_FUTURE_WRITE | CRIU | seals are in force before we could fill |
//! | `lo` (mlock) | CRIU | its restore maps them with MAP_LOCKED: all there before we could fill, and not lazy |
//! | `ht` (hugetlb) | CRIU | not lazy in CRIU |
//! | `ss` (shadow stack), `dp` (droppable) | CRIU | restored by means of their own |
//! | private mappings of files, also of memfd and /dev/zero | CRIU | not lazy: their pages must be in the dump |
//! | shared mappings of files on disks | CRIU | the file has the data |
//! | vdso, vvar, vsyscall, AIO rings, `io`, `pf` | CRIU | the kernel's, or not memory |
//!
//! Flags are those of VmFlags in `/proc/PID/smaps` (Documentation/filesystems/proc.rst).

use std::collections::HashMap;

use crate::pages::PageRange;

/// A mapping we leave to CRIU, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LeftToCriu {
    /// A file's: private (its own pages are in the dump) or on a disk.
    File,
    Locked,
    HugeTlb,
    ShadowStack,
    Droppable,
    /// The kernel's own, or a device's.
    Special,
    /// A shared object that can no longer be written to.
    Sealed,
}

/// What `/proc/PID/maps` says about a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Mapping {
    pub range: PageRange,
    pub shared: bool,
    pub executable: bool,
    /// Offset in the mapped object, in bytes.
    pub offset: u64,
    /// As in `st_dev` of stat(2).
    pub device: u64,
    pub inode: u64,
    pub path: String,
}

/// VmFlags that decide something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub locked: bool,
    pub huge_tlb: bool,
    pub shadow_stack: bool,
    pub droppable: bool,
    pub special: bool,
}

pub(crate) enum Class {
    Private,
    /// Perhaps one of ours: the object behind it decides.
    Shared,
    Left(LeftToCriu),
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let permissions = fields.next()?;
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = rustix::fs::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let inode = fields.next()?.parse().ok()?;
        let path = fields.next().unwrap_or("").trim_start().to_owned();
        let range = PageRange::new(start, end)?;
        let has = |at: usize, flag| permissions.as_bytes().get(at) == Some(&flag);
        Some(Self { range, shared: has(3, b's'), executable: has(2, b'x'), offset, device, inode, path })
    }

    /// Who carries it, as far as flags tell.
    pub(crate) fn class(&self, flags: Flags) -> Class {
        if flags.special {
            return Class::Left(LeftToCriu::Special);
        }
        if flags.huge_tlb {
            return Class::Left(LeftToCriu::HugeTlb);
        }
        // Of a shared object every mapping must be known to decide.
        if flags.locked && !self.shared {
            return Class::Left(LeftToCriu::Locked);
        }
        if flags.shadow_stack {
            return Class::Left(LeftToCriu::ShadowStack);
        }
        if flags.droppable {
            return Class::Left(LeftToCriu::Droppable);
        }
        if self.shared {
            return Class::Shared;
        }
        if self.inode != 0 {
            return Class::Left(LeftToCriu::File);
        }
        let ordinary = self.path.is_empty()
            || self.path == "[heap]"
            || self.path.starts_with("[stack")
            || self.path.starts_with("[anon:");
        if ordinary { Class::Private } else { Class::Left(LeftToCriu::Special) }
    }
}

/// The mappings in `text`, the content of `/proc/PID/maps`. A line that is not understood is left out: what we do not
/// carry, CRIU dumps.
pub(crate) fn parse_maps(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(Mapping::parse).collect()
}

/// The mappings in `text`, the content of `/proc/PID/smaps`, with their flags.
pub(crate) fn parse_smaps(text: &str) -> Vec<(Mapping, Flags)> {
    let mut found: Vec<(Mapping, Flags)> = Vec::new();
    for line in text.lines() {
        if let Some(words) = line.strip_prefix("VmFlags:") {
            if let Some((_, flags)) = found.last_mut() {
                *flags = parse_flags(words);
            }
        } else if line.as_bytes().first().is_some_and(|c| c.is_ascii_digit() || c.is_ascii_lowercase()) {
            found.extend(Mapping::parse(line).map(|m| (m, Flags::default())));
        }
    }
    found
}

/// How much of each mapping in `text`, the content of `/proc/PID/smaps`, is in memory or swapped out, in KiB, by the
/// address where the mapping starts.
pub(crate) fn parse_sizes(text: &str) -> HashMap<u64, u64> {
    let mut sizes = HashMap::new();
    let mut start = 0;
    for line in text.lines() {
        let size = line.strip_prefix("Rss:").or_else(|| line.strip_prefix("Swap:"));
        if let Some(kib) = size.and_then(|s| s.trim().split(' ').next()?.parse::<u64>().ok()) {
            *sizes.entry(start).or_default() += kib;
        } else if let Some((first, _)) = line.split_once('-') {
            start = u64::from_str_radix(first, 16).unwrap_or(start);
        }
    }
    sizes
}

fn parse_flags(words: &str) -> Flags {
    let mut flags = Flags::default();
    for word in words.split_ascii_whitespace() {
        match word {
            "lo" => flags.locked = true,
            "ht" => flags.huge_tlb = true,
            "ss" => flags.shadow_stack = true,
            "dp" => flags.droppable = true,
            "io" | "pf" => flags.special = true,
            _ => {}
        }
    }
    flags
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
VmFlags: rd wr mr mw me ac 
7f0000000000-7f0000400000 rw-s 00001000 00:01 1034                       /memfd:a name (deleted)
Rss:                   0 kB
VmFlags: rd wr sh mr mw me ms lo 
7ffd1a5f8000-7ffd1a5fc000 r--p 00000000 00:00 0                          [vvar]
VmFlags: rd mr pf io de dd 
";

    #[test]
    fn mappings_and_flags_are_read() {
        let found = parse_smaps(SMAPS);
        assert_eq!(found.len(), 3);
        assert!(matches!(found[0].0.class(found[0].1), Class::Private));
        assert_eq!(found[1].0.path, "/memfd:a name (deleted)");
        assert_eq!((found[1].0.offset, found[1].0.inode, found[1].0.shared), (0x1000, 1034, true));
        assert!(matches!(found[1].0.class(found[1].1), Class::Shared) && found[1].1.locked);
        assert!(matches!(found[2].0.class(found[2].1), Class::Left(LeftToCriu::Special)));
    }

    #[test]
    fn sizes_are_what_is_there_and_what_is_swapped_out() {
        let text = SMAPS.replace("Rss:                   0 kB", "Rss:  4 kB\nSwap:  8 kB\nSwapPss:  8 kB");
        let text = text.replace("Size:                132 kB", "Size: 132 kB\nRss:  0 kB\nSwap:  0 kB");
        let sizes = parse_sizes(&text);
        assert_eq!((sizes[&0x55d0_c8a0_0000], sizes[&0x7f00_0000_0000]), (0, 12));
        assert_eq!(sizes.get(&0x7ffd_1a5f_8000), None, "nothing is said of it");
    }

    #[test]
    fn what_is_not_understood_is_left_to_criu() {
        assert!(parse_maps("garbage\n").is_empty());
        let vsyscall = parse_maps("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0   [vsyscall]");
        assert!(matches!(vsyscall[0].class(Flags::default()), Class::Left(LeftToCriu::Special)));
    }
}
