//! Files that a restore which broke off has left behind.
//!
//! A file that is open and has no name any more travels in CRIU's images. A restore gives it a name for the moment until
//! all have opened it: `NAME.cr.ID.ghost`, the id in hexadecimal. If CRIU is killed in that moment the name stays, among
//! the container's own files; and where the container is started again from these, its next move would fail on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_model::container::ContainerSpec;

use crate::host::Host;
use crate::task::{container_dir, volumes_dir};

/// Removes them from all files of a container of which nothing runs.
pub async fn remove(host: &Arc<Host>, spec: &ContainerSpec) {
    let volumes = volumes_dir(host, &spec.name);
    let mut trees = vec![container_dir(host, &spec.id).join("upper")];
    trees.extend(spec.volumes.iter().map(|v| volumes.join(&v.volume)));
    let work = tokio::task::spawn_blocking(move || trees.into_iter().for_each(remove_below));
    if let Err(error) = work.await {
        tracing::error!(%error, "files of a restore that broke off may be left behind");
    }
}

/// Follows no links; nobody changes the tree meanwhile.
fn remove_below(tree: PathBuf) {
    let mut directories = vec![tree];
    while let Some(directory) = directories.pop() {
        let failed = |error: std::io::Error, path: &Path| {
            tracing::error!(%error, path = %path.display(), "files of a restore that broke off may be left behind");
        };
        let items = match std::fs::read_dir(&directory) {
            Ok(items) => items,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                failed(error, &directory);
                continue;
            }
        };
        for item in items.flatten() {
            let is_directory = item.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory {
                directories.push(item.path());
            } else if is_ghost(&item.file_name().to_string_lossy())
                && let Err(error) = std::fs::remove_file(item.path())
            {
                failed(error, &item.path());
            }
        }
    }
}

fn is_ghost(name: &str) -> bool {
    let id = name.strip_suffix(".ghost").and_then(|rest| Some(rest.rsplit_once(".cr.")?.1));
    id.is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_criu_names_so_goes() {
        let tree = tempfile::tempdir().unwrap();
        let below = tree.path().join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        let kept = ["x.ghost", "x.cr..ghost", "x.cr.g.ghost", "x.cr.1", "x.cr.1.ghost.txt"];
        for name in kept.iter().chain(&["x.cr.1f.ghost", ".cr.0.ghost"]) {
            std::fs::write(below.join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("/", tree.path().join("link")).unwrap();
        remove_below(tree.path().to_owned());
        let mut left: Vec<String> =
            std::fs::read_dir(&below).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let mut kept = kept.map(str::to_owned);
        kept.sort();
        assert_eq!(left, kept);
    }
}
