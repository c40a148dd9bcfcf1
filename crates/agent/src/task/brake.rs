//! What limits a container's processor time right now: its specification, or a move that slows it down.

use std::sync::Mutex;

use godwit_container::Cgroup;
use godwit_container::cgroup::CgroupError;
use godwit_container::spec::Resources;

use crate::host::locked;

/// The one place where a running container's limits are set, so that a resize in the middle of a move neither ends the
/// slowing nor is lost by its end.
pub struct Brake {
    state: Mutex<State>,
}

struct State {
    wanted: Resources,
    /// What it is slowed down to, in thousandths of a core.
    slowed: Option<u64>,
}

impl Brake {
    pub fn new(wanted: Resources) -> Self {
        Self { state: Mutex::new(State { wanted, slowed: None }) }
    }

    /// The container's limits are these from now on.
    pub fn assign(&self, cgroup: &Cgroup, wanted: Resources) -> Result<(), CgroupError> {
        let mut state = locked(&self.state);
        state.wanted = wanted;
        cgroup.set(&state.wanted)?;
        match state.slowed {
            Some(millis) => cgroup.slow_cpu(state.at_most(millis)),
            None => Ok(()),
        }
    }

    /// It gets no more than this until [`Brake::release`], in thousandths of a core.
    pub fn slow(&self, cgroup: &Cgroup, millis: u64) -> Result<(), CgroupError> {
        let mut state = locked(&self.state);
        cgroup.slow_cpu(state.at_most(millis))?;
        state.slowed = Some(millis);
        Ok(())
    }

    /// It gets what its specification says, also where an earlier agent has slowed it down.
    pub fn release(&self, cgroup: &Cgroup) -> Result<(), CgroupError> {
        let mut state = locked(&self.state);
        cgroup.set_cpu(state.wanted.cpu_millis)?;
        state.slowed = None;
        Ok(())
    }

    pub fn is_slowed(&self) -> bool {
        locked(&self.state).slowed.is_some()
    }
}

impl State {
    fn at_most(&self, millis: u64) -> u64 {
        self.wanted.cpu_millis.map_or(millis, |most| most.min(millis))
    }
}
