//! A filler in a process of its own, which outlives whoever started it: if a filler ends early, its userfaultfds close,
//! and pages that are missing in the restored processes read as zero.
//!
//! The one who received the pages (the agent) holds a [`FillerProcess`]; the process itself runs [`serve_filler`]. The
//! pages change hands as a file in memory (SCM_RIGHTS), without a copy, over a socket that is descriptor 3 of the
//! process ([`filler_control`]).
//!
//! When the process ends by itself:
//!
//! | where it is                                | the control socket closes | criu's connection closes | all restored processes are gone |
//! |---------------------------------------------|---------------------------|--------------------------|---------------------------------|
//! | no pages yet                                | ends: nobody will come    | waits for pages first    | -                               |
//! | has pages, criu has not connected           | ends: nobody will come    | -                        | -                               |
//! | criu has connected, some or all are held    | serves faults; fills once criu says that it has finished | tells RestoreFailed; ends once they are gone | ends ([`FillError::Gone`]) |
//! | [`FillerProcess::restored`] is answered     | goes on to the end        | the same as above, unless criu has finished | the same as above, unless criu has finished |
//! | criu has finished                           | goes on to the end        | expected                 | nothing is left to do: ends     |
//! | everything is filled                        | ends, has told the report | -                        | -                               |
//! | an error, processes are there               | stays, serves nothing: they stand still rather than read zeroes | - | ends |
//!
//! If the agent goes away before [`FillerProcess::restored`], nobody says where the content of shared objects belongs.
//! A criu that is driven over RPC fails then, for nobody answers its notification; the filler sees its connection
//! close. If criu goes on all the same, and there is such content, that is an error like others, after which the
//! processes stand still ([`FillError::SharedUnplaced`]).
//!
//! "Gone" is looked for twice a second. SIGHUP, SIGINT, SIGQUIT and SIGPIPE are ignored throughout, SIGTERM once there
//! are pages; the process is in a session of its own, and the kernel is asked not to choose it when memory runs out.

mod handle;
mod message;
mod serve;
mod start;

pub use handle::FillerProcess;
pub use serve::{filler_control, serve_filler};

#[cfg(doc)]
use crate::FillError;

/// The descriptor by which a process that fills is controlled.
const CONTROL: i32 = 3;
