//! From an image's user name to numbers.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::spec::User;

/// Most of a passwd or group file that is read.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum ResolveUserError {
    #[error("no user {name:?} in {path} of the image: use a number or add the user to the image")]
    NoUser { name: String, path: &'static str },
    #[error("no group {name:?} in {path} of the image: use a number or add the group to the image")]
    NoGroup { name: String, path: &'static str },
    #[error("cannot read {path} of the image in {rootfs}")]
    Read { path: &'static str, rootfs: PathBuf, source: io::Error },
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Takes `""` (root), `name`, `uid`, `name:group`, `uid:gid`; reads `etc/passwd` and
/// `etc/group` below `rootfs` without ever following a link out of it. Without a group the
/// user's own and supplementary groups hold.
pub fn resolve_user(rootfs: &Path, text: &str) -> Result<User, ResolveUserError> {
    let (name, group) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let passwd = read_inside(rootfs, PASSWD)?;
    let name = if name.is_empty() { "0" } else { name };
    let number: Option<u32> = name.parse().ok();
    let entry = passwd.lines().filter_map(Entry::parse_passwd).find(|entry| match number {
        Some(number) => entry.id == number,
        None => entry.name == name,
    });
    let uid = match (number, &entry) {
        (Some(number), _) => number,
        (None, Some(entry)) => entry.id,
        (None, None) => {
            return Err(ResolveUserError::NoUser { name: name.to_owned(), path: PASSWD });
        }
    };
    let groups = read_inside(rootfs, GROUP)?;
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        let gid = match group.parse() {
            Ok(gid) => gid,
            Err(_) => groups
                .lines()
                .filter_map(Entry::parse_group)
                .find(|entry| entry.name == group)
                .map(|entry| entry.id)
                .ok_or_else(|| ResolveUserError::NoGroup { name: group.to_owned(), path: GROUP })?,
        };
        return Ok(User { uid, gid, groups: Vec::new() });
    }
    let Some(entry) = entry else { return Ok(User { uid, gid: 0, groups: Vec::new() }) };
    let mut supplementary: Vec<u32> = groups
        .lines()
        .filter_map(Entry::parse_group)
        .filter(|group| group.members.split(',').any(|member| member == entry.name))
        .map(|group| group.id)
        .collect();
    supplementary.sort_unstable();
    supplementary.dedup();
    Ok(User { uid, gid: entry.gid, groups: supplementary })
}

struct Entry<'a> {
    name: &'a str,
    id: u32,
    gid: u32,
    members: &'a str,
}

impl<'a> Entry<'a> {
    /// `name:password:uid:gid:…` (passwd(5)).
    fn parse_passwd(line: &'a str) -> Option<Entry<'a>> {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (id, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Entry { name, id, gid, members: "" })
    }

    /// `name:password:gid:members` (group(5)).
    fn parse_group(line: &'a str) -> Option<Entry<'a>> {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let id = fields.next()?.parse().ok()?;
        Some(Entry { name, id, gid: id, members: fields.next().unwrap_or("").trim() })
    }
}

/// Text of a file inside; a missing file is empty.
fn read_inside(rootfs: &Path, path: &'static str) -> Result<String, ResolveUserError> {
    let failed = |source| ResolveUserError::Read { path, rootfs: rootfs.to_owned(), source };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, rootfs, flags | OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
        .map_err(|error| failed(error.into()))?;
    // Not blocking: the image may hold a FIFO of that name.
    let file = match openat2(&root, path, flags | OFlags::NONBLOCK, Mode::empty(), ResolveFlags::IN_ROOT) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(failed(error.into())),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Ok(String::new());
    }
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rootfs(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("godwit-user-{name}-{}", std::process::id()));
        std::fs::create_dir_all(root.join("etc")).unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/sh\nredis:x:101:102::/:/bin/false\n";
        std::fs::write(root.join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nredis:x:102:\nssl:x:110:www,redis\nwww:x:33:\n";
        std::fs::write(root.join("etc/group"), group).unwrap();
        root
    }

    #[test]
    fn names_and_numbers_resolve() {
        let root = rootfs("names");
        let user = |text| resolve_user(&root, text).unwrap();
        assert_eq!(user(""), User::default());
        assert_eq!(user("redis"), User { uid: 101, gid: 102, groups: vec![110] });
        assert_eq!(user("101"), user("redis"));
        assert_eq!(user("redis:www"), User { uid: 101, gid: 33, groups: vec![] });
        assert_eq!(user("1234:5678"), User { uid: 1234, gid: 5678, groups: vec![] });
        assert_eq!(user("4000"), User { uid: 4000, gid: 0, groups: vec![] });
        let missing = resolve_user(&root, "nobody-here").unwrap_err().to_string();
        assert!(missing.contains("nobody-here"), "{missing}");
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_link_does_not_lead_to_the_hosts_file() {
        let root = rootfs("link");
        std::fs::remove_file(root.join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("etc/passwd")).unwrap();
        // Resolved inside, the link points to itself.
        assert!(resolve_user(&root, "root").is_err());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
