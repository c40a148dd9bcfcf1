//! What a controller knows and does: it places, carries plans out, and learns of hosts by their silence.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use godwit_model::host::HostState;
use godwit_model::{ContainerName, HostName};
use godwit_plan::{Container, Fleet};

use crate::clock::{Clock, Event, HOUR_MS, MINUTE_MS, SECOND_MS};
use crate::courses::{Course, Flight};
use crate::fleet::{Environments, New};
use crate::happenings::BALANCE_MS;
use crate::summary::{Counts, Hour, Summary};
use crate::witness::Witness;
use crate::{Broken, SETTLE_HOURS, Settings, judge};

/// How long a start takes, in milliseconds.
const START_MS: std::ops::Range<u64> = 500..8_000;
/// Containers without a host that are tried again in one turn.
const MOST_RETRIED: usize = 100;
/// How often they are.
const RETRY_MS: u64 = 30 * SECOND_MS;

/// A host as it really is, and what the controller has decided of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    Up,
    Down,
    /// It runs and hears nobody.
    CutOff,
}

#[derive(Debug, Clone)]
pub(crate) struct SimHost {
    pub name: HostName,
    pub power: Power,
    /// How often it has been away; tells what belongs to which time.
    pub episode: u32,
    /// When it went away last.
    pub away_since_ms: u64,
    pub overloaded_since_ms: Option<u64>,
    /// Plans made for its evacuation.
    pub plans: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct SimContainer {
    pub name: ContainerName,
    pub has_volumes: bool,
    pub removed: bool,
    /// Which start counts.
    pub start: u32,
    pub flight: Option<u64>,
    /// From where to where balancing has moved it last, and when.
    pub balanced: Option<(usize, usize, u64)>,
}

pub(crate) struct Sim {
    pub settings: Settings,
    pub rng: Rng,
    pub clock: Clock,
    pub fleet: Fleet,
    pub hosts: Vec<SimHost>,
    pub host_numbers: BTreeMap<HostName, usize>,
    pub containers: Vec<SimContainer>,
    pub numbers: BTreeMap<ContainerName, usize>,
    pub alive: usize,
    pub environments: Environments,
    pub witness: Witness,
    pub flights: BTreeMap<u64, Flight>,
    pub courses: BTreeMap<u64, Course>,
    pub next_number: u64,
    /// Without a host.
    pub waiting: BTreeSet<usize>,
    /// Who is tried next.
    retried: usize,
    pub touched: BTreeSet<usize>,
    pub counts: Counts,
    /// From here on nothing bad happens any more.
    pub settle_from_ms: u64,
    pub fingerprint: u64,
}

impl Sim {
    pub fn new(settings: &Settings) -> Self {
        let mut rng = Rng::with_seed(settings.seed);
        let settings = Settings { hosts: settings.hosts.max(1), ..settings.clone() };
        let hosts = crate::fleet::hosts(&mut rng, settings.hosts).unwrap_or_default();
        let environments = Environments::new(&hosts, settings.containers);
        let mut fleet = Fleet::new();
        hosts.iter().for_each(|host| fleet.set_host(host.clone()));
        let host_numbers = hosts.iter().enumerate().map(|(n, host)| (host.name.clone(), n)).collect();
        let hosts: Vec<SimHost> = hosts.into_iter().map(|host| SimHost::new(host.name)).collect();
        Self {
            witness: Witness::new(hosts.len()),
            settle_from_ms: u64::from(settings.hours) * HOUR_MS,
            settings,
            rng,
            clock: Clock::default(),
            fleet,
            hosts,
            host_numbers,
            containers: Vec::new(),
            numbers: BTreeMap::new(),
            alive: 0,
            environments,
            flights: BTreeMap::new(),
            courses: BTreeMap::new(),
            next_number: 0,
            waiting: BTreeSet::new(),
            retried: 0,
            touched: BTreeSet::new(),
            counts: Counts::default(),
            fingerprint: 0xcbf2_9ce4_8422_2325,
        }
    }

    pub fn live(mut self, mut each_hour: impl FnMut(&Hour)) -> Result<Summary, Broken> {
        while self.alive < self.settings.containers as usize {
            self.add_environment()?;
        }
        self.judge_touched()?;
        self.arrange();
        let end_ms = self.settle_from_ms + u64::from(SETTLE_HOURS) * HOUR_MS;
        let (mut hour, mut before, mut most) = (0, Counts::default(), 0);
        while let Some(event) = self.clock.next() {
            if self.clock.now_ms > end_ms {
                break;
            }
            self.counts.events += 1;
            if event == Event::HourEnds {
                hour += 1;
                self.clock.after(HOUR_MS, Event::HourEnds);
                self.judge_all()?;
                let told = self.hour(hour, &before);
                most = most.max(told.moves);
                before = self.counts;
                each_hour(&told);
                continue;
            }
            self.happen(event)?;
            self.judge_touched()?;
        }
        self.summary(most)
    }

    fn hour(&self, hour: u32, before: &Counts) -> Hour {
        Hour {
            hour,
            hosts_active: self.fleet.hosts().filter(|h| h.connected && h.state == HostState::Active).count(),
            containers: self.alive,
            running: self.witness.running(),
            waiting: self.alive - self.witness.running(),
            doubled: judge::doubled(&self.fleet),
            moves: self.counts.moves - before.moves,
            restarts: self.counts.restarts - before.restarts,
            hosts_failed: self.counts.hosts_failed + self.counts.hosts_cut_off
                - before.hosts_failed
                - before.hosts_cut_off,
        }
    }

    fn summary(self, most_moves_per_hour: u64) -> Result<Summary, Broken> {
        let hours = u64::from(self.settings.hours + SETTLE_HOURS);
        // What rested until a moment ago has not had its turn yet.
        let lately_ms = self.clock.now_ms.saturating_sub(2 * BALANCE_MS);
        let left = godwit_plan::rebalance(&self.fleet, &self.policy(), lately_ms);
        if let Some(one) = left.moves.iter().find(|m| m.purpose == godwit_plan::Purpose::Spread) {
            let what = format!("{} could still be spread better: {}", one.step.container, one.step);
            return Err(Broken::Unsettled { what });
        }
        for waiting in &self.waiting {
            let name = &self.containers[*waiting].name;
            let container = self.fleet.container(name).ok_or_else(|| self.contradiction(name))?;
            if let Some(host) = self.fleet.best_host(container) {
                return Err(Broken::Unsettled { what: format!("{name} waits, and {host} takes it") });
            }
        }
        Ok(Summary {
            hosts: self.settings.hosts,
            containers: self.alive,
            seed: self.settings.seed,
            hours: self.settings.hours,
            counts: self.counts,
            most_moves_per_hour,
            mean_moves_per_hour: self.counts.moves / hours.max(1),
            longest_down_ms: self.witness.longest_down_ms,
            longest_wait_ms: self.witness.longest_wait_ms,
            doubled_at_end: judge::doubled(&self.fleet),
            waiting_at_end: self.alive - self.witness.running(),
            fingerprint: self.fingerprint,
        })
    }

    fn judge_touched(&mut self) -> Result<(), Broken> {
        let touched = std::mem::take(&mut self.touched);
        touched.into_iter().try_for_each(|host| self.judge(host))
    }

    fn judge(&self, host: usize) -> Result<(), Broken> {
        let name = &self.hosts[host].name;
        match judge::broken(&self.fleet, name) {
            Some(what) => Err(Broken::Rule { at_ms: self.clock.now_ms, host: name.to_string(), what }),
            None => Ok(()),
        }
    }

    fn judge_all(&self) -> Result<(), Broken> {
        (0..self.hosts.len()).try_for_each(|host| self.judge(host))?;
        self.witness.judge(self.clock.now_ms, |container| self.containers[container].name.to_string())
    }

    pub fn contradiction(&self, what: impl ToString) -> Broken {
        Broken::Simulation { at_ms: self.clock.now_ms, what: what.to_string() }
    }

    /// Everything decided goes in here, so that two runs can be compared by one number.
    pub fn note(&mut self, container: usize, host: usize) {
        for value in [self.clock.now_ms, container as u64, host as u64] {
            self.fingerprint = (self.fingerprint ^ value).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub fn add_environment(&mut self) -> Result<(), Broken> {
        let made = self.environments.make(&mut self.rng).map_err(|error| self.contradiction(error))?;
        for New { container, has_volumes } in made {
            let number = self.containers.len();
            self.containers.push(SimContainer {
                name: container.name.clone(),
                has_volumes,
                removed: false,
                start: 0,
                flight: None,
                balanced: None,
            });
            self.numbers.insert(container.name.clone(), number);
            self.alive += 1;
            self.counts.containers_added += 1;
            self.witness.expect(number, self.clock.now_ms);
            self.fleet.set_container(container);
            self.place(number)?;
        }
        Ok(())
    }

    /// Gives a container a host, or lets it wait.
    fn place(&mut self, number: usize) -> Result<(), Broken> {
        let name = self.containers[number].name.clone();
        let container = self.fleet.container(&name).ok_or_else(|| self.contradiction(&name))?;
        match self.fleet.best_host(container).cloned() {
            Some(host) => self.settle_on(number, &host),
            None => {
                self.waiting.insert(number);
                self.witness.waits(number);
                Ok(())
            }
        }
    }

    /// The container's host is this from now on, and it starts there.
    pub fn settle_on(&mut self, number: usize, host: &HostName) -> Result<(), Broken> {
        let name = self.containers[number].name.clone();
        if self.containers[number].has_volumes {
            let container = self.fleet.container(&name).ok_or_else(|| self.contradiction(&name))?;
            self.fleet.set_container(Container { volumes_on: Some(host.clone()), ..container.clone() });
        }
        self.fleet.put(&name, host).map_err(|error| self.contradiction(error))?;
        self.waiting.remove(&number);
        self.witness.promised(number, self.clock.now_ms);
        let at = self.host_numbers[host];
        if self.hosts[at].power != Power::Up {
            // Nobody knows yet that this one has failed too.
            self.witness.fails_again(number, self.hosts[at].away_since_ms);
        }
        self.touched.insert(at);
        self.note(number, at);
        self.start(number, at);
        Ok(())
    }

    pub fn start(&mut self, number: usize, at: usize) {
        self.containers[number].start += 1;
        let took = self.rng.u64(START_MS);
        self.clock.after(took, Event::Started(number, at, self.containers[number].start));
    }

    /// Those that wait, one after the other.
    pub fn retry(&mut self) -> Result<(), Broken> {
        let after = self.waiting.range(self.retried..).chain(self.waiting.range(..self.retried));
        let tried: Vec<usize> = after.copied().take(MOST_RETRIED).collect();
        for number in tried {
            self.retried = number + 1;
            self.place(number)?;
        }
        self.clock.after(RETRY_MS, Event::Retry);
        Ok(())
    }

    /// The first of everything that comes again and again.
    fn arrange(&mut self) {
        self.clock.after(HOUR_MS, Event::HourEnds);
        self.clock.after(RETRY_MS, Event::Retry);
        self.clock.after(10 * MINUTE_MS, Event::Measure);
        self.clock.after(10 * MINUTE_MS, Event::Balance);
        self.arrange_next_happenings();
    }
}

impl SimHost {
    fn new(name: HostName) -> Self {
        Self { name, power: Power::Up, episode: 0, away_since_ms: 0, overloaded_since_ms: None, plans: 0 }
    }
}
