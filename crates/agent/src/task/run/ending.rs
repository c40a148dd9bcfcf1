//! How a container's run ends, and what follows from it.

use godwit_container::keeper::protocol::Event;
use godwit_container::keeper::state::{self as keeper_state, Exit};
use godwit_model::container::{ContainerState, ExitStatus, RestartPolicy};
use godwit_model::event::EventKind;

use super::{Task, now_ms};
use crate::host::locked;

impl Task {
    pub(super) async fn hear(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Exited(exit)) => {
                let given_away = self.given_away("the container ended while it was being moved").await;
                self.settle().await;
                self.ended(exit, given_away);
            }
            Some(_) => {}
            // The keeper is gone, and the container with it.
            None => {
                let given_away = self.given_away("the container's keeper ended while it was being moved").await;
                let exit = keeper_state::read_exit(&self.shared.dir).ok().flatten();
                self.settle().await;
                let killed = Exit {
                    code: None,
                    signal: Some(nix::libc::SIGKILL),
                    oom_killed: false,
                    finished_at_unix_ms: now_ms(),
                };
                self.ended(exit.unwrap_or(killed), given_away);
            }
        }
    }

    /// Whether all of a container that has ended may be on another host; a move that has not come so far fails.
    async fn given_away(&mut self, why: &'static str) -> bool {
        match &mut self.outgoing {
            Some(outgoing) => outgoing.container_ended(why).await,
            None => false,
        }
    }

    /// It goes on elsewhere, if the store says so: here it starts again only when the store says that it does not.
    fn ended(&mut self, exit: Exit, given_away: bool) {
        if given_away {
            self.ended = Some(exit);
            let message = "it ended after it was given away, and waits for the controller's word on its move";
            self.set_state(ContainerState::Stopped, Some(message.to_owned()));
            return;
        }
        if self.outgoing.take().is_some() {
            self.record.outgoing = None;
            *locked(&self.shared.outgoing) = None;
            self.save_record();
        }
        self.exited(exit);
    }

    pub(super) fn exited(&mut self, exit: Exit) {
        let status = exit_status(&exit);
        let code = status.code;
        let how = match exit.signal {
            Some(signal) => format!("ended by signal {signal}"),
            None => format!("ended with exit code {code}"),
        };
        if exit.oom_killed {
            let limit = self.assignment.spec.resources.memory.map_or("the host's memory".to_owned(), |m| m.to_string());
            self.event(EventKind::ContainerOutOfMemory, format!("a process was killed at the memory limit ({limit})"));
        }
        self.event(EventKind::ContainerExited, how.clone());
        locked(&self.shared.status).exit = Some(status);
        let retries = self.record.restarts;
        let again = self.assignment.run
            && match self.assignment.spec.restart {
                RestartPolicy::No => false,
                RestartPolicy::OnFailure { max_retries } => code != 0 && max_retries.is_none_or(|max| retries < max),
                RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
            };
        if again {
            self.record.restarts += 1;
            self.save_record();
            self.schedule_restart();
            self.set_state(ContainerState::Restarting, Some(how));
        } else {
            self.set_state(ContainerState::Stopped, Some(how));
        }
    }
}

pub(super) fn exit_status(exit: &Exit) -> ExitStatus {
    ExitStatus {
        code: exit.code.unwrap_or_else(|| 128 + exit.signal.unwrap_or(0)),
        signal: exit.signal,
        oom_killed: exit.oom_killed,
        finished_at_ms: exit.finished_at_unix_ms,
    }
}
