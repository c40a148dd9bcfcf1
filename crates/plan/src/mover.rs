//! One container that may move live, by what is known now: whether, where to, and where not. Asked when a person wants
//! a move, and right before a step of a plan begins.

use std::ops::ControlFlow;

use godwit_model::{ContainerName, HostName};

use crate::draft::Draft;
use crate::explain::{Explanation, Here};
use crate::fleet::{Fleet, FleetError, LayerId, MemberId};
use crate::place::{Placement, Refusal};
use crate::rules::{Ask, Why};
use crate::step::How;

/// See [`Fleet::mover`].
#[derive(Debug)]
pub struct Mover<'f> {
    draft: Draft<'f>,
    id: MemberId,
    /// What goes along to the same host.
    together: Vec<MemberId>,
    layers: Vec<LayerId>,
}

impl Fleet {
    /// A container that may move. `together`: what goes to the same host with it, before or after it, because one must be
    /// near the other; those do not keep it, and are taken for there. Names that are not known stand for nobody.
    ///
    /// Errors: a container that the fleet does not have.
    pub fn mover(&self, container: &ContainerName, together: &[ContainerName]) -> Result<Mover<'_>, FleetError> {
        let id = self.member_id(container)?;
        let together = together.iter().filter_map(|name| self.member_ids.get(name).copied());
        let together: Vec<MemberId> = together.filter(|m| *m != id).collect();
        let layers = together.iter().map(|m| self.member(*m).ties.layer).collect();
        Ok(Mover { draft: Draft::new(self), id, together, layers })
    }

    /// Whether the hard rules let this host take a live move of a container now. All the reasons if not.
    pub fn check_move(&self, container: &ContainerName, to: &HostName) -> Result<(), Vec<String>> {
        let not_there = |error: FleetError| vec![error.to_string()];
        let mover = self.mover(container, &[]).map_err(not_there)?;
        let mut reasons = mover.stays();
        reasons.extend(mover.against(to).map_err(not_there)?);
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    /// Looks at every host as a live move of the container would: its volumes come along, its own host is out.
    /// `None`: there is no such container.
    pub fn explain_move(&self, container: &ContainerName) -> Option<Explanation> {
        Some(self.mover(container, &[]).ok()?.explain())
    }
}

impl Mover<'_> {
    /// What speaks against moving it at all, as sentences; empty: nothing.
    pub fn stays(&self) -> Vec<String> {
        let mut reasons = self.draft.member(self.id).container.unmovable.clone();
        let left = self.draft.dependents(self.id).into_iter().filter(|m| !self.together.contains(m));
        reasons.extend(left.map(|m| format!("{} must be near it", self.draft.member(m).container.name)));
        reasons
    }

    /// The best host for it.
    pub fn place(&self) -> Result<Placement, Refusal> {
        self.draft.place(&self.ask())
    }

    /// What speaks against this host, as sentences; empty: nothing.
    ///
    /// Errors: a host that the fleet does not have.
    pub fn against(&self, to: &HostName) -> Result<Vec<String>, FleetError> {
        let to = self.draft.fleet.host_id(to)?;
        Ok(self.draft.reasons_against(to, &self.ask()))
    }

    /// Every host, with what speaks against it or for it; its own is out.
    pub fn explain(&self) -> Explanation {
        Explanation { unmovable: self.stays(), ..self.draft.explanation(&self.ask()) }
    }

    /// Its own host, as if it were to come there now; `None`: it is on none.
    pub fn here(&self) -> Option<Here> {
        let home = self.draft.home(self.id)?;
        let mut without = self.draft.clone();
        without.relocate(self.id, None);
        let ask = Ask { not: None, from: None, along: &self.layers, ..without.ask(self.id, How::Live) };
        let mut broken = Vec::new();
        without.against(home, &ask, |why| {
            // What is there may stay, whatever the host takes.
            if !matches!(why, Why::NotConnected | Why::State(_) | Why::Closed) {
                broken.push(why.to_string());
            }
            ControlFlow::Continue(())
        });
        Some(Here { score: without.score(home, &ask), broken })
    }

    /// This host as a place for it; the reasons against it where it is none.
    ///
    /// Errors: a host that the fleet does not have.
    pub fn place_at(&self, to: &HostName) -> Result<Result<Placement, Vec<String>>, FleetError> {
        let against = self.against(to)?;
        if !against.is_empty() {
            return Ok(Err(against));
        }
        let (id, ask) = (self.draft.fleet.host_id(to)?, self.ask());
        let score = self.draft.score(id, &ask);
        // It was named, not found to be the best.
        let reasons = self.draft.reasons_for_named(id, &ask, &score);
        Ok(Ok(Placement { host: to.clone(), score, reasons }))
    }

    fn ask(&self) -> Ask<'_> {
        Ask { along: &self.layers, ..self.draft.ask(self.id, How::Live) }
    }
}
