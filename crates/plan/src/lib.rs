//! Pure decisions: which host a container goes to, and why not the others. No I/O, no clock, no randomness: the same
//! [`View`] and [`Request`] always give the same answer.
//!
//! Hard rules refuse a host: it must be active and connected, have room for what the container reserves, and, for a
//! layer that is spread strictly, hold no other container of that layer. Among the hosts left, the one is taken
//! that has the fewest containers of the layer, then the fewest of the environment, then most room.
#![forbid(unsafe_code)]

mod place;
mod view;

pub use place::{HostReasons, Placement, Refusal, check, place};
pub use view::{CPU_OVERCOMMIT, HostView, Placed, Request, View};
