//! What really runs where, seen from outside of every controller.

use crate::{Broken, MOST_DOWN_MS};

#[derive(Debug, Clone, Default)]
struct Life {
    on: Option<usize>,
    down_since_ms: Option<u64>,
    /// Nobody has promised that it runs soon: there is no room, or its volumes are away.
    waits: bool,
}

/// Containers and hosts by their numbers.
#[derive(Debug, Default)]
pub struct Witness {
    lives: Vec<Life>,
    on_host: Vec<std::collections::BTreeSet<usize>>,
    pub longest_down_ms: u64,
    /// How long those were down that had to wait.
    pub longest_wait_ms: u64,
    pub starts: u64,
}

impl Witness {
    pub fn new(hosts: usize) -> Self {
        Self { on_host: vec![Default::default(); hosts], ..Self::default() }
    }

    /// A container that shall run.
    pub fn expect(&mut self, container: usize, at_ms: u64) {
        if self.lives.len() <= container {
            self.lives.resize(container + 1, Life::default());
        }
        self.lives[container].down_since_ms = Some(at_ms);
    }

    pub fn forget(&mut self, container: usize) {
        if let Some(host) = self.lives[container].on.take() {
            self.on_host[host].remove(&container);
        }
        self.lives[container].down_since_ms = None;
    }

    pub fn waits(&mut self, container: usize) {
        self.lives[container].waits = true;
    }

    /// It has a place again: from now on it must be quick.
    pub fn promised(&mut self, container: usize, at_ms: u64) {
        let life = &mut self.lives[container];
        if std::mem::take(&mut life.waits)
            && let Some(since) = life.down_since_ms
        {
            self.longest_wait_ms = self.longest_wait_ms.max(at_ms - since);
            life.down_since_ms = Some(at_ms);
        }
    }

    /// The host on which it was to start has failed too: from that on it is counted.
    pub fn fails_again(&mut self, container: usize, at_ms: u64) {
        let life = &mut self.lives[container];
        life.down_since_ms = life.down_since_ms.map(|since| since.max(at_ms));
    }

    pub fn runs_on(&self, container: usize) -> Option<usize> {
        self.lives[container].on
    }

    pub fn on_host(&self, host: usize) -> impl Iterator<Item = usize> {
        self.on_host[host].iter().copied()
    }

    pub fn running(&self) -> usize {
        self.on_host.iter().map(std::collections::BTreeSet::len).sum()
    }

    /// `Err`: the host on which it runs already.
    pub fn starts(&mut self, container: usize, host: usize) -> Result<(), usize> {
        if let Some(other) = self.lives[container].on {
            return Err(other);
        }
        self.lives[container].on = Some(host);
        self.on_host[host].insert(container);
        self.starts += 1;
        Ok(())
    }

    /// It runs now. Returns how long it was down with a place to go to, in milliseconds.
    pub fn is_up(&mut self, container: usize, at_ms: u64) -> u64 {
        let life = &mut self.lives[container];
        let waited = std::mem::take(&mut life.waits);
        let down_ms = life.down_since_ms.take().map_or(0, |since| at_ms - since);
        if waited {
            self.longest_wait_ms = self.longest_wait_ms.max(down_ms);
            return 0;
        }
        self.longest_down_ms = self.longest_down_ms.max(down_ms);
        down_ms
    }

    /// One instruction later it runs elsewhere.
    pub fn moves(&mut self, container: usize, to: usize) {
        if let Some(from) = self.lives[container].on.replace(to) {
            self.on_host[from].remove(&container);
            self.on_host[to].insert(container);
        }
    }

    /// Everything on a host ends.
    pub fn all_stop(&mut self, host: usize, at_ms: u64) {
        for container in std::mem::take(&mut self.on_host[host]) {
            self.lives[container].on = None;
            self.lives[container].down_since_ms = Some(at_ms);
        }
    }

    /// What has been promised and does not run for too long.
    pub fn judge(&self, at_ms: u64, name: impl Fn(usize) -> String) -> Result<(), Broken> {
        for (container, life) in self.lives.iter().enumerate() {
            let down_ms = life.down_since_ms.map_or(0, |since| at_ms - since);
            if down_ms > MOST_DOWN_MS && !life.waits {
                return Err(Broken::DownTooLong { at_ms, container: name(container), down_ms });
            }
        }
        Ok(())
    }
}
