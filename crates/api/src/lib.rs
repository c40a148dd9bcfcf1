//! The HTTP API as types and routes, its client, and the link between agent and controller.
//!
//! Two audiences, one server: people and programs use the routes in [`routes`]; agents dial in over mutual TLS and
//! keep one WebSocket open (see [`link`]). Nothing ever dials an agent except another agent that moves a container.
#![forbid(unsafe_code)]

pub mod client;
pub mod link;
pub mod listen;
pub mod routes;
pub mod session;
pub mod tls;
pub mod types;
