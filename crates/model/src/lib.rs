//! The vocabulary of Godwit: typed ids, units, hosts, environments, layers, containers, moves, the manifest.
//!
//! Nothing in here does I/O, reads a clock or spawns anything. Every other crate speaks these words.
#![forbid(unsafe_code)]

pub mod container;
pub mod event;
pub mod host;
pub mod ids;
pub mod label;
pub mod manifest;
pub mod migration;
pub mod network;
pub mod units;

pub use ids::{ContainerId, ContainerName, EnvName, Generation, HostName, LayerName, MoveId, NameError};
pub use units::{Bytes, Cloudlets, MilliCpu, UnitError};
