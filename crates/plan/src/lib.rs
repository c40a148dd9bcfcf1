//! Pure decisions: which host a container goes to, what is moved where and in which order, and why. No I/O, no clock,
//! no randomness: the same [`Fleet`] always gives the same answer.
//!
//! ```text
//! Fleet (facts, kept up to date) ─▶ draft (a fleet after some moves) ─▶ rules: may it be there?
//!                                                                    └▶ rank: which of those is best?
//! place, explain · evacuate · recover · rebalance · make_room: all ask the same rules and the same rank
//! ```
//! Hard rules refuse a host: its state, memory and CPU, containers of its layer and of its groups, companions, labels,
//! and for a running container the machine. [`Score`] orders the hosts that are left.
#![forbid(unsafe_code)]

mod draft;
mod evacuate;
mod explain;
mod fleet;
mod mover;
mod place;
mod rank;
mod rebalance;
mod recover;
mod room;
mod rules;
mod search;
mod step;

pub use evacuate::{EvacuateOptions, EvacuationPlan, evacuate};
pub use explain::{Explanation, Fitting, Here};
pub use fleet::{CPU_OVERCOMMIT, Container, DEFAULT_LINK, Fleet, FleetError, Host, Machine, NO_CRIU, ZONE_LABEL};
pub use mover::Mover;
pub use place::{HostReasons, Placement, Refusal};
pub use rank::Score;
pub use rebalance::{Advice, Advised, Policy, Purpose, rebalance};
pub use recover::{RecoveryPlan, Start, recover};
pub use room::{RoomError, RoomPlan, Way, make_room};
pub use search::MAX_DISPLACED;
pub use step::{How, SETUP_MS, Stay, Step};
