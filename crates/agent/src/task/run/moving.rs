//! What a container's task does for a move: gives it away, waits for the verdict, carries it out.

use std::sync::Arc;

use godwit_api::types::ErrorBody;
use godwit_model::MoveId;
use godwit_model::container::ContainerState;
use tokio::time::Instant;

use super::{Task, chain};
use crate::host::locked;
use crate::moves::outgoing::{self, Outgoing};
use crate::task::Verdict;
use crate::task::unmake::stop_everything;

impl Task {
    pub(super) async fn start_move(&mut self, plan: outgoing::Plan) -> Result<(), ErrorBody> {
        if let Some(outgoing) = &self.outgoing {
            return if outgoing.id == plan.id {
                Ok(())
            } else {
                Err(ErrorBody::new("the container is being moved already"))
            };
        }
        let movable = self.movable(true);
        let live = self.live.as_ref().ok_or_else(|| ErrorBody::new("the container does not run"))?;
        if !movable.yes() {
            return Err(ErrorBody::new(movable.because.join("; ")));
        }
        self.record.outgoing = Some(plan.id.clone());
        self.record.since_revision = plan.revision;
        self.shared.since(plan.revision);
        self.record.save(&self.shared.dir).map_err(chain)?;
        *locked(&self.shared.outgoing) = Some(plan.id.clone());
        self.outgoing = Some(Outgoing::start(&self.host, plan, &self.assignment.spec, live, Arc::clone(&self.shared)));
        Ok(())
    }

    /// The sending side has done its part: given everything away (and the container stands still until the verdict),
    /// or failed, with the container running.
    pub(super) async fn sending_ended(&mut self, result: Result<(), ()>) {
        if result.is_err() {
            self.forget_move();
        }
    }

    pub(super) async fn verdict(&mut self, id: &MoveId, verdict: Verdict) -> Result<(), ErrorBody> {
        if self.outgoing.as_ref().is_none_or(|o| o.id != *id) {
            return Ok(());
        }
        match verdict {
            Verdict::Resume { reason } => {
                if let Some(outgoing) = &mut self.outgoing {
                    outgoing.cancel().await;
                }
                if let Some(live) = &self.live {
                    tracing::info!(container = %self.assignment.spec.name, reason, "runs on here");
                    outgoing::thaw(&self.host, &self.assignment.spec, &live.cgroup).await?;
                }
                self.forget_move();
                Ok(())
            }
            Verdict::Release => {
                // The next `Desired` says that it is not ours and unmakes it; its processes end now.
                self.release().await
            }
        }
    }

    pub(super) async fn release(&mut self) -> Result<(), ErrorBody> {
        godwit_hold::reach("release").await;
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.given().await;
        }
        *locked(&self.shared.keeper) = None;
        self.live = None;
        self.health = None;
        self.restart_at = None;
        self.assignment.run = false;
        let errors = stop_everything(&self.host, &self.assignment.spec.id).await;
        if errors.is_empty() { Ok(()) } else { Err(ErrorBody::new(errors.join("; "))) }
    }

    pub(super) fn forget_move(&mut self) {
        self.outgoing = None;
        self.record.outgoing = None;
        *locked(&self.shared.outgoing) = None;
        self.save_record();
        if self.live.is_some() {
            self.set_state(ContainerState::Running, None);
            if !self.host.lease.may_run() {
                self.lease_ended();
            }
        } else if let Some(exit) = self.ended.take() {
            self.exited(exit);
        } else if self.assignment.run {
            // It did not survive an agent that was giving it away.
            self.restart_at = Some(Instant::now());
        }
    }
}
