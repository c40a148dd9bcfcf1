//! Errors as people see them: the sentence, its causes, the way out; and the exit code.

use std::io;
use std::process::ExitCode;

use godwit_api::client::ClientError;
use godwit_model::manifest::ManifestErrors;

use crate::human;
use crate::printer::{Printer, StdoutError};

/// An error of a verb with a way out.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Prints an error once and gives the exit code.
pub fn report(printer: &Printer, error: &anyhow::Error) -> ExitCode {
    if pipe_is_closed(error) {
        return ExitCode::SUCCESS;
    }
    if let Some(manifest) = error.downcast_ref::<ManifestErrors>() {
        report_manifest(printer, manifest);
        return ExitCode::FAILURE;
    }
    let mut hints = Vec::new();
    for (depth, cause) in error.chain().enumerate() {
        let text = cause.to_string();
        printer.labelled(if depth == 0 { "error" } else { "  caused by" }, &text);
        if let Some(client) = cause.downcast_ref::<ClientError>() {
            if let ClientError::Api { body, .. } = client {
                body.causes.iter().for_each(|cause| printer.labelled("  caused by", cause));
            }
            hints.extend(client.hint());
        }
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            hints.extend(failure.hint.clone());
        }
    }
    hints.iter().for_each(|hint| printer.labelled("hint", hint));
    ExitCode::FAILURE
}

/// Each as `file:line:column: …`, so that editors find the place.
fn report_manifest(printer: &Printer, manifest: &ManifestErrors) {
    for error in &manifest.errors {
        let path = if error.path.is_empty() { String::new() } else { format!("{}: ", error.path) };
        printer
            .labelled("error", format_args!("{}:{}:{}: {path}{}", error.file, error.line, error.column, error.message));
        if let Some(hint) = &error.hint {
            printer.labelled("hint", hint);
        }
    }
    if manifest.left_out > 0 {
        printer.say(format_args!("… and {}", human::count(manifest.left_out, "more error")));
    }
}

/// Whoever read our standard output has enough: `godwit ps | head -1`.
fn pipe_is_closed(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<StdoutError>())
        .any(|StdoutError(error)| error.kind() == io::ErrorKind::BrokenPipe)
}
