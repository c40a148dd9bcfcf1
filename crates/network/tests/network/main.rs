//! The host's network on real namespaces: hosts are network namespaces joined by a bridge, containers are processes
//! with namespaces of their own. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod aborts;
mod isolation;
mod lab;
mod moves;
mod reach;
mod talk;
mod upkeep;
mod wire;
