//! Messages of agents, controllers and sessions: mutated and random text never panics, and is refused with a sentence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use godwit_api::link::{FromAgent, FromController, Request};
use godwit_api::session::{ExecControl, LogLine, LogStream};
use godwit_api::types::{ErrorBody, JoinRequest, MigrateRequest};
use godwit_model::MoveId;
use godwit_model::migration::Phase;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Decodes as its reader does; what is taken is said again in a form that is taken again.
fn decode<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    match serde_json::from_slice::<T>(bytes) {
        Ok(value) => drop(serde_json::from_slice::<T>(&serde_json::to_vec(&value).unwrap()).unwrap()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn decode_all(bytes: &[u8]) {
    decode::<FromAgent>(bytes);
    decode::<FromController>(bytes);
    decode::<Request>(bytes);
    decode::<ExecControl>(bytes);
    decode::<LogLine>(bytes);
    decode::<ErrorBody>(bytes);
    decode::<JoinRequest>(bytes);
    decode::<MigrateRequest>(bytes);
}

fn valid() -> Vec<Vec<u8>> {
    let id: MoveId = "d0d0d0d0d0d0".parse().unwrap();
    let error = ErrorBody::new("no").with_hint("yes");
    let failed = FromAgent::MoveFailed { id: id.clone(), phase: Phase::HandOver, error: error.clone() };
    let ready = FromAgent::MoveReady {
        id,
        parts: vec![],
        since_freeze_ms: 80.5,
        bytes_received: 7,
        memory_bytes: 5,
        file_bytes: 2,
        rounds: 3,
        slowed_to_percent: Some(25),
        paused_ms: Some(12.5),
        late_bytes: 1 << 20,
        stood_still: None,
    };
    let line = LogLine { at_ms: 1, stream: LogStream::Stderr, text: "\u{1b}[0m".into() };
    let request = serde_json::json!({"to": "h2", "options": {"mode": "pre-copy", "max_downtime_ms": 100}});
    [
        serde_json::to_vec(&failed),
        serde_json::to_vec(&ready),
        serde_json::to_vec(&FromController::Refused { error }),
        serde_json::to_vec(&FromController::Desired(Box::default())),
        serde_json::to_vec(&ExecControl::Exit { code: -1 }),
        serde_json::to_vec(&line),
        serde_json::to_vec(&request),
    ]
    .map(Result::unwrap)
    .into()
}

#[test]
fn what_is_valid_is_read() {
    let all = valid();
    assert!(serde_json::from_slice::<FromAgent>(&all[0]).is_ok());
    assert!(serde_json::from_slice::<FromAgent>(&all[1]).is_ok());
    assert!(serde_json::from_slice::<FromController>(&all[3]).is_ok());
    assert!(serde_json::from_slice::<MigrateRequest>(&all[6]).is_ok());
    all.iter().for_each(|bytes| decode_all(bytes));
}

/// An older destination says nothing of how memory was copied.
#[test]
fn a_word_that_older_agents_do_not_say_may_be_missing() {
    let mut ready: serde_json::Value = serde_json::from_slice(&valid()[1]).unwrap();
    ready.as_object_mut().unwrap().remove("stood_still").unwrap();
    assert!(serde_json::from_value::<FromAgent>(ready).is_ok());
}

/// A person's message may be nested as deep as it is long: it is refused, not followed to the end of the stack.
#[test]
fn deep_nesting_is_refused() {
    decode_all("[".repeat(1 << 20).as_bytes());
    decode_all("{\"a\":".repeat(1 << 18).as_bytes());
}

proptest! {
    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        decode_all(&bytes);
    }

    #[test]
    fn damaged_messages_are_refused_or_read(
        which in 0..valid().len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..8),
    ) {
        let mut bytes = valid().swap_remove(which);
        for (at, value, what) in changes {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match what {
                0 => bytes[at] = value,
                1 => {
                bytes.remove(at);
            }
                _ => bytes.insert(at, value),
            }
        }
        decode_all(&bytes);
    }
}
