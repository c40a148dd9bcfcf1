//! Between which machines a running program can move.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Processor features whose absence is told by name; the rest is counted.
const NAMED_FEATURES: usize = 5;

/// The line of CRIU's versions of a host that has none: nothing moves to it.
pub const NO_CRIU: &str = "none";

/// What of a host decides whether a running container can come from it or go to it. Two equal machines always can.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Machine {
    pub architecture: String,
    /// The line of CRIU's versions whose images it reads, for example `4`, or [`NO_CRIU`]; `None`: not told, which
    /// refuses nothing.
    pub criu_line: Option<String>,
    pub features: BTreeSet<String>,
}

impl Machine {
    /// What speaks against moving a running container from here `to` there, as sentences; empty: nothing.
    pub fn refuses(&self, to: &Self) -> Vec<String> {
        let mut because = Vec::new();
        if self.architecture != to.architecture {
            because.push(format!("it is {} and the source is {}", to.architecture, self.architecture));
        }
        match (&self.criu_line, &to.criu_line) {
            (_, Some(line)) if line == NO_CRIU => {
                because.push("it has no usable CRIU; `godwit doctor` there says why".to_owned());
            }
            (Some(ours), Some(theirs)) if ours != theirs => {
                because.push(format!("it has CRIU {theirs} and the source has {ours}: their images differ"));
            }
            _ => {}
        }
        let missing: Vec<&str> = self.features.difference(&to.features).map(String::as_str).collect();
        if !missing.is_empty() {
            let named = missing[..missing.len().min(NAMED_FEATURES)].join(", ");
            let more = missing.len().saturating_sub(NAMED_FEATURES);
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            because.push(format!("its processor lacks {named}{more}, which the source has"));
        }
        because
    }
}
