//! What the agent writes down about a container beside what its keeper does: `container.json`, written before it acts.

use std::io;
use std::path::{Path, PathBuf};

use godwit_model::container::ContainerSpec;
use godwit_model::{Generation, MoveId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ledger::write_atomically;

const FILE: &str = "container.json";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub spec: ContainerSpec,
    pub generation: Generation,
    pub start_count: u64,
    pub image_digest: Option<String>,
    pub restarts: u32,
    /// Revision of the store at which its move began, or made it ours: an older `Desired` says nothing about that.
    #[serde(default)]
    pub since_revision: u64,
    /// Arriving by this move: not ours before the store says so.
    pub incoming: Option<MoveId>,
    /// Being given away by this move: frozen, and only the store's word frees or thaws it.
    pub outgoing: Option<MoveId>,
}

#[derive(Debug, Error)]
pub enum RecordError {
    #[error("{} could not be {doing}", path.display())]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is damaged; remove the container with `godwit rm` and its directory by hand", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
}

impl Record {
    pub fn load(dir: &Path) -> Result<Option<Self>, RecordError> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(RecordError::File { doing: "read", path, source }),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| RecordError::Damaged { path, source })
    }

    /// Durable when it returns.
    pub fn save(&self, dir: &Path) -> Result<(), RecordError> {
        let path = dir.join(FILE);
        let failed = |source| RecordError::File { doing: "written", path: path.clone(), source };
        let text = serde_json::to_vec_pretty(self).map_err(|e| failed(e.into()))?;
        write_atomically(&path, &text).map_err(failed)
    }
}
