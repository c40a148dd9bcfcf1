//! What was seen.

use serde::{Deserialize, Serialize};

/// What happened so often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    pub events: u64,
    pub hosts_failed: u64,
    pub hosts_cut_off: u64,
    pub hosts_returned: u64,
    pub evacuations: u64,
    pub evacuated: u64,
    pub containers_added: u64,
    pub containers_removed: u64,
    pub restarts: u64,
    pub moves: u64,
    pub moves_to_evacuate: u64,
    pub moves_to_make_room: u64,
    pub moves_to_balance: u64,
    pub moves_failed: u64,
    /// Steps that were not begun because the fleet had changed, or what they waited for had failed.
    pub steps_dropped: u64,
    pub grown: u64,
    pub growth_refused: u64,
    pub flaps: u64,
}

/// One virtual hour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hour {
    /// The first is 1.
    pub hour: u32,
    pub hosts_active: usize,
    pub containers: usize,
    pub running: usize,
    /// Without a host, because none takes them, or because their volumes are away.
    pub waiting: usize,
    /// Containers on one host with another of their layer, though they are to be spread.
    pub doubled: usize,
    pub moves: u64,
    pub restarts: u64,
    pub hosts_failed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub hosts: u32,
    pub containers: usize,
    pub seed: u64,
    pub hours: u32,
    pub counts: Counts,
    /// In any one hour.
    pub most_moves_per_hour: u64,
    pub mean_moves_per_hour: u64,
    /// Of what had a place to go to, in virtual milliseconds.
    pub longest_down_ms: u64,
    /// Of what had to wait for room or for its volumes, in virtual milliseconds.
    pub longest_wait_ms: u64,
    /// Containers on one host with another of their layer at the end, where no other host would do better.
    pub doubled_at_end: usize,
    pub waiting_at_end: usize,
    /// Of everything that was decided, so that two runs can be compared.
    pub fingerprint: u64,
}
