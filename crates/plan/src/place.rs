//! One container, one host.

use std::cmp::Reverse;
use std::fmt;

use godwit_model::manifest::Spread;
use godwit_model::{Bytes, HostName, MilliCpu};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::view::{CPU_OVERCOMMIT, HostView, Request, View};

/// Where a container goes, and what spoke for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub host: HostName,
    /// Sentences for a person, the weightiest first.
    pub reasons: Vec<String>,
}

/// Why one host cannot take a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReasons {
    pub host: HostName,
    pub reasons: Vec<String>,
}

/// No host can take the container.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub struct Refusal {
    /// In order of the hosts' names.
    pub hosts: Vec<HostReasons>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.hosts.is_empty() {
            return f.write_str("no host has joined yet; start an agent");
        }
        f.write_str("no host can take it: ")?;
        for (at, host) in self.hosts.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", host.host, host.reasons.join(", "))?;
        }
        Ok(())
    }
}

/// Picks the host for one container; a tie goes to the first name.
pub fn place(view: &View, request: &Request) -> Result<Placement, Refusal> {
    let mut refused = Vec::new();
    let mut fitting: Vec<&HostView> = Vec::new();
    for host in &view.hosts {
        match check(host, request) {
            Ok(()) => fitting.push(host),
            Err(reasons) => refused.push(HostReasons { host: host.name.clone(), reasons }),
        }
    }
    let Some(best) = fitting.iter().min_by_key(|host| rank(host, request)) else {
        refused.sort_by(|a, b| a.host.cmp(&b.host));
        return Err(Refusal { hosts: refused });
    };
    Ok(Placement { host: best.name.clone(), reasons: reasons(best, request, fitting.len()) })
}

/// Whether the hard rules let this host take the container; all the reasons if not.
pub fn check(host: &HostView, request: &Request) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    if request.only.as_ref().is_some_and(|only| *only != host.name) {
        reasons.push("its volumes are on another host".to_owned());
    }
    if request.not.as_ref() == Some(&host.name) {
        reasons.push("it is there already".to_owned());
    }
    if !host.connected {
        reasons.push("its agent is not connected".to_owned());
    }
    if !host.active {
        reasons.push("it takes no new containers (cordoned)".to_owned());
    }
    let (need, free) = (request.resources.reserved_memory, host.free_memory());
    if need > free {
        reasons.push(format!("{need} of memory is reserved for it and {free} is free"));
    }
    let (need, free) = (request.resources.reserved_cpu, host.free_cpu());
    if u64::from(need.0) > free {
        let free = MilliCpu(free.min(u64::from(u32::MAX)) as u32);
        let total = MilliCpu(host.cpu_capacity().min(u64::from(u32::MAX)) as u32);
        reasons.push(format!(
            "{need} CPUs are reserved for it and {free} of {total} are free ({CPU_OVERCOMMIT} times the cores)"
        ));
    }
    let name = &request.name;
    if request.spread == Spread::Strict && host.of_layer(&name.env, &name.layer, name) > 0 {
        reasons
            .push(format!("another container of the layer {} is there, and the layer is spread strictly", name.layer));
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

/// Smaller is better.
type Rank<'a> = (usize, usize, Reverse<Bytes>, Reverse<u64>, &'a HostName);

fn rank<'a>(host: &'a HostView, request: &Request) -> Rank<'a> {
    let name = &request.name;
    let (layer, env) = match request.spread {
        Spread::None => (0, 0),
        Spread::Strict | Spread::Preferred => {
            (host.of_layer(&name.env, &name.layer, name), host.of_env(&name.env, name))
        }
    };
    (layer, env, Reverse(host.free_memory()), Reverse(host.free_cpu()), &host.name)
}

fn reasons(host: &HostView, request: &Request, fitting: usize) -> Vec<String> {
    let name = &request.name;
    let mut reasons = Vec::new();
    if let Some(only) = &request.only {
        reasons.push(format!("its volumes are on {only}"));
    }
    if fitting == 1 {
        reasons.push("no other host fits".to_owned());
    } else if request.spread != Spread::None {
        reasons.push(format!(
            "{} of its layer and {} of its environment are there, the fewest of {fitting} fitting hosts",
            host.of_layer(&name.env, &name.layer, name),
            host.of_env(&name.env, name),
        ));
    }
    reasons.push(format!("{} of memory is free there", host.free_memory()));
    reasons
}
