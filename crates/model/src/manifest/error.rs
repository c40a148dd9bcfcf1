//! What is wrong with a file, and where.

use std::cell::RefCell;
use std::fmt;

/// Most errors that one parse reports.
pub const MAX_ERRORS: usize = 20;

/// One thing wrong in a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestError {
    pub file: String,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// Where in the document, as in `services.db.ports[1]`; empty for the document itself.
    pub path: String,
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ManifestError {}

/// Everything wrong in a manifest, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestErrors {
    /// At least one, at most [`MAX_ERRORS`].
    pub errors: Vec<ManifestError>,
    /// How many more there are.
    pub left_out: usize,
}

impl fmt::Display for ManifestErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.errors.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        match self.left_out {
            0 => Ok(()),
            more => write!(f, "\n… and {more} more"),
        }
    }
}

impl std::error::Error for ManifestErrors {}

/// A place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub line: usize,
    pub column: usize,
}

/// Collects errors while the rest of the file is still being read.
#[derive(Debug)]
pub(super) struct Report {
    file: String,
    errors: RefCell<Vec<ManifestError>>,
}

impl Report {
    pub fn new(file: &str) -> Self {
        Self { file: file.to_owned(), errors: RefCell::new(Vec::new()) }
    }

    pub fn add(&self, place: Place, path: &str, message: impl Into<String>, hint: Option<String>) {
        let error = ManifestError {
            file: self.file.clone(),
            line: place.line,
            column: place.column,
            path: path.to_owned(),
            message: message.into(),
            hint,
        };
        let mut errors = self.errors.borrow_mut();
        // A fragment that several services share is wrong once per service; that is told with each path.
        if !errors.contains(&error) {
            errors.push(error);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.errors.borrow().is_empty()
    }

    /// The first errors of the file. An invariant of the caller: there is at least one.
    pub fn finish(self) -> ManifestErrors {
        let mut errors = self.errors.into_inner();
        errors.sort_by_key(|e| (e.line, e.column));
        let left_out = errors.len().saturating_sub(MAX_ERRORS);
        errors.truncate(MAX_ERRORS);
        ManifestErrors { errors, left_out }
    }
}
