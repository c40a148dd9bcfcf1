//! Is there memory here for a container that is to arrive?

use godwit_api::types::ErrorBody;
use godwit_model::units::Bytes;

use crate::facts;
use crate::host::Host;

/// Beyond the container's own: criu, what it writes, and page tables, in bytes.
const BESIDES: u64 = 32 << 20;

/// How memory comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// In rounds, past CRIU: a page is given back here as soon as it is at its place.
    InRounds,
    /// As CRIU's images, which are there until everything is restored.
    Streamed,
}

/// Whether a container that uses `memory` now can arrive. An eighth more is for what it takes meanwhile.
pub fn enough(host: &Host, memory: Bytes, way: Way) -> Result<(), ErrorBody> {
    let free = facts::free_memory(&host.config.cgroup_parent);
    let needed = needed(memory, way);
    if needed <= free {
        return Ok(());
    }
    let why = match way {
        Way::InRounds => "",
        Way::Streamed => ", because it is copied while it stands still",
    };
    Err(ErrorBody::new(format!(
        "{free} of memory is free, and a container that uses {memory} needs {needed} to arrive{why}"
    )))
}

fn needed(memory: Bytes, way: Way) -> Bytes {
    let own = memory.0.saturating_add(memory.0 / 8);
    let images = if way == Way::Streamed { memory.0 } else { 0 };
    Bytes(own.saturating_add(images).saturating_add(BESIDES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_rounds_is_there_once() {
        assert_eq!(needed(Bytes::mib(800), Way::InRounds), Bytes::mib(932));
        assert_eq!(needed(Bytes::mib(800), Way::Streamed), Bytes::mib(1732));
        assert_eq!(needed(Bytes(u64::MAX), Way::Streamed), Bytes(u64::MAX));
    }
}
