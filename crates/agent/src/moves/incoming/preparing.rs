//! What is made for a container before its stream comes: one place for it, however soon one move follows the other.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::types::ErrorBody;
use godwit_image::Image;
use godwit_model::container::ContainerSpec;
use godwit_model::units::Bytes;
use godwit_model::{Generation, HostName, MoveId};
use tokio::time::timeout;

use super::{Incoming, Ready, Stage, chain};
use crate::host::{Host, locked};
use crate::moves::dump::WorkDirs;
use crate::task::{self, Record, container_dir, volumes_dir};
use crate::translate;

/// What a container left behind here when it moved away is gone within this time, in milliseconds.
const GONE_TIMEOUT_MS: u64 = 5_000;

impl Incoming {
    /// Gets everything ready: image, directories, addresses; frames for the container are parked from here on.
    pub async fn prepare(
        host: &Arc<Host>,
        id: MoveId,
        spec: ContainerSpec,
        generation: Generation,
        from: HostName,
        memory: Bytes,
        since_revision: u64,
    ) -> Result<(), ErrorBody> {
        if locked(&host.incoming).contains_key(&id) {
            return Ok(());
        }
        host.criu.as_ref().ok_or_else(|| ErrorBody::new("this host has no usable CRIU"))?;
        let image = task::ensure_image(host, &spec).await?;
        make_way(host, &id, &spec, since_revision).await?;
        host.apply_network().await.map_err(ErrorBody::new)?;
        let _one_at_a_time = host.preparing.lock().await;
        if locked(&host.incoming).contains_key(&id) {
            return Ok(());
        }
        if is_here(host, &spec) {
            return Err(ErrorBody::new(format!("container {} is on this host already", spec.name)));
        }
        let record = Record {
            spec: spec.clone(),
            generation,
            start_count: 0,
            image_digest: None,
            restarts: 0,
            since_revision,
            incoming: Some(id.clone()),
            outgoing: None,
        };
        let made = make_directories(host, &spec, &record)
            .map_err(|e| ErrorBody::new(format!("the container's directories could not be made: {e}")));
        let ready = match made {
            Ok(()) => prepare_rest(host, &id, &spec, image).await,
            Err(error) => Err(error),
        };
        godwit_hold::reach("prepare").await;
        match ready {
            Ok(ready) => {
                let incoming = Self {
                    id: id.clone(),
                    spec,
                    generation,
                    from,
                    memory,
                    since_revision,
                    stage: tokio::sync::Mutex::new(Stage::Ready(Box::new(ready))),
                    lanes: std::sync::Mutex::default(),
                    site: tokio::sync::Mutex::default(),
                };
                let incoming = Arc::new(incoming);
                locked(&host.incoming).insert(id.clone(), Arc::clone(&incoming));
                // Who took the move back while this was made has found nothing to unmake.
                if is_over(host, &id, since_revision) {
                    let reason = "the move was taken back while its destination was made ready";
                    incoming.discard(host, reason).await;
                    return Err(ErrorBody::new(reason));
                }
                Ok(())
            }
            Err(error) => {
                let volumes = volumes_dir(host, &spec.name);
                task::unmake(host, &spec.id, Some(volumes)).await;
                Err(error)
            }
        }
    }
}

/// Whether the newest word is younger than the move and does not know it.
fn is_over(host: &Host, id: &MoveId, since_revision: u64) -> bool {
    let newest = host.desired.borrow().clone();
    newest.is_some_and(|d| d.revision >= since_revision && !d.moves.iter().any(|m| m.id == *id))
}

fn is_here(host: &Host, spec: &ContainerSpec) -> bool {
    locked(&host.tasks).contains_key(&spec.id) || locked(&host.incoming).values().any(|i| i.spec.id == spec.id)
}

/// Waits until nothing is left here of an earlier stay of the container, or of an earlier move of it: their directories
/// are the same.
async fn make_way(host: &Arc<Host>, id: &MoveId, spec: &ContainerSpec, since_revision: u64) -> Result<(), ErrorBody> {
    let earlier = locked(&host.incoming).values().find(|i| i.spec.id == spec.id && i.id != *id).cloned();
    if let Some(earlier) = earlier {
        if earlier.since_revision > since_revision {
            return Err(ErrorBody::new(format!("a later move of container {} has begun", spec.name)));
        }
        earlier.discard(host, "a later move of the container has begun").await;
    }
    let gone = async {
        loop {
            let mut gone = std::pin::pin!(host.task_gone.notified());
            gone.as_mut().enable();
            if !locked(&host.tasks).contains_key(&spec.id) {
                return;
            }
            gone.await;
        }
    };
    timeout(Duration::from_millis(GONE_TIMEOUT_MS), gone).await.map_err(|_| {
        let seconds = GONE_TIMEOUT_MS / 1000;
        ErrorBody::new(format!("container {} is still on this host after {seconds} s", spec.name))
    })
}

fn make_directories(host: &Host, spec: &ContainerSpec, record: &Record) -> std::io::Result<()> {
    let owned = |path: &Path| {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
        std::os::unix::fs::chown(path, Some(spec.id_base), Some(spec.id_base))
    };
    let dir = container_dir(host, &spec.id);
    std::fs::create_dir_all(&dir)?;
    record.save(&dir).map_err(std::io::Error::other)?;
    owned(&dir.join("upper"))?;
    let volumes = volumes_dir(host, &spec.name);
    std::fs::create_dir_all(&volumes)?;
    for volume in &spec.volumes {
        owned(&volumes.join(&volume.volume))?;
    }
    Ok(())
}

async fn prepare_rest(host: &Arc<Host>, id: &MoveId, spec: &ContainerSpec, image: Image) -> Result<Ready, ErrorBody> {
    let dirs = WorkDirs::make(host, id)
        .map_err(|e| ErrorBody::new(format!("the move's working directory could not be made: {e}")))?;
    let network = host.network.lock().await;
    let parking = network.park(&translate::port(&host.config, spec)).await.map_err(chain)?;
    Ok(Ready { image, parking, dirs })
}
