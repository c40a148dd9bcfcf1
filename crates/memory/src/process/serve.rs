//! The process's end.

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::filler::FillError;

/// Takes the control connection (descriptor 3) that [`FillerProcess::start`](super::FillerProcess::start) gave this
/// process. Once.
pub fn filler_control() -> Result<OwnedFd, FillError> {
    Err(FillError::Cancelled)
}

/// Fills one restore; the body of a process of its own.
pub fn serve_filler(control: OwnedFd, work_directory: &Path) -> Result<(), FillError> {
    let _ = (control, work_directory);
    Err(FillError::Cancelled)
}
