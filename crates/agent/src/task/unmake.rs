//! Unmaking a container: everything it has on this host, in an order in which each step can be repeated. Errors are
//! collected; a step that fails does not keep the others from being tried.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::Request;
use godwit_container::keeper::spawn::end_leftovers;
use godwit_container::{Cgroup, RootFs};
use godwit_model::{ContainerId, ContainerName};

use crate::host::{Host, locked};
use crate::keeper::Keeper;
use crate::translate;

use super::make::{blocking, chain, container_dir, volumes_dir};

/// Ends the processes, the link, the cgroup and the mounts of a container; its files stay, ready for the next start.
pub async fn stop_everything(host: &Arc<Host>, id: &ContainerId) -> Vec<String> {
    let dir = container_dir(host, id);
    let mut errors = Vec::new();
    // First the wire: dying processes must not tell their peers anything when the container lives on elsewhere.
    let network = host.network.lock().await;
    if let Err(error) = network.detach(id.as_str()).await {
        errors.push(ErrorBody::from_chain(&error).one_line());
    }
    drop(network);
    if let Ok((keeper, _events)) = Keeper::connect(&dir).await
        && let Err(error) = keeper.call(Request::Quit { kill: true }, "quit").await
    {
        errors.push(ErrorBody::from_chain(&error).one_line());
    }
    let path = format!("{}/{id}", host.config.cgroup_parent.trim_end_matches('/'));
    let at = dir.clone();
    let keepers = translate::keeper_cgroup(&host.config);
    let rest = blocking(move || {
        end_leftovers(&at, &Cgroup::open(&keepers).map_err(chain)?).map_err(chain)?;
        let cgroup = Cgroup::open(&path).map_err(chain)?;
        if cgroup.exists() {
            cgroup.kill_all().map_err(chain)?;
            cgroup.delete().map_err(chain)?;
        }
        RootFs { layers: Vec::new(), dir: at }.unmount().map_err(chain)
    });
    if let Err(error) = rest.await {
        errors.push(error.one_line());
    }
    errors
}

/// Ends a container and removes its files, and its volumes too if their directory is given.
pub async fn unmake(host: &Arc<Host>, id: &ContainerId, volumes: Option<PathBuf>) -> Vec<String> {
    let mut errors = stop_everything(host, id).await;
    if errors.is_empty() {
        let dirs = [Some(container_dir(host, id)), volumes];
        for dir in dirs.into_iter().flatten() {
            if let Err(error) = remove(&dir).await {
                errors.push(error.one_line());
            }
        }
    }
    for error in &errors {
        tracing::error!(%id, %error, "while unmaking a container");
    }
    errors
}

/// Removes the volumes of containers that are neither here nor to come here again: of a container that was removed
/// while it waited for a place, or whose removal was cut short.
pub async fn sweep_volumes(host: &Arc<Host>) {
    let directory = |name: &ContainerName| volumes_dir(host, name);
    for item in std::fs::read_dir(host.config.volumes_dir()).into_iter().flatten().flatten() {
        let path = item.path();
        // The newest word, after the directory was seen: an arrival is wanted before its directory is made.
        let Some(desired) = host.desired.borrow().clone() else { return };
        let mut wanted = desired.containers.iter().map(|a| &a.spec.name).chain(&desired.volumes);
        let used = wanted.any(|name| directory(name) == path)
            || locked(&host.tasks).values().any(|t| directory(t.name()) == path)
            || locked(&host.incoming).values().any(|i| directory(&i.spec.name) == path);
        if used {
            continue;
        }
        match remove(&path).await {
            Ok(()) => tracing::info!(path = %path.display(), "volumes that nobody wants any more are removed"),
            Err(error) => tracing::error!(path = %path.display(), error = error.one_line(), "volumes are left behind"),
        }
    }
}

async fn remove(dir: &Path) -> Result<(), ErrorBody> {
    let dir = dir.to_owned();
    blocking(move || if dir.exists() { godwit_container::remove_dir_all_no_xdev(&dir).map_err(chain) } else { Ok(()) })
        .await
}
