//! What people do to one container: stop, start, remove.

use godwit_model::ContainerName;
use thiserror::Error;

use crate::apply;
use crate::state::{State, StateError, Tx, World};

/// Why a container was not changed.
#[derive(Debug, Error)]
pub enum ContainerError {
    #[error("there is no container {name}")]
    NoSuchContainer { name: ContainerName },
    #[error(transparent)]
    State(#[from] StateError),
}

/// Wants a container to run, or not. A start of one that ended by itself starts it again.
pub async fn set_run(state: &State, name: &ContainerName, run: bool) -> Result<(), ContainerError> {
    let decide = |world: &World| {
        let old = world.containers.get(name).filter(|c| !c.removed);
        let old = old.ok_or_else(|| ContainerError::NoSuchContainer { name: name.clone() })?;
        let mut record = old.value.clone();
        record.run = run;
        record.start_count += u64::from(run);
        let mut tx = Tx::new();
        if record != old.value {
            tx.put_container(Some(old), &record);
        }
        Ok::<_, ContainerError>((tx, ()))
    };
    state.transact(decide).await.map(|_| ())
}

/// Removes a container with its files and volumes. The next apply of its environment makes a new one.
pub async fn remove(state: &State, name: &ContainerName) -> Result<(), ContainerError> {
    let decide = |world: &World| {
        let old = world.containers.get(name).filter(|c| !c.removed);
        let old = old.ok_or_else(|| ContainerError::NoSuchContainer { name: name.clone() })?;
        let mut tx = Tx::new();
        apply::remove(&mut tx, world, old, "it was removed");
        Ok::<_, ContainerError>((tx, ()))
    };
    state.transact(decide).await.map(|_| ())
}
