//! What a container wrote to stdout and stderr.
//!
//! `dir/log/container.log` is the newest file, `container.log.1` the one before, and so on. One
//! line of output is one line of the file, in the format of the Kubernetes container runtimes:
//! ```text
//! 2026-11-24T04:14:39.123456789Z stdout F Ready to accept connections
//! ```
//! time, stream, `F` for a full line or `P` for a part of one that was too long, text.

mod reader;
mod writer;

use std::path::{Path, PathBuf};

pub use reader::{LogFollower, LogLine, ReadLogError, read_logs};
pub use writer::LogWriter;

/// Longest piece of a line that is kept together.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

/// One of a program's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

fn log_dir(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// File number `age`, 0 being the current one.
fn log_file(dir: &Path, age: u32) -> PathBuf {
    match age {
        0 => log_dir(dir).join("container.log"),
        age => log_dir(dir).join(format!("container.log.{age}")),
    }
}
