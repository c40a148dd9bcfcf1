//! `volumes` and `tmpfs` of a service.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::field::Field;
use crate::container::{HostPathMount, TmpfsMount, VolumeMount};
use crate::units::Bytes;

/// Longest name of a volume, in characters. It becomes the name of a directory.
const MAX_VOLUME_NAME_CHARS: usize = 64;

#[derive(Debug)]
pub(super) enum Mount {
    Volume(VolumeMount),
    Tmpfs(TmpfsMount),
    HostPath(HostPathMount),
}

impl Mount {
    fn target(&self) -> &str {
        match self {
            Self::Volume(mount) => &mount.target,
            Self::Tmpfs(mount) => &mount.target,
            Self::HostPath(mount) => &mount.target,
        }
    }
}

/// Everything a service mounts, with the field that says so; no two at the same place.
pub(super) fn mounts<'a>(volumes: Option<&Field<'a>>, tmpfs: Option<&Field<'a>>) -> Vec<(Mount, Field<'a>)> {
    let mut mounts: Vec<(Mount, Field<'a>)> = Vec::new();
    for item in volumes.and_then(Field::items).unwrap_or_default() {
        let mount = if item.is_map() { long(&item) } else { item.text().and_then(|text| short(&item, &text)) };
        mounts.extend(mount.map(|mount| (mount, item)));
    }
    if let Some(field) = tmpfs {
        let items = if field.is_list() { field.items().unwrap_or_default() } else { vec![field.clone()] };
        for item in items {
            let mount = item.text().and_then(|text| short_tmpfs(&item, &text));
            mounts.extend(mount.map(|mount| (Mount::Tmpfs(mount), item)));
        }
    }
    let mut taken: BTreeMap<String, String> = BTreeMap::new();
    for (mount, field) in &mounts {
        if let Some(first) = taken.insert(mount.target().to_owned(), field.path.clone()) {
            field.error::<()>(format!("{:?} is a mount already, by {first}", mount.target()));
        }
    }
    mounts
}

/// A name that can be declared under `volumes`.
pub(super) fn check_volume_name(field: &Field<'_>, name: &str) -> Option<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && name.chars().all(good) && name.len() <= MAX_VOLUME_NAME_CHARS {
        return Some(name.to_owned());
    }
    field.error_hint(
        format!("{name:?} cannot be the name of a volume"),
        format!("use 1 to {MAX_VOLUME_NAME_CHARS} characters a-z, A-Z, 0-9, '_', '-' and '.', beginning with a letter or digit"),
    )
}

fn short(item: &Field<'_>, text: &str) -> Option<Mount> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, goal, options) = match parts[..] {
        [_] => {
            return item.error_hint(
                format!("{text:?} is a volume without a name"),
                format!("write NAME:{text} and declare NAME under volumes, or tmpfs: {text} for scratch space"),
            );
        }
        [source, goal] => (source, goal, ""),
        [source, goal, options] => (source, goal, options),
        _ => return item.error_hint(format!("{text:?} has too many ':'"), "write NAME:/path or NAME:/path:ro"),
    };
    let mut read_only = false;
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            other => {
                return item.error_hint(format!("the mount option {other:?} is not supported"), "write ro, rw or none");
            }
        }
    }
    let target = target(item, goal)?;
    if source.starts_with(['/', '.', '~']) {
        return Some(Mount::HostPath(HostPathMount { source: host_path(item, source)?, target, read_only }));
    }
    Some(Mount::Volume(VolumeMount { volume: check_volume_name(item, source)?, target, read_only }))
}

fn long(item: &Field<'_>) -> Option<Mount> {
    let unsupported = [
        ("consistency", "remove it"),
        ("bind", "remove it, a host path is mounted as it is"),
        ("volume", "remove it, a named volume has no settings"),
        ("image", "remove it"),
    ];
    let known = item.known(&["type", "source", "target", "read_only", "tmpfs"], &unsupported)?;
    let Some(kind) = known.get("type") else {
        return item.error_hint("the key \"type\" is missing", "write type: volume, bind or tmpfs");
    };
    let kind = kind.one_of(&[("volume", 'v'), ("bind", 'b'), ("tmpfs", 't')])?;
    let Some(goal) = known.get("target") else {
        return item.error("the key \"target\" (the path in the container) is missing");
    };
    let target = target(goal, &goal.text()?)?;
    let read_only = match known.get("read_only") {
        Some(field) => field.boolean()?,
        None => false,
    };
    if kind == 't' {
        if let Some(source) = known.get("source") {
            return source.error_hint("a tmpfs has no source", "remove it");
        }
        if read_only {
            return item.error_hint("a read-only tmpfs can never hold anything", "remove read_only");
        }
        let size = match known.get("tmpfs") {
            Some(options) => {
                let mode = [("mode", "remove it, a tmpfs has mode 1777")];
                options.known(&["size"], &mode)?.get("size").map(size).unwrap_or(Some(None))?
            }
            None => None,
        };
        return Some(Mount::Tmpfs(TmpfsMount { target, size }));
    }
    if let Some(options) = known.get("tmpfs") {
        return options.error_hint("only a mount of type tmpfs has tmpfs options", "remove it");
    }
    let Some(source) = known.get("source") else {
        return item.error_hint("the key \"source\" is missing", "name the volume, or the path on the host");
    };
    let text = source.text()?;
    Some(match kind {
        'b' => Mount::HostPath(HostPathMount { source: host_path(source, &text)?, target, read_only }),
        _ => Mount::Volume(VolumeMount { volume: check_volume_name(source, &text)?, target, read_only }),
    })
}

fn size(field: &Field<'_>) -> Option<Option<Bytes>> {
    let bytes: Bytes = field.parsed()?;
    if bytes.0 == 0 { field.error("a size of 0 would be no limit; leave it out for that") } else { Some(Some(bytes)) }
}

/// `/run` or `/run:size=64m`.
fn short_tmpfs(item: &Field<'_>, text: &str) -> Option<TmpfsMount> {
    let (goal, options) = text.split_once(':').unwrap_or((text, ""));
    let mut mount = TmpfsMount { target: target(item, goal)?, size: None };
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option.split_once('=') {
            Some(("size", bytes)) => match bytes.parse::<Bytes>() {
                Ok(bytes) if bytes.0 > 0 => mount.size = Some(bytes),
                Ok(_) => return item.error("a size of 0 would be no limit; leave it out for that"),
                Err(error) => return item.error(error.to_string()),
            },
            _ => {
                return item.error_hint(
                    format!("the tmpfs option {option:?} is not supported"),
                    "write for example /run:size=64m",
                );
            }
        }
    }
    Some(mount)
}

/// An absolute path in the container at which something may be mounted, without `.`, `//` or a final `/`.
fn target(field: &Field<'_>, text: &str) -> Option<String> {
    let refuse = |why: &str| field.error(format!("nothing can be mounted at {text:?} in a container: {why}"));
    if !text.starts_with('/') {
        return refuse("the path does not begin with '/'");
    }
    if text.split('/').any(|part| part == "..") {
        return refuse("the path contains '..'");
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    match parts[..] {
        [] => refuse("that is its root"),
        ["dev", "shm"] => Some("/dev/shm".to_owned()),
        ["proc" | "sys" | "dev", ..] => refuse("/proc, /sys and /dev are the container's own"),
        _ => Some(format!("/{}", parts.join("/"))),
    }
}

/// The absolute path on the host; a relative one starts at the manifest's directory.
fn host_path(field: &Field<'_>, text: &str) -> Option<String> {
    if text.starts_with('~') {
        return field.error_hint(format!("the host path {text:?} depends on who runs this"), "write the path in full");
    }
    let base = Path::new(field.file.name).parent().unwrap_or(Path::new(""));
    let mut path = PathBuf::new();
    for part in base.join(text).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                path.pop();
            }
            other => path.push(other),
        }
    }
    match path.to_str() {
        Some(path) if path.starts_with('/') => Some(path.to_owned()),
        _ => field.error_hint(
            format!("the host path {text:?} is relative, and so is the manifest's"),
            "write a path that begins with '/'; it has to exist on every host that may run the service",
        ),
    }
}
