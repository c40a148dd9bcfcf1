//! Making a container: image, volumes, root file system, keeper, network. Used by a start and, in parts, by an arrival.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::{Event, Reply, Request};
use godwit_container::{Cgroup, LaunchSpec, RootFs, copy_image_dir_to_volume, resolve_user};
use godwit_image::{Image, ImageSource, NoProgress, PullOptions};
use godwit_model::container::ContainerSpec;
use godwit_model::{ContainerId, ContainerName};
use tokio::sync::mpsc;

use crate::host::Host;
use crate::keeper::Keeper;
use crate::translate;

/// A container whose keeper lives.
pub struct Live {
    pub keeper: Keeper,
    pub events: mpsc::Receiver<Event>,
    pub cgroup: Cgroup,
    pub pid: u32,
}

pub fn container_dir(host: &Host, id: &ContainerId) -> PathBuf {
    host.config.containers_dir().join(id.as_str())
}

/// Where the volumes of the container of this name are, whatever its id: a changed container takes them over.
pub fn volumes_dir(host: &Host, name: &ContainerName) -> PathBuf {
    host.config.volumes_dir().join(format!("{}.{}", name.env, name.local()))
}

pub(super) fn wrong(doing: &str) -> impl Fn(std::io::Error) -> ErrorBody {
    move |e| ErrorBody { causes: vec![e.to_string()], ..ErrorBody::new(format!("{doing} failed")) }
}

pub(super) fn chain<E: std::error::Error + 'static>(e: E) -> ErrorBody {
    ErrorBody::from_chain(&e)
}

/// Runs blocking work; a panic in it is reported like an error.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ErrorBody> {
    tokio::task::spawn_blocking(work).await.map_err(|e| ErrorBody::new(format!("a worker failed: {e}")))?
}

pub async fn ensure_image(host: &Host, spec: &ContainerSpec) -> Result<Image, ErrorBody> {
    let source: ImageSource = spec.image.parse().map_err(chain)?;
    host.images.ensure(&source, &PullOptions::default(), &NoProgress).await.map_err(chain)
}

/// Mounts the root file system; the directory is made if it is absent.
pub async fn mount_root(dir: &Path, image: &Image, id_base: u32) -> Result<PathBuf, ErrorBody> {
    let (layers, dir) = (image.layers.clone(), dir.to_owned());
    blocking(move || {
        std::fs::create_dir_all(&dir).map_err(wrong("making the container's directory"))?;
        let root = RootFs { layers, dir: dir.clone() };
        root.mount(id_base).map_err(chain)?;
        Ok(dir.join("rootfs"))
    })
    .await
}

/// Makes the volumes that are absent, with what the image has at their place.
pub async fn prepare_volumes(host: &Host, spec: &ContainerSpec, rootfs: PathBuf) -> Result<PathBuf, ErrorBody> {
    let dir = volumes_dir(host, &spec.name);
    let (volumes, id_base, made_in) = (spec.volumes.clone(), spec.id_base, dir.clone());
    blocking(move || {
        for volume in &volumes {
            let path = made_in.join(&volume.volume);
            if path.is_dir() {
                continue;
            }
            // Made under another name first, so that a volume that is there is complete.
            let unfinished = made_in.join(format!(".{}.new", volume.volume));
            if unfinished.exists() {
                godwit_container::remove_dir_all_no_xdev(&unfinished).map_err(chain)?;
            }
            std::fs::create_dir_all(&unfinished).map_err(wrong("making a volume"))?;
            std::os::unix::fs::chown(&unfinished, Some(id_base), Some(id_base)).map_err(wrong("owning a volume"))?;
            copy_image_dir_to_volume(&rootfs, &volume.target, &unfinished).map_err(chain)?;
            std::fs::rename(&unfinished, &path).map_err(wrong("finishing a volume"))?;
        }
        Ok(())
    })
    .await?;
    for volume in &spec.volumes {
        let path = dir.join(&volume.volume);
        let owner = std::fs::metadata(&path).map_err(wrong("looking at a volume"))?.uid();
        let range = spec.id_base..spec.id_base + godwit_model::container::ID_RANGE;
        if !range.contains(&owner) {
            return Err(ErrorBody::new(format!("volume {} belongs to another id range", volume.volume)));
        }
    }
    Ok(dir)
}

/// Starts a keeper for the container of `dir`, and connects to it.
pub async fn start_keeper(
    host: &Host,
    dir: &Path,
    launch: &LaunchSpec,
) -> Result<(Keeper, mpsc::Receiver<Event>), ErrorBody> {
    let (binary, at, launch) = (host.config.binary.clone(), dir.to_owned(), launch.clone());
    let lease = host.lease.file().to_owned();
    blocking(move || {
        // The keeper works in a directory of its own.
        let lease = std::path::absolute(&lease).map_err(wrong("finding the lease's file"))?;
        godwit_container::keeper::spawn::spawn(&binary, &at, &launch, Some(&lease)).map_err(chain)
    })
    .await?;
    Keeper::connect(dir).await.map_err(chain)
}

/// Gives the container its interface while its process waits; not plugged yet.
pub async fn attach_network(host: &Host, spec: &ContainerSpec, pid: u32) -> Result<(), ErrorBody> {
    let network = host.network.lock().await;
    network.attach(&translate::port(&host.config, spec), pid).await.map_err(chain)
}

/// From nothing (or from the files of an earlier run) to a running program.
pub async fn start(host: &Arc<Host>, spec: &ContainerSpec) -> Result<(Live, Image), ErrorBody> {
    let image = ensure_image(host, spec).await?;
    let dir = container_dir(host, &spec.id);
    let rootfs = mount_root(&dir, &image, spec.id_base).await?;
    let volumes = prepare_volumes(host, spec, rootfs.clone()).await?;
    let user_text = spec.user.clone().unwrap_or_else(|| image.config.user.clone());
    let user =
        if user_text.is_empty() { Default::default() } else { resolve_user(&rootfs, &user_text).map_err(chain)? };
    let launch = translate::launch_spec(&host.config, spec, &image.config, user, &rootfs, &volumes).map_err(chain)?;
    let (keeper, events) = start_keeper(host, &dir, &launch).await?;
    let pid = match keeper.call(Request::Create, "create").await.map_err(chain)?.0 {
        Reply::Created { pid } => pid,
        _ => return Err(ErrorBody::new("the keeper answered a create with something else")),
    };
    attach_network(host, spec, pid).await?;
    let network = host.network.lock().await;
    network.plug(spec.id.as_str()).await.map_err(chain)?;
    drop(network);
    keeper.call(Request::Start, "start").await.map_err(chain)?;
    let cgroup = open_cgroup(&launch)?;
    Ok((Live { keeper, events, cgroup, pid }, image))
}

pub fn open_cgroup(launch: &LaunchSpec) -> Result<Cgroup, ErrorBody> {
    Cgroup::open(&launch.cgroup_path()).map_err(chain)
}
