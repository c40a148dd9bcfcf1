//! Why a container goes where it goes: every host, with what speaks against it or for it.

use std::fmt;

use godwit_model::{ContainerName, HostName};
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::fleet::{Container, Fleet};
use crate::place::HostReasons;
use crate::rank::Score;
use crate::rules::Ask;

/// A host that could take the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fitting {
    pub host: HostName,
    pub score: Score,
}

/// What a decision about one container was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub container: ContainerName,
    /// Where it is now.
    pub home: Option<HostName>,
    /// Why it cannot move live; empty: it can.
    pub unmovable: Vec<String>,
    /// The best first.
    pub fitting: Vec<Fitting>,
    /// In order of names.
    pub out: Vec<HostReasons>,
}

/// How the host that a container is on looks by what other hosts are judged by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Here {
    pub score: Score,
    /// Rules that do not hold there, as sentences: they were given, or something went away, after it had come.
    pub broken: Vec<String>,
}

impl Fleet {
    /// Looks at every host as a new start of the container would: its own host counts like any other.
    pub fn explain(&self, container: &Container) -> Explanation {
        Draft::new(self).explanation(&Ask::start(self, container))
    }
}

impl Draft<'_> {
    pub fn explanation(&self, ask: &Ask<'_>) -> Explanation {
        let (mut fitting, mut out) = (Vec::new(), Vec::new());
        for (name, id) in &self.fleet.host_ids {
            let reasons = self.reasons_against(*id, ask);
            if reasons.is_empty() {
                fitting.push(Fitting { host: name.clone(), score: self.score(*id, ask) });
            } else {
                out.push(HostReasons { host: name.clone(), reasons });
            }
        }
        fitting.sort_by(|a, b| (&a.score, &a.host).cmp(&(&b.score, &b.host)));
        Explanation {
            container: ask.container.name.clone(),
            home: self.fleet.home(&ask.container.name).cloned(),
            unmovable: ask.container.unmovable.clone(),
            fitting,
            out,
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.home {
            Some(home) => writeln!(f, "{} is on {home}", self.container)?,
            None => writeln!(f, "{} is on no host", self.container)?,
        }
        for reason in &self.unmovable {
            writeln!(f, "  it cannot move live: {reason}")?;
        }
        for (at, one) in self.fitting.iter().enumerate() {
            writeln!(f, "  {}. {}: {}", at + 1, one.host, one.score)?;
        }
        for one in &self.out {
            writeln!(f, "  out: {}: {}", one.host, one.reasons.join(", "))?;
        }
        Ok(())
    }
}
