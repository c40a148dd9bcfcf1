//! The controller as its clients meet it: through `run`, over the unix socket and TLS, with agents that are played.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod agents;
mod balance;
mod controller;
mod people;
mod phases;
mod plans;
mod room;
mod rules;
mod sessions;
mod watch;
