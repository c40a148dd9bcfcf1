//! The host's network on real namespaces: hosts are network namespaces joined by a bridge, containers are processes
//! with namespaces of their own. Needs root.

mod isolation;
mod lab;
mod moves;
mod reach;
mod upkeep;
mod wire;
