//! Grace periods of the kernel's RCU, shortened while a container stands still.
//!
//! Unplugging a port, making and dropping mounts and namespaces each wait for the kernel to be sure that nobody looks at
//! the old state any more: some 5 to 15 ms each, several times per dump and restore. `/sys/kernel/rcu_expedited`
//! (Documentation/admin-guide/kernel-parameters, rcupdate.rcu_expedited) makes these waits a fraction of a millisecond,
//! at the price of an interrupt on every processor for each. So it is set for the tenths of a second of a move's frozen
//! part only, and put back as it was; a file in the agent's directory remembers it in case the agent is killed.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::host::locked;

const SWITCH: &str = "/sys/kernel/rcu_expedited";
const MARK: &str = "rcu-expedited";

/// Counts who needs it.
pub struct Expedite {
    mark: PathBuf,
    users: Mutex<usize>,
}

/// Short grace periods as long as it lives.
pub struct Expedited {
    owner: std::sync::Arc<Expedite>,
}

impl Expedite {
    /// Puts right what an agent that was killed has left.
    pub fn new(state_dir: &Path) -> Self {
        let this = Self { mark: state_dir.join(MARK), users: Mutex::new(0) };
        if this.mark.exists() {
            this.put_back();
        }
        this
    }

    pub fn begin(self: &std::sync::Arc<Self>) -> Expedited {
        let mut users = locked(&self.users);
        *users += 1;
        if *users == 1 {
            self.set();
        }
        Expedited { owner: std::sync::Arc::clone(self) }
    }

    /// A kernel that does not let us only makes the pause longer.
    fn set(&self) {
        let off = std::fs::read_to_string(SWITCH).is_ok_and(|now| now.trim() == "0");
        if off && std::fs::write(&self.mark, "").is_ok() && std::fs::write(SWITCH, "1").is_err() {
            let _ = std::fs::remove_file(&self.mark);
        }
    }

    fn put_back(&self) {
        if self.mark.exists() {
            let _ = std::fs::write(SWITCH, "0");
            let _ = std::fs::remove_file(&self.mark);
        }
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        let mut users = locked(&self.owner.users);
        *users -= 1;
        if *users == 0 {
            self.owner.put_back();
        }
    }
}
