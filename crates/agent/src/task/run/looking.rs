//! What is seen of a container from outside: its health, whether it can move, what it uses.

use godwit_model::container::{Health, Movable};
use godwit_model::event::EventKind;

use super::Task;
use crate::host::locked;
use crate::movable;

impl Task {
    pub(super) fn judge(&mut self, (health, why): (Health, String)) {
        let before = locked(&self.shared.status).health.replace(health);
        if before != Some(health) {
            self.event(EventKind::HealthChanged, why);
            self.host.changed.notify_one();
        }
    }

    /// Whether the container can be moved as it is; where looking is expensive, as it was a while ago unless `now`.
    pub(super) fn movable(&mut self, now: bool) -> Movable {
        let Some(live) = &self.live else { return Movable::default() };
        let sessions = self.shared.exec_sessions();
        let mut because = movable::by_specification(&self.assignment.spec, self.host.criu.is_some(), sessions);
        // A move looks into its processes itself.
        if self.outgoing.is_none()
            && let Ok(pids) = live.cgroup.pids()
        {
            // Programs may have very many files open.
            because.extend(tokio::task::block_in_place(|| self.looker.look(live.pid, &pids, now)));
        }
        Movable { because }
    }

    /// Usage and movability, for the next status.
    pub(super) fn measure(&mut self, now: bool) {
        let movable = self.movable(now);
        let Some(live) = &self.live else { return };
        let mut status = locked(&self.shared.status);
        if let Ok(usage) = live.cgroup.usage() {
            status.memory = Some(godwit_model::Bytes(usage.memory_bytes));
            status.working_set = Some(godwit_model::Bytes(usage.working_set_bytes));
            status.cpu_usec = Some(usage.cpu_usec);
        }
        status.movable = movable;
    }
}
