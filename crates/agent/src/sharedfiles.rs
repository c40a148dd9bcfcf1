//! Which files of a frozen container are mapped shared and writable: their pages may have changed without a new ctime,
//! so the last round of files sends them in any case.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A mount of the container that travels: where it is inside, and the tree's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeMount {
    pub target: PathBuf,
    pub tree: String,
}

/// Tree and path of every such file. `trees` has the root (`/`) and all volumes.
pub fn shared_writable(pids: &[u32], trees: &[TreeMount]) -> Vec<(String, Vec<u8>)> {
    let mut found = BTreeSet::new();
    for pid in pids {
        // A process that has ended meanwhile maps nothing.
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        found.extend(maps.lines().filter_map(shared_path).filter_map(|path| tree_of(path, trees)));
    }
    found.into_iter().collect()
}

/// proc_pid_maps(5): `start-end rw-s offset dev inode path`.
fn shared_path(line: &str) -> Option<&str> {
    let mut fields = line.splitn(6, ' ');
    let permissions = fields.nth(1)?;
    let path = fields.nth(3)?.trim_start();
    let file = path.starts_with('/') && !path.ends_with(" (deleted)");
    (permissions.contains('w') && permissions.ends_with('s') && file).then_some(path)
}

fn tree_of(path: &str, trees: &[TreeMount]) -> Option<(String, Vec<u8>)> {
    let path = Path::new(path);
    let mount = trees.iter().filter(|t| path.starts_with(&t.target)).max_by_key(|t| t.target.as_os_str().len())?;
    let inside = path.strip_prefix(&mount.target).ok()?;
    Some((mount.tree.clone(), inside.as_os_str().as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_files_of_a_tree_are_named() {
        let trees = [
            TreeMount { target: "/".into(), tree: "root".into() },
            TreeMount { target: "/data".into(), tree: "volume:v".into() },
        ];
        let of = |line: &str| shared_path(line).and_then(|p| tree_of(p, &trees));
        let line = "7f0000000000-7f0000001000 rw-s 00000000 fe:00 123                        /data/db file";
        assert_eq!(of(line), Some(("volume:v".into(), b"db file".to_vec())));
        assert_eq!(of(&line.replace("/data/db file", "/srv/x")), Some(("root".into(), b"srv/x".to_vec())));
        assert_eq!(of(&line.replace("rw-s", "rw-p")), None);
        assert_eq!(of(&line.replace("rw-s", "r--s")), None);
        assert_eq!(of("7f0000000000-7f0000001000 rw-s 00000000 00:01 1 /dev/zero (deleted)"), None);
        assert_eq!(of("7f0000000000-7f0000001000 rw-s 00000000 00:01 1"), None);
    }
}
