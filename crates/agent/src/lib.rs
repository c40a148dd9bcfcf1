//! A host: one task per container alone changes it, callers queue.
//!
//! ```text
//! controller ◀══ link ══▶ Host ── supervisor ──▶ one task per container ──▶ keeper ──▶ container
//!                          ├── incoming moves (listener, TLS) ── become a task when activated
//!                          └── network, images, ledger
//! ```
//! The agent may be killed at any time: containers live on under their keepers, the next agent finds them by their
//! directories and adopts them.
#![forbid(unsafe_code)]

mod config;
mod expedite;
mod facts;
mod host;
mod join;
mod keeper;
mod laps;
mod lease;
mod ledger;
mod link;
mod movable;
mod moves;
mod run;
mod sessions;
mod sharedfiles;
mod task;
mod translate;
mod witness;

pub use config::{AgentConfig, DEFAULT_MIGRATION_PORT};
pub use run::{RunError, run};
