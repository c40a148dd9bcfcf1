//! `godwit workload …`: servers and clients that check themselves, for tests and for the demonstration.

use std::process::ExitCode;

use anyhow::Result;
use godwit_lab::workload::{self, WorkloadCommand};

use super::DONE;

/// To be called while this is the only thread: clients measure on threads of their own, and a runtime's would share
/// the processor with them.
pub fn run(command: WorkloadCommand) -> Result<u8> {
    let code = workload::run(command, &["workload"])?;
    Ok(if code == ExitCode::SUCCESS { DONE } else { 1 })
}
