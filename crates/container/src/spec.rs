//! What a container is to be: the launch specification an agent writes and a keeper follows.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Ids in one container's range; user and group 0 to 65535 inside are `id_base` + id outside.
pub const ID_COUNT: u32 = 65_536;

/// Name of the specification in the container's directory.
pub const SPEC_FILE: &str = "spec.json";

/// Largest accepted specification.
pub const MAX_SPEC_BYTES: u64 = 1024 * 1024;

/// Everything needed to start (or to receive) one container on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// 12 hexadecimal digits, unique on the host; names the cgroup.
    pub id: String,
    pub hostname: String,
    /// Program and arguments; the program is looked up in `env`'s PATH inside the container.
    pub argv: Vec<String>,
    /// `NAME=value` each.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory inside the container; made when it is absent.
    #[serde(default = "root_directory")]
    pub cwd: String,
    #[serde(default)]
    pub user: User,
    /// The mounted root file system on the host.
    pub rootfs: PathBuf,
    /// First user and group id outside; inside it is 0.
    pub id_base: u32,
    #[serde(default = "id_count")]
    pub id_count: u32,
    /// Absolute cgroup path under which the container's own cgroup `<parent>/<id>` is made.
    pub cgroup_parent: String,
    /// Cgroup the keeper moves itself into, outside of the container's limits.
    #[serde(default)]
    pub keeper_cgroup: Option<String>,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub mounts: Vec<BindMount>,
    #[serde(default)]
    pub tmpfs: Vec<Tmpfs>,
    #[serde(default)]
    pub read_only_rootfs: bool,
    /// Files written below the container's `/etc` each time it starts.
    #[serde(default)]
    pub etc_files: Vec<EtcFile>,
    /// What is hidden or read-only inside; travels with the container so that both hosts of a
    /// move agree on the list of mounts.
    #[serde(default = "Masks::of_this_host")]
    pub masks: Masks,
    /// Signal number that asks the program to stop.
    #[serde(default = "sigterm")]
    pub stop_signal: i32,
    #[serde(default)]
    pub log: LogLimits,
    #[serde(default)]
    pub rlimits: Rlimits,
}

/// Numeric identity inside the container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    #[serde(default)]
    pub groups: Vec<u32>,
}

/// Limits of a container's cgroup; `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub memory_bytes: Option<u64>,
    /// Thousandths of one core.
    pub cpu_millis: Option<u64>,
    pub pids_max: Option<u64>,
}

/// A directory or file of the host seen inside the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindMount {
    pub source: PathBuf,
    /// Absolute path inside.
    pub target: String,
    #[serde(default)]
    pub read_only: bool,
}

/// A memory file system inside the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    pub target: String,
    pub size_bytes: u64,
    /// Permission bits of its root, for example 0o1777.
    pub mode: u32,
}

/// A generated file, `name` relative to `/etc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtcFile {
    pub name: String,
    pub content: String,
}

/// Paths of kernel interfaces kept from the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Masks {
    /// Covered by an empty device.
    pub files: Vec<String>,
    /// Covered by an empty read-only directory.
    pub directories: Vec<String>,
    /// Made read-only in place.
    pub read_only: Vec<String>,
}

/// Rotation of the container's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    pub max_bytes: u64,
    /// Files kept, the current one included.
    pub max_files: u32,
}

impl Default for LogLimits {
    fn default() -> Self {
        LogLimits { max_bytes: 10 * 1024 * 1024, max_files: 3 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimits {
    /// Open files, soft and hard.
    pub nofile: u64,
}

impl Default for Rlimits {
    fn default() -> Self {
        Rlimits { nofile: 65_536 }
    }
}

fn root_directory() -> String {
    "/".to_owned()
}

fn id_count() -> u32 {
    ID_COUNT
}

fn sigterm() -> i32 {
    nix::libc::SIGTERM
}

impl Masks {
    /// The usual list, cut down to what this host's kernel has.
    pub fn of_this_host() -> Masks {
        let present = |paths: &[&str], directory: bool| {
            let exists = |path: &&&str| match std::fs::metadata(path) {
                Ok(found) => found.is_dir() == directory,
                Err(_) => false,
            };
            paths.iter().filter(exists).map(|path| (*path).to_owned()).collect()
        };
        let read_only = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
        Masks {
            files: present(
                &[
                    "/proc/kcore",
                    "/proc/keys",
                    "/proc/latency_stats",
                    "/proc/timer_list",
                    "/proc/sched_debug",
                    "/proc/kallsyms",
                    "/proc/vmallocinfo",
                    "/proc/slabinfo",
                    "/proc/config.gz",
                ],
                false,
            ),
            directories: present(
                &["/proc/acpi", "/proc/asound", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"],
                true,
            ),
            read_only: read_only
                .iter()
                .filter(|path| Path::new(path).exists())
                .map(|path| (*path).to_owned())
                .collect(),
        }
    }
}

/// A specification that cannot be followed, or that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("container {id:?}: {field} {problem}")]
    Invalid { id: String, field: &'static str, problem: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is {bytes} bytes, more than the {MAX_SPEC_BYTES} allowed")]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{path} is not a launch specification")]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
}

impl LaunchSpec {
    /// Path of the container's cgroup.
    pub fn cgroup_path(&self) -> String {
        format!("{}/{}", self.cgroup_parent.trim_end_matches('/'), self.id)
    }

    /// Reads `dir/spec.json` and checks it.
    pub fn load(dir: &Path) -> Result<LaunchSpec, SpecError> {
        let path = dir.join(SPEC_FILE);
        let bytes = std::fs::metadata(&path).map_err(|source| SpecError::Read { path: path.clone(), source })?.len();
        if bytes > MAX_SPEC_BYTES {
            return Err(SpecError::TooLarge { path, bytes });
        }
        let text = std::fs::read(&path).map_err(|source| SpecError::Read { path: path.clone(), source })?;
        let spec: LaunchSpec = serde_json::from_slice(&text).map_err(|source| SpecError::Parse { path, source })?;
        spec.validate()?;
        Ok(spec)
    }

    /// Checks and writes `dir/spec.json` so that a reader sees all of it or none.
    pub fn save(&self, dir: &Path) -> Result<(), SpecError> {
        self.validate()?;
        let path = dir.join(SPEC_FILE);
        crate::keeper::state::write_json(&path, self).map_err(|source| SpecError::Write { path, source })
    }

    /// Refuses what the launcher could misread or what would weaken the isolation.
    pub fn validate(&self) -> Result<(), SpecError> {
        let bad = |field, problem: String| Err(SpecError::Invalid { id: self.id.clone(), field, problem });
        let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if self.id.len() != 12 || !self.id.chars().all(hex) {
            return bad("id", "must be 12 hexadecimal digits".into());
        }
        if self.argv.first().is_none_or(|program| program.is_empty()) {
            return bad("argv", "is empty: name a program".into());
        }
        if self.argv.iter().chain(&self.env).any(|text| text.contains('\0')) {
            return bad("argv and env", "must not contain NUL".into());
        }
        if let Some(entry) = self.env.iter().find(|entry| entry.find('=').is_none_or(|at| at == 0)) {
            return bad("env", format!("has {entry:?}: want NAME=value"));
        }
        if self.hostname.is_empty() || self.hostname.len() > 63 {
            return bad("hostname", "must have 1 to 63 characters".into());
        }
        if self.id_base < ID_COUNT || self.id_count != ID_COUNT {
            return bad("id_base", format!("must be at least {ID_COUNT}, with {ID_COUNT} ids"));
        }
        if self.id_base.checked_add(self.id_count).is_none() {
            return bad("id_base", "leaves no room for the id range".into());
        }
        if self.user.uid >= self.id_count
            || self.user.gid >= self.id_count
            || self.user.groups.iter().any(|gid| *gid >= self.id_count)
        {
            return bad("user", format!("has an id of {} or more", self.id_count));
        }
        if !plain_absolute(&self.cwd) {
            return bad("cwd", format!("{:?} must be absolute, without . and ..", self.cwd));
        }
        for path in [Some(&self.cgroup_parent), self.keeper_cgroup.as_ref()].into_iter().flatten() {
            if !plain_absolute(path) || path == "/" {
                return bad("cgroup", format!("path {path:?} must be absolute, without . and .."));
            }
        }
        let targets = self.mounts.iter().map(|mount| &mount.target);
        for target in targets.chain(self.tmpfs.iter().map(|tmpfs| &tmpfs.target)) {
            let kernel = ["/proc", "/sys", "/dev"].iter().any(|top| Path::new(target).starts_with(top));
            if !plain_absolute(target) || target == "/" || kernel {
                return bad(
                    "mounts",
                    format!("target {target:?} must be absolute and outside of /, /proc, /sys and /dev"),
                );
            }
        }
        for file in &self.etc_files {
            if file.name.is_empty() || file.name.contains('/') || file.name.starts_with('.') {
                return bad("etc_files", format!("name {:?} must be a plain file name", file.name));
            }
        }
        Ok(())
    }
}

/// Absolute, and no component that is empty, `.` or `..`.
fn plain_absolute(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| {
        !path.contains('\0')
            && (rest.is_empty() || rest.trim_end_matches('/').split('/').all(|part| !matches!(part, "" | "." | "..")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LaunchSpec {
        serde_json::from_value(serde_json::json!({
            "id": "0123456789ab", "hostname": "web-1", "argv": ["/bin/true"],
            "rootfs": "/r", "id_base": 100000, "cgroup_parent": "/godwit/h1"
        }))
        .unwrap()
    }

    #[test]
    fn a_plain_specification_is_accepted_and_has_defaults() {
        let spec = spec();
        spec.validate().unwrap();
        assert_eq!(spec.cgroup_path(), "/godwit/h1/0123456789ab");
        assert_eq!((spec.stop_signal, spec.cwd.as_str()), (15, "/"));
    }

    #[test]
    fn bad_fields_are_named() {
        let check = |change: fn(&mut LaunchSpec), field: &str| {
            let mut spec = spec();
            change(&mut spec);
            let text = spec.validate().unwrap_err().to_string();
            assert!(text.contains(field), "{text}");
        };
        check(|s| s.id = "../../x".into(), "id");
        check(|s| s.argv.clear(), "argv");
        check(|s| s.env.push("=x".into()), "env");
        check(|s| s.id_base = 0, "id_base");
        check(|s| s.user.uid = 65_536, "user");
        check(|s| s.cgroup_parent = "/a/../b".into(), "cgroup");
        check(|s| s.etc_files.push(EtcFile { name: "../x".into(), content: String::new() }), "etc_files");
        check(
            |s| s.mounts.push(BindMount { source: "/v".into(), target: "/proc/x".into(), read_only: false }),
            "mounts",
        );
    }
}
