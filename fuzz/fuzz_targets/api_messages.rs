//! What agents, controllers and people say to each other, as JSON.
#![no_main]

use godwit_api::link::{FromAgent, FromController};
use godwit_api::session::{ExecControl, LogLine};
use godwit_api::types::{ApplyRequest, JoinRequest, MigrateRequest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = serde_json::from_slice::<FromAgent>(bytes);
    let _ = serde_json::from_slice::<FromController>(bytes);
    let _ = serde_json::from_slice::<ExecControl>(bytes);
    let _ = serde_json::from_slice::<LogLine>(bytes);
    let _ = serde_json::from_slice::<ApplyRequest>(bytes);
    let _ = serde_json::from_slice::<JoinRequest>(bytes);
    let _ = serde_json::from_slice::<MigrateRequest>(bytes);
});
