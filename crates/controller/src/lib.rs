//! What decides: the API's implementation, reconcilers that take no input, the saga of a move.
//!
//! ```text
//!  people ──▶ http ──▶ apply, balance, hosts, moves, … ──▶ state (snapshot + transactions) ──▶ store
//!                                                     │ every change wakes
//!                       links (one per agent) ◀───────┼── desired: what each host shall be
//!                          │ reports                  └── reconcile: place, collect, resume moves
//!                          └──────────────────────────────▲
//! ```
//! Nothing in here touches a host: agents do, told by [`links`].
#![forbid(unsafe_code)]

pub mod apply;
mod balance;
pub mod containers;
mod core;
mod desired;
mod hosts;
mod http;
mod leases;
mod links;
mod loads;
mod moves;
mod plans;
mod reconcile;
mod run;
pub mod state;

pub use run::{ControllerConfig, RunError, run};
