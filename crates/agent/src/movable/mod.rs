//! Can this container be moved, and if not, why not: sentences for a person.
//!
//! What CRIU cannot carry is either kept out by the container's contract (seccomp, sysctls: programs fall back) or found
//! here; docs/movable.md says for each which, and which test shows it. The specification alone decides most; the rest is
//! in the `/proc` of the processes: what they have open, who they are, what their sockets hold.

mod descriptors;
mod processes;
mod sockets;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use godwit_model::container::ContainerSpec;

pub use descriptors::direct_io;

/// Between two looks passes at least this many times the time that the first one took: a hundredth of one processor is
/// what a container with very many open files may cost.
const REST_PER_LOOK: u32 = 100;
/// Reasons told of one container, at the most; of what they have in common, each is told once anyway.
const MAX_REASONS: usize = 20;

/// Reasons that lie in the specification and in this host.
pub fn by_specification(spec: &ContainerSpec, criu: bool, exec_sessions: u32) -> Vec<String> {
    let mut because = Vec::new();
    for path in &spec.host_paths {
        because.push(format!(
            "{} is a path of this host ({}), which stays here; use a named volume instead",
            path.target, path.source
        ));
    }
    if !criu {
        because.push("this host has no usable CRIU; run `godwit doctor` on it".to_owned());
    }
    because.extend(by_sessions(exec_sessions));
    because
}

/// Commands of others in the container end where it was: a reason as long as there are any.
pub fn by_sessions(exec_sessions: u32) -> Option<String> {
    match exec_sessions {
        0 => None,
        1 => Some("1 exec session is open; end it first".to_owned()),
        many => Some(format!("{many} exec sessions are open; end them first")),
    }
}

/// Looks at a container's processes again and again, and remembers what takes two looks to tell.
#[derive(Default)]
pub struct Looker {
    waiting: sockets::Waiting,
    /// When the last look ended, and how long it took.
    last: Option<(Instant, Duration)>,
    found: Vec<String>,
}

impl Looker {
    /// Reasons that lie in what the processes are and hold; `init` is the first of them. What an earlier look has found
    /// may be told again where looking is expensive, unless it has to be `now`.
    pub fn look(&mut self, init: u32, pids: &[u32], now: bool) -> Vec<String> {
        let rested = self.last.is_none_or(|(ended, took)| ended.elapsed() >= took * REST_PER_LOOK);
        if now || rested {
            let begun = Instant::now();
            let mut reasons = Reasons::default();
            processes::look(init, pids, &mut reasons);
            descriptors::look(pids, &mut reasons);
            self.waiting.look(init, begun, &mut reasons);
            self.found = reasons.sentences();
            self.last = Some((Instant::now(), begun.elapsed()));
        }
        self.found.clone()
    }
}

/// What was found, each once, with the first process of which it is true.
#[derive(Default)]
struct Reasons {
    of_processes: BTreeMap<String, Holders>,
    others: Vec<String>,
}

struct Holders {
    first: u32,
    last: u32,
    more: usize,
}

impl Reasons {
    /// `what` completes "process X …".
    fn process(&mut self, pid: u32, what: &str) {
        match self.of_processes.get_mut(what) {
            Some(holders) if holders.last == pid => {}
            Some(holders) => {
                holders.last = pid;
                holders.more += 1;
            }
            None => {
                self.of_processes.insert(what.to_owned(), Holders { first: pid, last: pid, more: 0 });
            }
        }
    }

    fn container(&mut self, sentence: String) {
        self.others.push(sentence);
    }

    fn sentences(self) -> Vec<String> {
        let of_processes = self.of_processes.into_iter().map(|(what, holders)| {
            let pid = holders.first;
            let more = match holders.more {
                0 => String::new(),
                1 => ", and so does 1 more".to_owned(),
                more => format!(", and so do {more} more"),
            };
            format!("process {} (pid {pid} on the host) {what}{more}", command(pid))
        });
        let mut all: Vec<String> = of_processes.chain(self.others).collect();
        if all.len() > MAX_REASONS {
            let more = all.len() - MAX_REASONS;
            all.truncate(MAX_REASONS);
            all.push(format!("and {more} more reasons"));
        }
        all
    }
}

fn command(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".to_owned(), |s| s.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_processes_hold_is_told_once() {
        let mut reasons = Reasons::default();
        for pid in [7, 7, 8, 9] {
            reasons.process(pid, "holds a thing");
        }
        reasons.container("there is more".to_owned());
        let said = reasons.sentences();
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("(pid 7 on the host) holds a thing, and so do 2 more"), "{said:?}");

        let mut many = Reasons::default();
        (0..50).for_each(|n| many.container(n.to_string()));
        let said = many.sentences();
        assert_eq!((said.len(), said[MAX_REASONS].as_str()), (MAX_REASONS + 1, "and 30 more reasons"));
    }

    #[test]
    fn an_expensive_look_is_not_repeated_at_once_unless_it_has_to_be_now() {
        let pid = std::process::id();
        let mut looker = Looker::default();
        assert_eq!(looker.look(pid, &[pid], false), Vec::<String>::new());
        let (pipe, _other) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::DIRECT).unwrap();
        let took = Duration::from_secs(1);
        looker.last = Some((Instant::now(), took));
        assert_eq!(looker.look(pid, &[pid], false), Vec::<String>::new(), "not looked at again");
        assert_eq!(looker.look(pid, &[pid], true).len(), 1, "looked at now");
        drop((pipe, _other));
        looker.last = Some((Instant::now() - took * REST_PER_LOOK, took));
        assert_eq!(looker.look(pid, &[pid], false), Vec::<String>::new(), "looked at after its rest");
    }
}
