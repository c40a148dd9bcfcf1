//! The move: wire protocol, source and destination as mirror images.
//!
//! One TLS 1.3 connection between two agents carries a move; [`wire`] draws the sequence. The crate knows nothing of
//! the controller or of containers' insides: what to freeze, dump, restore and activate is behind [`Workload`] (source)
//! and [`Landing`] (destination), which the agent implements.
//!
//! Contract of the source: **paused on success, resumed on failure.** Until it has sent `Final`, every error thaws the
//! container and is reported; after `Final` it stays frozen until the agent is told by the store's verdict, because the
//! destination may own the container by then.
#![forbid(unsafe_code)]

pub mod converge;
pub mod destination;
pub mod files;
pub mod memory;
pub mod pace;
pub mod packing;
pub mod pages;
pub mod source;
pub mod wire;

pub use destination::{Arrival, Following, Landing, Offered, ReceiveError, Received, arrival, receive};
pub use source::{SendError, Sent, Workload, send};
