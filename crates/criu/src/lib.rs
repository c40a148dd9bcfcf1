//! CRIU driven directly by its RPC: dump, restore, page server; no command line in the middle of a downtime.
//!
//! A [`Session`] is one `criu swrk` process and the socket to it. The protocol is CRIU's `rpc.proto` (one protobuf
//! message per SOCK_SEQPACKET packet; notifications come between the request and its answer, and each waits for our
//! word). We keep our own message structs: field numbers are facts, no file of CRIU's is copied.
//!
//! Invariant: a session's process never outlives it. Dropping a [`Session`] kills and reaps the process; what it may
//! leave behind (mounts under its work directory) is named by the owner of that directory.

mod binary;
mod options;
mod proto;
mod session;

pub use binary::{Criu, FindError, Version};
pub use options::{CgroupRoot, Directories, DumpOptions, ExternalMount, PageServerOptions, RestoreOptions, StdioPipe};
pub use session::{Ends, Message, PassedFd, Session, SessionError};
