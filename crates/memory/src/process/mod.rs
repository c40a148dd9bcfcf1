//! A filler in a process of its own, which outlives whoever started it.
//!
//! The one who received the pages (the agent) holds a [`FillerProcess`]; the process itself runs [`serve_filler`].

mod handle;
mod serve;

pub use handle::FillerProcess;
pub use serve::{filler_control, serve_filler};
