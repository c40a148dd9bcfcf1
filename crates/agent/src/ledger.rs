//! The agent's memory across restarts: what the controller last wanted, on disk before it is acted on.
//!
//! With it an agent that starts while the controller is away goes on with what it had.

use std::io;
use std::path::{Path, PathBuf};

use godwit_api::link::Desired;
use thiserror::Error;

const FILE: &str = "ledger.json";
const MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, Error)]
pub enum LedgerError {
    #[error("the ledger {} could not be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the ledger {} is damaged; the containers run on, but who they belong to is unknown until the controller is reached: move the file away and restart the agent", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("the ledger {} could not be written; is the disk full?", path.display())]
    Write { path: PathBuf, source: io::Error },
}

pub struct Ledger {
    path: PathBuf,
}

impl Ledger {
    pub fn open(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE) }
    }

    /// What was last wanted; `None` on a host that has never been told anything.
    pub fn load(&self) -> Result<Option<Desired>, LedgerError> {
        let read = |source| LedgerError::Read { path: self.path.clone(), source };
        match std::fs::metadata(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(read(e)),
            Ok(meta) if meta.len() > MAX_BYTES => return Err(read(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => {}
        }
        let text = std::fs::read(&self.path).map_err(read)?;
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| LedgerError::Damaged { path: self.path.clone(), source })
    }

    /// Durable when it returns.
    pub fn save(&self, desired: &Desired) -> Result<(), LedgerError> {
        let write = |source| LedgerError::Write { path: self.path.clone(), source };
        let text = serde_json::to_vec(desired).map_err(|e| write(e.into()))?;
        write_atomically(&self.path, &text).map_err(write)
    }
}

/// All of it or none, also after a power cut.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path());
        assert!(ledger.load().unwrap().is_none());
        let desired = Desired { store_id: "s".into(), revision: 7, ..Desired::default() };
        ledger.save(&desired).unwrap();
        assert_eq!(ledger.load().unwrap().unwrap(), desired);
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert!(ledger.load().unwrap_err().to_string().contains("damaged"));
    }
}
