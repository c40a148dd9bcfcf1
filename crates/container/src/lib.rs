//! One container on one host: root file system, namespaces, cgroup v1 and v2, seccomp,
//! process, stdio, keeper.
//!
//! ```text
//!  agent (tokio, may die) ──unix socket, JSON lines + fds──▶ keeper (one thread, synchronous)
//!                                                             │ parent of, reaps, holds stdio of
//!                                                             ▼
//!                                                        container's pid 1
//! ```
//! A container's directory on the host (`dir` everywhere in this crate) holds:
//!
//! | name | what | written by |
//! |---|---|---|
//! | `spec.json` | [`spec::LaunchSpec`] | agent, before the keeper starts |
//! | `state.json` | [`keeper::state::State`]: pid, start times, stdio pipe inodes | keeper |
//! | `exit.json` | [`keeper::state::Exit`] | keeper, when pid 1 is gone |
//! | `keeper.sock`, `keeper.log` | the keeper's socket and its own messages | keeper |
//! | `log/` | what the container wrote to stdout and stderr ([`log`]) | keeper |
//! | `upper/`, `work/`, `rootfs/` | the overlay ([`rootfs`]) | agent |
//! | `dev/`, `empty/` | sources of bind mounts ([`mounts`]) | keeper |
//!
//! The keeper is the only process that clones; it has one thread, so ordinary code may run
//! between clone and exec.

pub mod cgroup;
mod init;
pub mod keeper;
pub mod log;
pub mod mounts;
pub mod rootfs;
pub mod seccomp;
pub mod spec;
mod sys;
pub mod user;

pub use cgroup::Cgroup;
pub use init::files::NETWORK_SETTINGS;
pub use keeper::client::{KeeperClient, KeeperEvent};
pub use keeper::keeper_main;
pub use mounts::{ExternalMount, external_mounts};
pub use rootfs::{RootFs, copy_image_dir_to_volume, remove_dir_all_no_xdev};
pub use spec::LaunchSpec;
pub use sys::start_time_ticks;
pub use user::resolve_user;
