//! The real binary on real kernels: a controller, agents, containers and clients in a lab. Needs root and CRIU.
//!
//! Each test owns a lab of its own name, and fails if anything of it is left when it is down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod balance;
mod environments;
mod evacuation;
mod failure;
mod faults;
mod isolation;
mod many;
mod movable;
mod moves;
mod postcopy;
mod room;
mod rules;
mod scenario;
mod sending;
mod site;
mod table;
mod world;
