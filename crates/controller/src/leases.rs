//! Hosts' leases: who may run what it has, and when a silent host runs nothing any more. The rules are `godwit_lease`'s; here
//! is what the store keeps of them, and this process's clock.

use std::sync::Mutex;
use std::time::Instant;

use godwit_lease::{Beat, Book, Grant, Held, Witness, choose_witnesses};
use godwit_model::HostName;
use godwit_model::host::HostState;

use crate::core::{Core, locked};
use crate::state::records::{HostRecord, LeaseTerms};
use crate::state::{StateError, Tx, World};

/// What this controller has granted since it started.
#[derive(Debug)]
pub struct Leases {
    book: Mutex<Book>,
    started: Instant,
    /// `false`: leases have no end.
    recovery: bool,
}

impl Leases {
    /// Nothing is granted yet. Without `recovery` no lease has an end, and no host is lost but by a person's word.
    pub fn new(recovery: bool) -> Self {
        Self { book: Mutex::new(Book::new(0)), started: Instant::now(), recovery }
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// To be called at least every second.
    pub fn look(&self) {
        locked(&self.book).look(self.now());
    }

    /// Whether a host runs nothing any more; if so, nobody grants it anything until [`Leases::decided`].
    pub fn seize(&self, host: &HostRecord) -> Result<(), Held> {
        let mut book = locked(&self.book);
        if host.declared_dead {
            return book.seize_by_word(&host.facts.name);
        }
        let sets = sets(host);
        book.seize(&host.facts.name, &sets, self.now())
    }

    /// As [`Leases::seize`], for a host of which a person says that it is dead.
    pub fn seize_by_word(&self, host: &HostName) -> Result<(), Held> {
        locked(&self.book).seize_by_word(host)
    }

    /// Why a host is not called lost, although it is silent.
    pub fn held(&self, host: &HostRecord) -> Option<Held> {
        let sets = sets(host);
        locked(&self.book).lost(&host.facts.name, &sets, self.now()).err()
    }

    /// What was decided about a seized host is in the store at this revision.
    pub fn decided(&self, host: &HostName, revision: u64) {
        locked(&self.book).decided(host, revision);
    }
}

fn sets(host: &HostRecord) -> Vec<&[HostName]> {
    host.lease.iter().flat_map(|terms| [&terms.held[..], &terms.offered[..]]).collect()
}

/// Answers a host that asks for its lease to go on. `told`: what it shall be was compared with what it was last told at
/// this revision of the store; `sent`: the revision of what it was last told. `None`: it gets no grant now.
///
/// Errors: what it may hold from now on could not be stored, so it is not granted.
pub async fn answer(
    core: &Core,
    host: &HostName,
    beat: &Beat,
    told: u64,
    sent: u64,
) -> Result<Option<Grant>, StateError> {
    let world = core.state.world();
    let Some(record) = world.hosts.get(host) else { return Ok(None) };
    let recovery = core.leases.recovery;
    let terms = terms(&world, record, beat, recovery);
    if record.lease.as_ref() != Some(&terms) {
        // Before a host gets other witnesses, the store says that it may have them.
        let store = |world: &World| {
            let mut tx = Tx::new();
            if let Some(old) = world.hosts.get(host) {
                let lease = Some(self::terms(world, old, beat, recovery));
                if old.lease != lease {
                    tx.put_host(Some(old), &HostRecord { lease, ..old.value.clone() });
                }
            }
            Ok::<_, StateError>((tx, ()))
        };
        core.state.transact(store).await?;
    }
    let world = core.state.world();
    let Some(terms) = world.hosts.get(host).and_then(|record| record.lease.as_ref()) else { return Ok(None) };
    let witness = |name: &HostName| {
        let facts = &world.hosts.get(name)?.facts;
        Some(Witness { host: name.clone(), address: facts.migration_address })
    };
    let witnesses = terms.offered.iter().filter_map(witness).collect();
    let mut book = locked(&core.leases.book);
    let grant = book.asked(host, beat, told, witnesses, core.leases.now());
    Ok(grant.map(|grant| Grant { revision: sent, ..grant }))
}

/// A host asks for no lease: it would not stop at its end, so it is never called lost. It may have had one before, with
/// another version of its agent.
pub async fn none(core: &Core, host: &HostName) -> Result<(), StateError> {
    if core.state.world().hosts.get(host).is_none_or(|record| record.lease.is_none()) {
        return Ok(());
    }
    let decide = |world: &World| {
        let mut tx = Tx::new();
        if let Some(old) = world.hosts.get(host).filter(|record| record.lease.is_some()) {
            tx.put_host(Some(old), &HostRecord { lease: None, ..old.value.clone() });
        }
        Ok((tx, ()))
    };
    core.state.transact(decide).await.map(|_| ())
}

/// What a host may hold after this beat. It is offered others only when it is known to hold what it was offered before.
fn terms(world: &World, record: &HostRecord, beat: &Beat, recovery: bool) -> LeaseTerms {
    let held = beat.witnesses.clone();
    let offered = match &record.lease {
        Some(old) if old.offered != held => old.offered.clone(),
        _ if !recovery => Vec::new(),
        _ => {
            // Those with leases, which answer; this one is one of them now.
            let able = world.hosts.values().filter(|h| h.state != HostState::Failed);
            let able = able.filter(|h| h.lease.is_some() || h.facts.name == record.facts.name);
            let mut able: Vec<(u32, HostName)> = able.map(|h| (h.index, h.facts.name.clone())).collect();
            able.sort();
            let names: Vec<HostName> = able.into_iter().map(|(_, name)| name).collect();
            choose_witnesses(&names).to_vec()
        }
    };
    LeaseTerms { held, offered }
}
