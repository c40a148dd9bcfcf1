//! A container that stands still for a moment while it is copied, so that its memory can be looked at.

use std::io;
use std::sync::Mutex;

use godwit_container::Cgroup;
use godwit_container::cgroup::CgroupError;
use godwit_memory::Pause;

use crate::host::locked;

/// Such moments of one move. Nothing else is touched: what comes in meanwhile waits in the container's sockets.
pub(super) struct Standstill {
    cgroup: Cgroup,
    over: Mutex<bool>,
}

/// Lets the container go on, whatever happens.
struct Thaw<'a>(Option<&'a Cgroup>);

impl Thaw<'_> {
    fn now(mut self) -> Result<(), CgroupError> {
        self.0.take().map_or(Ok(()), Cgroup::thaw)
    }
}

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(Cgroup::thaw) {
            tracing::error!(%error, "a container that stood still for a look at its memory does not go on");
        }
    }
}

impl Standstill {
    pub(super) fn new(cgroup: Cgroup) -> Self {
        Self { cgroup, over: Mutex::new(false) }
    }

    /// Waits for one that is under way, and lets none follow: a reader that is late must not thaw what others have frozen.
    /// Blocks.
    pub(super) fn end(&self) {
        *locked(&self.over) = true;
    }
}

impl Pause for Standstill {
    fn still(&self, work: &mut dyn FnMut()) -> io::Result<()> {
        let over = locked(&self.over);
        if *over {
            return Err(io::Error::other("nothing of this move's is copied any more"));
        }
        self.cgroup.freeze().map_err(io::Error::other)?;
        let thaw = Thaw(Some(&self.cgroup));
        godwit_hold::stop_at("look");
        work();
        thaw.now().map_err(io::Error::other)
    }
}
