//! What CRIU leaves out of its dump: memory that is carried past it.
//!
//! A small library (shim/leave_out.c) is loaded into criu by LD_PRELOAD. It takes the listed ranges out of what
//! ioctl(PAGEMAP_SCAN) answers, or out of `/proc/PID/pagemap` where criu reads that, and shows listed shared objects as holes to lseek(SEEK_DATA), which is how CRIU finds
//! their content (`do_dump_one_shmem` in its shmem.c, for shared anonymous memory, memfd and SysV segments alike). It
//! does nothing where the list is missing or is none, so it may be loaded into the shell that starts criu, and into
//! whatever criu starts. One such program matters: tar, by which CRIU dumps a tmpfs; it sees listed files as one hole.
//!
//! Where there is a text for a process, criu reads that once instead of `/proc/PID/smaps`, for which the kernel would
//! walk through all page tables (see [`MappingFlags`](crate::MappingFlags)).
//!
//! **A restore of such a dump must have a [`Filler`](crate::Filler).** What was left out reads as zero otherwise.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::pages::page_size;
use crate::tracker::Round;

const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/leave_out.so"));
const LIBRARY_NAME: &str = "godwit-leave-out.so";
const LIST_NAME: &str = "leave-out.list";
/// "GODWOUT2" as the first word of a list, read as a little-endian number.
const MAGIC: u64 = u64::from_le_bytes(*b"GODWOUT2");
/// The largest list the library takes, in bytes.
const MAX_LIST_BYTES: usize = 64 << 20;

#[derive(Debug, Error)]
pub enum FilterError {
    #[error("{} cannot be named in LD_PRELOAD: it has a space or a colon", path.display())]
    Path { path: PathBuf },
    #[error("{} could not be written", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("a list of {bytes} bytes is more than the {MAX_LIST_BYTES} that criu's part takes")]
    TooLong { bytes: usize },
}

/// The library and its list in one directory. Both stay until their directory is removed.
#[derive(Debug, Clone)]
pub struct PageFilter {
    library: PathBuf,
    list: PathBuf,
}

impl PageFilter {
    /// Places the library in `directory` (absolute), readable by all: in a user namespace criu starts tar as the
    /// container's root. The way to the directory must be open to that user, too.
    pub fn install(directory: &Path) -> Result<Self, FilterError> {
        let filter = Self { library: directory.join(LIBRARY_NAME), list: directory.join(LIST_NAME) };
        let text = filter.library.to_string_lossy();
        if text.contains([' ', ':', '\n']) {
            return Err(FilterError::Path { path: filter.library.clone() });
        }
        place(&filter.library, LIBRARY, 0o755)?;
        Ok(filter)
    }

    /// What criu's environment must have. It works through a start script, and with `ld.so --library-path … criu` of
    /// another libc. The list may be written after criu has been started, but before it is told to dump.
    pub fn environment(&self) -> [(&'static str, &Path); 2] {
        [("LD_PRELOAD", &self.library), ("GODWIT_LEAVE_OUT", &self.list)]
    }

    /// What criu reads the next time it opens `/proc/PID/smaps` of process `pid`; the kernel's own afterwards. Must be
    /// what is true of it when criu is told to dump: from [`MappingFlags::smaps`](crate::MappingFlags::smaps), of a
    /// process that stands still.
    pub fn serve_smaps(&self, pid: i32, text: &[u8]) -> Result<(), FilterError> {
        let mut path = self.list.clone().into_os_string();
        path.push(format!(".{pid}"));
        place(Path::new(&path), text, 0o600)
    }

    /// Lists what the last round says we carry: every carried mapping of each process, by its number here, and every
    /// object. Sealed, locked and all other memory stays in the dump.
    pub fn leave_out(&self, last: &Round) -> Result<(), FilterError> {
        let mut ranges: Vec<[u64; 3]> = Vec::new();
        for process in &last.processes {
            let pid = u64::from(process.pid.cast_unsigned());
            ranges.extend(process.carried.ranges().iter().map(|r| [pid, r.start, r.end]));
        }
        ranges.sort_unstable();
        let objects: Vec<_> = last.objects.iter().map(|o| [o.id.device, o.id.inode, u64::from(o.id.sysv)]).collect();
        let header = [MAGIC, ranges.len() as u64, objects.len() as u64, page_size()];
        let words = header.into_iter().chain(ranges.into_iter().chain(objects).flatten());
        let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        if bytes.len() > MAX_LIST_BYTES {
            return Err(FilterError::TooLong { bytes: bytes.len() });
        }
        place(&self.list, &bytes, 0o644)
    }
}

/// Writes a file that appears whole.
fn place(path: &Path, content: &[u8], mode: u32) -> Result<(), FilterError> {
    let new = path.with_extension("new");
    let write = || {
        let mut file = std::fs::File::create(&new)?;
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        std::fs::rename(&new, path)
    };
    write().map_err(|source| FilterError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_ld_so_would_split_is_refused() {
        let error = PageFilter::install(Path::new("/tmp/a b")).unwrap_err();
        assert!(matches!(error, FilterError::Path { .. }), "{error}");
    }

    #[test]
    fn the_library_needs_nothing_and_is_harmless_without_a_list() {
        let directory = tempfile::tempdir().unwrap();
        let filter = PageFilter::install(directory.path()).unwrap();
        let output = std::process::Command::new("/bin/sh")
            .args(["-c", "ls -l /proc/self/exe && tar -cf - /etc/hostname | wc -c"])
            .envs(filter.environment())
            .output()
            .unwrap();
        assert!(output.status.success() && output.stdout.len() > 10, "{output:?}");
        assert!(!String::from_utf8_lossy(&output.stderr).contains("preload"), "{output:?}");
    }
}
