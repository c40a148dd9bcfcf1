//! What happens to the fleet, and what its controller does about it.

use godwit_model::host::HostState;
use godwit_model::{Bytes, MilliCpu};
use godwit_plan::{Container, Host, Policy, make_room, rebalance, recover};

use crate::clock::{Event, HOUR_MS, MINUTE_MS, SECOND_MS};
use crate::controller::{Power, Sim};
use crate::courses::Goal;
use crate::{Broken, MOST_DOWN_MS};

/// A host that has not been heard of for so long is suspected.
const SUSPECT_MS: u64 = 6 * SECOND_MS;
/// A host that is cut off has ended everything by then, by its own clock.
const FENCE_MS: u64 = 15 * SECOND_MS;
/// From then on others may start what it had.
const DECLARE_MS: u64 = 20 * SECOND_MS;
/// Mean time between failures of one host, in hours, and between its evacuations.
const FAILS_EVERY_HOURS: u64 = 100;
const CUT_OFF_EVERY_HOURS: u64 = 200;
const EVACUATED_EVERY_HOURS: u64 = 100;
/// Environments that come, in a thousandth of all containers each hour.
const GROWTH_PERMILLE: u64 = 5;
const SHORTEST_INTERVAL_MS: u64 = 2 * SECOND_MS;
pub(crate) const BALANCE_MS: u64 = 10 * MINUTE_MS;
const MEASURE_MS: u64 = 10 * MINUTE_MS;
/// One container of so many has a burst of load between two measurements.
const CONTAINERS_PER_BURST: usize = 500;

impl Sim {
    pub fn happen(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::HostFails(_) => self.some_host_goes(Power::Down),
            Event::HostCutOff(_) => self.some_host_goes(Power::CutOff),
            Event::Suspect(host, episode) => {
                if self.is_away(host, episode) {
                    self.set_state(host, HostState::Suspect);
                }
                Ok(())
            }
            Event::Fence(host, episode) => {
                // What has lost power has nothing left to end.
                if self.is_away(host, episode) {
                    self.witness.all_stop(host, self.clock.now_ms);
                }
                Ok(())
            }
            Event::Declare(host, episode) if self.is_away(host, episode) => self.declare(host),
            Event::HostBack(host, episode) if self.is_away(host, episode) => self.is_back(host),
            Event::Declare(..) | Event::HostBack(..) => Ok(()),
            Event::Started(container, host, start) => self.started(container, host, start),
            Event::MoveEnds(flight) => self.move_ends(flight),
            Event::Grow => {
                self.again(Event::Grow);
                self.add_environment()
            }
            Event::Shrink => {
                self.again(Event::Shrink);
                self.shrink()
            }
            Event::Resize => {
                self.again(Event::Resize);
                self.resize()
            }
            Event::Evacuate => {
                self.again(Event::Evacuate);
                self.evacuate_some_host()
            }
            Event::EvacuateAgain(host) => self.evacuate(host, self.hosts[host].plans),
            Event::Activate(host) => {
                if self.hosts[host].power == Power::Up {
                    self.set_state(host, HostState::Active);
                }
                Ok(())
            }
            Event::Balance => {
                self.clock.after(BALANCE_MS, Event::Balance);
                self.balance()
            }
            Event::Measure => {
                self.clock.after(MEASURE_MS, Event::Measure);
                self.measure()
            }
            Event::Retry => self.retry(),
            // The caller's.
            Event::HourEnds => Ok(()),
        }
    }

    pub fn arrange_next_happenings(&mut self) {
        for event in
            [Event::HostFails(0), Event::HostCutOff(0), Event::Evacuate, Event::Grow, Event::Shrink, Event::Resize]
        {
            self.again(event);
        }
    }

    /// Arranges the next of its kind, around its mean interval; none once the fleet is to settle.
    fn again(&mut self, event: Event) {
        let hosts = self.hosts.len() as u64;
        let per_hour = |count: u64| HOUR_MS / count.max(1);
        let grown = (self.settings.containers as u64 * GROWTH_PERMILLE / 1000 / 8).max(1);
        // In a small fleet more happens than its size would have it: that is what is to be seen.
        let (mean, longest) = match event {
            Event::HostFails(_) => (HOUR_MS * FAILS_EVERY_HOURS / hosts, 3 * HOUR_MS),
            Event::HostCutOff(_) => (HOUR_MS * CUT_OFF_EVERY_HOURS / hosts, 4 * HOUR_MS),
            Event::Evacuate => (HOUR_MS * EVACUATED_EVERY_HOURS / hosts, 6 * HOUR_MS),
            _ => (per_hour(grown), 2 * HOUR_MS),
        };
        let mean = mean.clamp(SHORTEST_INTERVAL_MS, longest);
        let after = self.rng.u64(mean / 2..mean * 3 / 2);
        if self.clock.now_ms + after < self.settle_from_ms {
            self.clock.after(after, event);
        }
    }

    fn is_away(&self, host: usize, episode: u32) -> bool {
        self.hosts[host].episode == episode && self.hosts[host].power != Power::Up
    }

    pub fn set_state(&mut self, host: usize, state: HostState) {
        if let Some(known) = self.fleet.host(&self.hosts[host].name) {
            let connected = self.hosts[host].power == Power::Up;
            self.fleet.set_host(Host { state, connected, ..known.clone() });
        }
    }

    fn some_host_goes(&mut self, power: Power) -> Result<(), Broken> {
        let event = match power {
            Power::CutOff => Event::HostCutOff(0),
            _ => Event::HostFails(0),
        };
        self.again(event);
        let host = self.rng.usize(0..self.hosts.len());
        if self.hosts[host].power != Power::Up {
            return Ok(());
        }
        self.hosts[host].power = power;
        self.hosts[host].episode += 1;
        let episode = self.hosts[host].episode;
        match power {
            Power::CutOff => self.counts.hosts_cut_off += 1,
            _ => {
                self.counts.hosts_failed += 1;
                self.witness.all_stop(host, self.clock.now_ms);
            }
        }
        self.hosts[host].away_since_ms = self.clock.now_ms;
        let name = self.hosts[host].name.clone();
        let here: Vec<usize> = self.fleet.containers_on(&name).iter().map(|c| self.numbers[&c.name]).collect();
        for number in here.into_iter().filter(|n| self.fleet.home(&self.containers[*n].name) == Some(&name)) {
            // What was still starting there.
            self.witness.fails_again(number, self.clock.now_ms);
        }
        // Moves from there and to there are taken back.
        let ended: Vec<u64> =
            self.flights.iter().filter(|(_, f)| f.from == host || f.to == host).map(|(n, _)| *n).collect();
        ended.into_iter().try_for_each(|flight| self.land(flight, false))?;
        self.clock.after(SUSPECT_MS, Event::Suspect(host, episode));
        self.clock.after(FENCE_MS, Event::Fence(host, episode));
        self.clock.after(DECLARE_MS, Event::Declare(host, episode));
        // A third is away for moments only.
        let away = match self.rng.u32(0..3) {
            0 => self.rng.u64(SECOND_MS..DECLARE_MS + 10 * SECOND_MS),
            _ => self.rng.u64(5 * MINUTE_MS..4 * HOUR_MS),
        };
        self.clock.after(away, Event::HostBack(host, episode));
        Ok(())
    }

    fn declare(&mut self, host: usize) -> Result<(), Broken> {
        let name = self.hosts[host].name.clone();
        let left = self.witness.on_host(host).count();
        if left > 0 {
            return Err(Broken::FencedLate { at_ms: self.clock.now_ms, host: name.to_string(), containers: left });
        }
        self.set_state(host, HostState::Failed);
        let plan = recover(&self.fleet, &name).map_err(|error| self.contradiction(error))?;
        for start in &plan.starts {
            let number = self.numbers[&start.container];
            self.settle_on(number, &start.to)?;
            self.counts.restarts += 1;
        }
        for stay in &plan.stays {
            let number = self.numbers[&stay.container];
            self.witness.waits(number);
            let known = self.fleet.container(&stay.container).ok_or_else(|| self.contradiction(&stay.container))?;
            // With its volumes there it waits for the host; else for room anywhere.
            if known.volumes_on.is_none() || known.may_recreate_volumes {
                let lost = Container { volumes_on: None, ..known.clone() };
                self.fleet.set_container(lost);
                self.fleet.take(&stay.container).map_err(|error| self.contradiction(error))?;
                self.waiting.insert(number);
            }
        }
        self.touched.insert(host);
        Ok(())
    }

    fn is_back(&mut self, host: usize) -> Result<(), Broken> {
        self.counts.hosts_returned += 1;
        self.hosts[host].power = Power::Up;
        self.set_state(host, HostState::Active);
        let name = self.hosts[host].name.clone();
        let here: Vec<_> = self.fleet.containers_on(&name).iter().map(|c| c.name.clone()).collect();
        for container in here {
            let number = self.numbers[&container];
            // What it still owns and does not run starts again.
            if self.fleet.home(&container) == Some(&name) && self.witness.runs_on(number).is_none() {
                self.witness.promised(number, self.clock.now_ms);
                self.start(number, host);
            }
        }
        Ok(())
    }

    fn started(&mut self, number: usize, host: usize, start: u32) -> Result<(), Broken> {
        let container = &self.containers[number];
        let is_last = container.start == start && !container.removed;
        let owns = self.fleet.home(&container.name) == Some(&self.hosts[host].name);
        if !is_last || !owns || self.hosts[host].power != Power::Up || self.witness.runs_on(number) == Some(host) {
            return Ok(());
        }
        let name = container.name.to_string();
        if let Err(first) = self.witness.starts(number, host) {
            let [first, second] = [first, host].map(|h| self.hosts[h].name.to_string());
            return Err(Broken::TwoCopies { at_ms: self.clock.now_ms, container: name, first, second });
        }
        let down_ms = self.witness.is_up(number, self.clock.now_ms);
        if down_ms > MOST_DOWN_MS {
            return Err(Broken::DownTooLong { at_ms: self.clock.now_ms, container: name, down_ms });
        }
        Ok(())
    }

    /// Some container that is there.
    fn any_container(&mut self) -> Option<usize> {
        let count = self.containers.len();
        let first = if count == 0 { return None } else { self.rng.usize(0..count) };
        (0..count).map(|n| (first + n) % count).find(|n| !self.containers[*n].removed)
    }

    /// A whole environment goes, or the last of a layer.
    fn shrink(&mut self) -> Result<(), Broken> {
        let Some(number) = self.any_container() else { return Ok(()) };
        let env = self.containers[number].name.env.clone();
        let whole = self.rng.bool();
        // Environments are made in one piece, so their containers have numbers next to each other.
        let mut of_env: Vec<usize> = vec![number];
        for step in [-1isize, 1] {
            let mut at = number.checked_add_signed(step);
            while let Some(n) = at.filter(|n| self.containers.get(*n).is_some_and(|c| c.name.env == env)) {
                of_env.push(n);
                at = n.checked_add_signed(step);
            }
        }
        of_env.retain(|n| !self.containers[*n].removed);
        of_env.truncate(if whole { of_env.len() } else { 1 });
        for number in of_env {
            if let Some(flight) = self.containers[number].flight {
                self.land(flight, false)?;
            }
            let name = self.containers[number].name.clone();
            self.fleet.remove_container(&name).map_err(|error| self.contradiction(error))?;
            self.witness.forget(number);
            self.containers[number].removed = true;
            self.waiting.remove(&number);
            self.numbers.remove(&name);
            self.alive -= 1;
            self.counts.containers_removed += 1;
        }
        Ok(())
    }

    /// Somebody gives a container half as much again.
    fn resize(&mut self) -> Result<(), Broken> {
        let Some(number) = self.any_container() else { return Ok(()) };
        let name = self.containers[number].name.clone();
        if self.containers[number].flight.is_some() || self.fleet.home(&name).is_none() {
            return Ok(());
        }
        let known = self.fleet.container(&name).ok_or_else(|| self.contradiction(&name))?;
        let memory = Bytes(known.reserved_memory.0 / 2 * 3);
        let cpu = MilliCpu(known.reserved_cpu.0 / 2 * 3);
        match make_room(&self.fleet, &name, memory, cpu) {
            Ok(plan) => self.begin(Goal::Grow { container: number, memory, cpu }, plan.steps),
            Err(_) => {
                self.counts.growth_refused += 1;
                Ok(())
            }
        }
    }

    fn evacuate_some_host(&mut self) -> Result<(), Broken> {
        let host = self.rng.usize(0..self.hosts.len());
        let name = &self.hosts[host].name;
        let is_active = |h: &&Host| h.connected && h.state == HostState::Active;
        if self.hosts[host].power != Power::Up || self.fleet.host(name).filter(is_active).is_none() {
            return Ok(());
        }
        self.counts.evacuations += 1;
        self.set_state(host, HostState::Evacuating);
        self.evacuate(host, 0)
    }

    pub fn policy(&self) -> Policy {
        let max_moves = (self.hosts.len() / 10).clamp(4, 200);
        Policy { max_moves, ..Policy::default() }
    }

    fn balance(&mut self) -> Result<(), Broken> {
        let advice = rebalance(&self.fleet, &self.policy(), self.clock.now_ms);
        self.begin(Goal::Balance, advice.moves.into_iter().map(|m| m.step).collect())
    }

    /// What agents measure: bursts come and go, and hosts tell how busy they are.
    fn measure(&mut self) -> Result<(), Broken> {
        for _ in 0..self.alive.div_ceil(CONTAINERS_PER_BURST) {
            let Some(number) = self.any_container() else { break };
            let known = self.fleet.container(&self.containers[number].name);
            let known = known.ok_or_else(|| self.contradiction("a container is gone"))?;
            let used_cpu = MilliCpu(known.reserved_cpu.0 * self.rng.u32(0..200) / 100);
            let burst = Container { used_cpu, ..known.clone() };
            self.fleet.set_container(burst);
        }
        let policy = self.policy();
        for host in 0..self.hosts.len() {
            let name = self.hosts[host].name.clone();
            let Some(known) = self.fleet.host(&name) else { continue };
            let here = self.fleet.containers_on(&name);
            let cpu: u64 = here.iter().map(|c| u64::from(c.used_cpu.0)).sum();
            let memory: u64 = here.iter().map(|c| c.used_memory.0).sum();
            let cpu = (cpu * 1000 / u64::from(known.cpu.0.max(1))).min(1000) as u16;
            let memory = (u128::from(memory) * 1000 / u128::from(known.memory.0.max(1))).min(1000) as u16;
            let over = cpu >= policy.cpu_threshold_permille || memory >= policy.memory_threshold_permille;
            let since = over.then(|| self.hosts[host].overloaded_since_ms.unwrap_or(self.clock.now_ms));
            self.hosts[host].overloaded_since_ms = since;
            self.fleet.measure(&name, cpu, memory, since).map_err(|error| self.contradiction(error))?;
        }
        Ok(())
    }
}
