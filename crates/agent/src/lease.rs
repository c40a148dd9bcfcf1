//! This host's lease: how long its containers may run without a word from the controller.
//!
//! Keepers read its end from one file in the run directory and stop their containers themselves (`container`,
//! `keeper::fence`), so that it holds without this agent. The witnesses are kept in the state directory: a host that was
//! started anew while the controller is away knows by them that others may have started what it had.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_api::types::ErrorBody;
use godwit_container::keeper::fence::boottime_ms;
use godwit_lease::{Beat, Grant, Holder, VOUCH_TIMEOUT_MS, Witness};
use godwit_model::HostName;
use thiserror::Error;
use tokio::time::{MissedTickBehavior, interval};

use crate::host::{Host, locked};
use crate::ledger::write_atomically;
use crate::witness;

const FILE: &str = "lease";
const WITNESSES_FILE: &str = "witnesses.json";
const MAX_BYTES: u64 = 64 << 10;
/// How often it is seen whether the lease has ended, in milliseconds.
const LOOK_EVERY_MS: u64 = 500;

#[derive(Debug, Error)]
pub enum LeaseError {
    #[error("{} could not be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is damaged; remove it if this host runs nothing that another host may have started", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("{} could not be written; is the disk full?", path.display())]
    Write { path: PathBuf, source: io::Error },
}

pub struct Lease {
    holder: Mutex<Holder>,
    file: PathBuf,
    witnesses_file: PathBuf,
}

impl Lease {
    /// As an earlier agent left it. What keepers read is there when this returns.
    pub fn open(state_dir: &Path, run_dir: &Path) -> Result<Self, LeaseError> {
        let (file, witnesses_file) = (run_dir.join(FILE), state_dir.join(WITNESSES_FILE));
        let now = boottime_ms();
        let holder = match load_witnesses(&witnesses_file)? {
            None => Holder::free(now),
            // The run directory does not survive a start of the machine, nor does its clock.
            Some(witnesses) => {
                let until = file.exists().then(|| godwit_container::keeper::fence::read_lease(&file));
                Holder::resumed(witnesses, until.unwrap_or(Some(0)), now)
            }
        };
        let lease = Self { holder: Mutex::new(holder), file, witnesses_file };
        lease.publish()?;
        Ok(lease)
    }

    /// For keepers.
    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn beat(&self) -> Beat {
        locked(&self.holder).beat(boottime_ms())
    }

    /// Whether something may be let run now.
    pub fn may_run(&self) -> bool {
        locked(&self.holder).may_run(boottime_ms())
    }

    /// See [`Holder::vouch`].
    pub fn vouch(&self) -> bool {
        locked(&self.holder).vouch(boottime_ms())
    }

    /// See [`Holder::carried_out`].
    pub fn carried_out(&self, revision: u64) -> bool {
        locked(&self.holder).carried_out(revision, boottime_ms())
    }

    /// The controller's answer to a beat. Whom to ask without a controller is on the disk before it counts.
    pub fn granted(&self, grant: Grant) -> Result<(), LeaseError> {
        if locked(&self.holder).witnesses() != grant.witnesses || !self.witnesses_file.exists() {
            let text = serde_json::to_vec(&grant.witnesses)
                .map_err(|e| LeaseError::Write { path: self.witnesses_file.clone(), source: e.into() })?;
            write_atomically(&self.witnesses_file, &text)
                .map_err(|source| LeaseError::Write { path: self.witnesses_file.clone(), source })?;
        }
        locked(&self.holder).granted(grant, boottime_ms());
        self.publish()
    }

    /// Writes the end of the lease down for keepers. Not durable: it is worth nothing after the machine's end.
    fn publish(&self) -> Result<(), LeaseError> {
        let write = |source| LeaseError::Write { path: self.file.clone(), source };
        // Under the lock, so that an older end does not replace a newer one.
        let holder = locked(&self.holder);
        let text = holder.until().map_or("none".to_owned(), |until| until.to_string());
        let new = self.file.with_extension("new");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.file)).map_err(write)
    }

    /// Those to ask now, if it is time to.
    fn to_ask(&self) -> Option<Vec<Witness>> {
        let holder = locked(&self.holder);
        holder.needs_witnesses(boottime_ms()).then(|| holder.witnesses().to_vec())
    }
}

fn load_witnesses(path: &Path) -> Result<Option<Vec<Witness>>, LeaseError> {
    use std::io::Read;
    let read = |source| LeaseError::Read { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(read(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut text).map_err(read)?;
    serde_json::from_slice(&text).map(Some).map_err(|source| LeaseError::Damaged { path: path.to_owned(), source })
}

/// Watches over the lease until the agent ends: asks witnesses while there is no controller, tells when it has ended.
pub async fn watch(host: Arc<Host>) {
    let mut look = interval(Duration::from_millis(LOOK_EVERY_MS));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        if locked(&host.lease.holder).look(boottime_ms()) {
            tracing::error!(
                "the lease of this host has ended: its containers stand still until the controller is reached"
            );
            host.lease_ended();
        }
        let Some(witnesses) = host.lease.to_ask() else { continue };
        let asked = boottime_ms();
        let by = ask(&host, &witnesses).await;
        let goes_on = locked(&host.lease.holder).vouched(asked, &by, boottime_ms());
        if !goes_on {
            let names: Vec<&str> = by.iter().map(HostName::as_str).collect();
            tracing::warn!(
                vouched = names.join(", "),
                of = witnesses.len(),
                "no controller, and too few hosts say the same"
            );
        } else if let Err(error) = host.lease.publish() {
            tracing::error!(error = ErrorBody::from_chain(&error).one_line(), "the lease is not prolonged");
        }
    }
}

/// Those of the witnesses that have no controller either; this host is asked like the others.
async fn ask(host: &Arc<Host>, witnesses: &[Witness]) -> Vec<HostName> {
    let limit = Duration::from_millis(VOUCH_TIMEOUT_MS);
    let mut asking = tokio::task::JoinSet::new();
    let mut by = Vec::new();
    for witness in witnesses.iter().cloned() {
        if witness.host == host.config.name {
            by.extend(host.lease.vouch().then_some(witness.host));
            continue;
        }
        let host = Arc::clone(host);
        asking.spawn(async move {
            let answer = tokio::time::timeout(limit, witness::ask(&host, &witness)).await;
            match answer {
                Ok(Ok(true)) => Some(witness.host),
                Ok(Ok(false)) => None,
                Ok(Err(error)) => {
                    tracing::debug!(witness = %witness.host, error = ErrorBody::from_chain(&error).one_line(), "no answer");
                    None
                }
                Err(_) => None,
            }
        });
    }
    while let Some(answer) = asking.join_next().await {
        by.extend(answer.ok().flatten());
    }
    by
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn grant(lease: &Lease, witnesses: &[&str]) -> Grant {
        let address = "127.0.0.1:1".parse().unwrap();
        let witnesses = witnesses.iter().map(|h| Witness { host: HostName::new(*h).unwrap(), address }).collect();
        Grant { number: 1, beat_ms: lease.beat().sent_ms, for_ms: 10_000, witnesses, revision: 1 }
    }

    #[test]
    fn a_lease_is_found_again_and_ends_with_the_machine() {
        let (state, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = || Lease::open(state.path(), run.path()).unwrap();
        let lease = open();
        assert_eq!(std::fs::read_to_string(lease.file()).unwrap(), "none");
        assert!(lease.may_run());
        lease.granted(grant(&lease, &["h1", "h2"])).unwrap();
        let end: u64 = std::fs::read_to_string(lease.file()).unwrap().parse().unwrap();
        assert!(end > boottime_ms() && end <= boottime_ms() + 10_000);
        assert!(open().may_run(), "another agent goes on with it");
        std::fs::remove_file(run.path().join(FILE)).unwrap();
        let lease = open();
        assert!(!lease.may_run(), "after a start of the machine nothing runs without the controller's word");
        lease.granted(grant(&lease, &["h1", "h2"])).unwrap();
        assert!(!lease.may_run(), "a grant alone does not say what is still owned");
        assert!(!lease.carried_out(0));
        assert!(lease.carried_out(1));
        assert!(lease.may_run());
        // One host alone has nobody who could take anything.
        lease.granted(grant(&lease, &[])).unwrap();
        assert_eq!(std::fs::read_to_string(lease.file()).unwrap(), "none");
        std::fs::remove_file(run.path().join(FILE)).unwrap();
        assert!(open().may_run());
    }
}
