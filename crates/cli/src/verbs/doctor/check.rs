//! The outcome of one check.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Ok,
    Missing,
    TooOld,
    /// Works without, less well.
    Warning,
    /// Could not be tried; another check says why.
    NotChecked,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::TooOld => "too old",
            Self::Warning => "warning",
            Self::NotChecked => "not checked",
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub what: &'static str,
    pub purpose: &'static str,
    pub state: State,
    pub found: String,
    pub way_out: Option<String>,
}

impl Check {
    /// Something needed is not there.
    pub fn lacks(&self) -> bool {
        matches!(self.state, State::Missing | State::TooOld)
    }
}

/// A requirement before it was looked at.
#[derive(Debug, Clone, Copy)]
pub struct Requirement {
    what: &'static str,
    purpose: &'static str,
}

/// `what` is needed for `purpose`.
pub const fn need(what: &'static str, purpose: &'static str) -> Requirement {
    Requirement { what, purpose }
}

impl Requirement {
    pub fn ok(self, found: impl Into<String>) -> Check {
        self.check(State::Ok, found, None)
    }

    pub fn missing(self, found: impl Into<String>, way_out: impl Into<String>) -> Check {
        self.check(State::Missing, found, Some(way_out.into()))
    }

    pub fn too_old(self, found: impl Into<String>, way_out: impl Into<String>) -> Check {
        self.check(State::TooOld, found, Some(way_out.into()))
    }

    pub fn warning(self, found: impl Into<String>, way_out: impl Into<String>) -> Check {
        self.check(State::Warning, found, Some(way_out.into()))
    }

    pub fn not_checked(self, why: impl Into<String>) -> Check {
        self.check(State::NotChecked, why, None)
    }

    fn check(self, state: State, found: impl Into<String>, way_out: Option<String>) -> Check {
        Check { what: self.what, purpose: self.purpose, state, found: found.into(), way_out }
    }
}

/// How things are got on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Ways {
    has_recipe: bool,
}

impl Ways {
    /// By the operating system's own description, os-release(5).
    pub fn of_this_machine() -> Self {
        let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            Some(line.trim_matches('"').to_owned())
        };
        let supported = matches!(field("VERSION_ID").as_deref(), Some("12" | "13"));
        Self { has_recipe: supported && field("ID").as_deref() == Some("debian") }
    }

    /// `./dev setup` on systems it knows; elsewhere as given.
    pub fn or(self, elsewhere: impl Into<String>) -> String {
        if self.has_recipe { "./dev setup".to_owned() } else { elsewhere.into() }
    }
}

/// An error and its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
