//! What a container's task does at the end of the host's lease: its keeper has stopped the container, this tells it.

use godwit_api::types::ErrorBody;
use godwit_container::keeper::protocol::Request;
use godwit_model::container::ContainerState;
use tokio::time::Instant;

use super::Task;

const WAITS: &str = "the host's lease has ended; it goes on when the controller says that it is still here";

impl Task {
    pub(super) fn lease_ended(&mut self) {
        // It goes on already, and this word is late.
        if self.host.lease.may_run() {
            return;
        }
        self.fenced = self.live.is_some();
        if self.fenced {
            self.set_state(ContainerState::Frozen, Some(WAITS.to_owned()));
        }
    }

    /// Instead of a start.
    pub(super) fn wait_for_lease(&mut self) {
        self.start_by_lease = true;
        self.set_state(ContainerState::Preparing, Some(WAITS.to_owned()));
    }

    /// What is not the host's any more is told so otherwise, and does not get here: it goes.
    pub(super) async fn lease_known(&mut self) {
        if std::mem::take(&mut self.start_by_lease) && self.live.is_none() && self.assignment.run {
            self.restart_at = Some(Instant::now());
        }
        self.fenced = false;
        let Some(live) = &self.live else { return };
        match live.keeper.call(Request::Unfence, "unfence").await {
            // One that is being given away waits for the verdict, in whatever state it is.
            Ok(_) if self.outgoing.is_none() => self.set_state(ContainerState::Running, None),
            Ok(_) => {}
            Err(error) => {
                let error = ErrorBody::from_chain(&error).one_line();
                tracing::error!(container = %self.assignment.spec.name, error, "it does not go on");
                self.fenced = true;
                self.set_state(ContainerState::Frozen, Some(error));
            }
        }
    }
}
