//! Plans being carried out: step after step, as `after` and `parallel` allow, each checked again when it begins.

use godwit_model::host::HostState;
use godwit_model::{Bytes, MilliCpu};
use godwit_plan::{Container, EvacuateOptions, How, Step};

use crate::Broken;
use crate::clock::{Event, HOUR_MS, MINUTE_MS};
use crate::controller::{Power, Sim};

/// One move of so many fails.
const MOVES_PER_FAILURE: u32 = 50;
/// Steps of one course at the same time.
const PARALLEL: usize = 4;
/// Plans made for one evacuation before it is given up.
const MOST_PLANS: u32 = 3;
/// Within this time a move back by balancing is counted as a flap; within the rest per container it is an error.
const FLAP_MS: u64 = 2 * HOUR_MS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    Evacuate { host: usize, plans: u32 },
    Grow { container: usize, memory: Bytes, cpu: MilliCpu },
    Balance,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waits,
    Flies,
    Done,
    Dead,
}

#[derive(Debug)]
pub(crate) struct Course {
    goal: Goal,
    steps: Vec<(Step, State)>,
}

/// One move on its way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flight {
    course: u64,
    step: usize,
    pub container: usize,
    pub from: usize,
    pub to: usize,
}

impl Sim {
    pub fn begin(&mut self, goal: Goal, steps: Vec<Step>) -> Result<(), Broken> {
        self.next_number += 1;
        let steps = steps.into_iter().map(|step| (step, State::Waits)).collect();
        self.courses.insert(self.next_number, Course { goal, steps });
        self.advance(self.next_number)
    }

    /// Begins every step that may begin; ends the course if nothing is left.
    fn advance(&mut self, number: u64) -> Result<(), Broken> {
        let Some(mut course) = self.courses.remove(&number) else { return Ok(()) };
        for at in 0..course.steps.len() {
            let flying = course.steps.iter().filter(|(_, state)| *state == State::Flies).count();
            let (step, state) = &course.steps[at];
            if *state != State::Waits {
                continue;
            }
            let states = || step.after.iter().map(|s| course.steps[*s].1);
            if states().any(|s| s == State::Dead) {
                self.counts.steps_dropped += 1;
                course.steps[at].1 = State::Dead;
            } else if flying < PARALLEL && states().all(|s| s == State::Done) {
                course.steps[at].1 = match self.take_off(number, at, step)? {
                    true => State::Flies,
                    false => State::Dead,
                };
            }
        }
        if course.steps.iter().all(|(_, state)| matches!(state, State::Done | State::Dead)) {
            return self.end(course.goal);
        }
        self.courses.insert(number, course);
        Ok(())
    }

    /// Whether the move has begun.
    fn take_off(&mut self, course: u64, at: usize, step: &Step) -> Result<bool, Broken> {
        let (from, to) = (self.host_numbers[&step.from], self.host_numbers[&step.to]);
        let known = self.numbers.get(&step.container).copied().filter(|c| !self.containers[*c].removed);
        let Some(container) = known else { return Ok(false) };
        let ready = step.how == How::Live
            && self.containers[container].flight.is_none()
            && self.fleet.home(&step.container) == Some(&step.from)
            && self.witness.runs_on(container) == Some(from)
            && self.hosts[from].power == Power::Up
            && self.fleet.check_move(&step.container, &step.to).is_ok();
        if !ready {
            self.counts.steps_dropped += 1;
            return Ok(false);
        }
        self.fleet.claim(&step.container, &step.to).map_err(|error| self.contradiction(error))?;
        self.touched.insert(to);
        self.note(container, to);
        self.next_number += 1;
        let flight = self.next_number;
        self.flights.insert(flight, Flight { course, step: at, container, from, to });
        self.containers[container].flight = Some(flight);
        let took = step.estimated_ms + step.estimated_ms * self.rng.u64(0..50) / 100;
        self.clock.after(took, Event::MoveEnds(flight));
        Ok(true)
    }

    pub fn move_ends(&mut self, number: u64) -> Result<(), Broken> {
        let fails = self.clock.now_ms < self.settle_from_ms && self.rng.u32(0..MOVES_PER_FAILURE) == 0;
        self.land(number, !fails)
    }

    /// Ends a move: the container is at its destination, or where it was. A move that was ended before is nothing.
    pub fn land(&mut self, number: u64, good: bool) -> Result<(), Broken> {
        let Some(flight) = self.flights.remove(&number) else { return Ok(()) };
        let Flight { course, step, container, from, to } = flight;
        let name = self.containers[container].name.clone();
        self.containers[container].flight = None;
        let (source, target) = (self.hosts[from].name.clone(), self.hosts[to].name.clone());
        let good = good && self.witness.runs_on(container) == Some(from) && !self.containers[container].removed;
        if good {
            let known = self.fleet.container(&name).ok_or_else(|| self.contradiction(&name))?;
            let mut moved = Container { last_moved_ms: Some(self.clock.now_ms), ..known.clone() };
            if self.containers[container].has_volumes {
                moved.volumes_on = Some(target.clone());
            }
            self.fleet.put(&name, &target).map_err(|error| self.contradiction(error))?;
            self.fleet.set_container(moved);
            self.witness.moves(container, to);
            self.note(container, to);
            self.counts.moves += 1;
            self.count_purpose(course, container, from, to)?;
        } else {
            // Where it was removed meanwhile, nothing is held any more.
            let _ = self.fleet.release(&name, &target);
            self.counts.moves_failed += 1;
        }
        self.touched.extend([from, to]);
        debug_assert_ne!(source, target);
        if let Some(known) = self.courses.get_mut(&course) {
            known.steps[step].1 = if good { State::Done } else { State::Dead };
        }
        self.advance(course)
    }

    fn count_purpose(&mut self, course: u64, container: usize, from: usize, to: usize) -> Result<(), Broken> {
        match self.courses.get(&course).map(|course| course.goal) {
            Some(Goal::Evacuate { .. }) => self.counts.moves_to_evacuate += 1,
            Some(Goal::Grow { .. }) => self.counts.moves_to_make_room += 1,
            Some(Goal::Balance) => {
                self.counts.moves_to_balance += 1;
                let before = self.containers[container].balanced.replace((from, to, self.clock.now_ms));
                let Some((_, _, at)) = before.filter(|(a, b, _)| (*a, *b) == (to, from)) else { return Ok(()) };
                let apart_ms = self.clock.now_ms - at;
                self.counts.flaps += u64::from(apart_ms < FLAP_MS);
                if apart_ms < self.policy().rest_ms {
                    let [from, to] = [from, to].map(|host| self.hosts[host].name.to_string());
                    let container = self.containers[container].name.to_string();
                    return Err(Broken::Flap { at_ms: self.clock.now_ms, container, from, to });
                }
                return Ok(());
            }
            None => {}
        }
        self.containers[container].balanced = None;
        Ok(())
    }

    fn end(&mut self, goal: Goal) -> Result<(), Broken> {
        match goal {
            Goal::Balance => Ok(()),
            Goal::Evacuate { host, plans } => self.evacuation_ends(host, plans),
            Goal::Grow { container, memory, cpu } => self.grow_in_place(container, memory, cpu),
        }
    }

    fn evacuation_ends(&mut self, host: usize, plans: u32) -> Result<(), Broken> {
        let name = self.hosts[host].name.clone();
        if self.fleet.host(&name).is_none_or(|h| h.state != HostState::Evacuating) {
            return Ok(());
        }
        if self.fleet.containers_on(&name).is_empty() {
            self.counts.evacuated += 1;
            self.set_state(host, HostState::Evacuated);
        } else if plans < MOST_PLANS {
            self.clock.after(MINUTE_MS, Event::EvacuateAgain(host));
            self.hosts[host].plans = plans;
            return Ok(());
        } else {
            self.set_state(host, HostState::EvacuationFailed);
        }
        let after = self.rng.u64(10 * MINUTE_MS..HOUR_MS);
        self.clock.after(after, Event::Activate(host));
        Ok(())
    }

    /// A plan for what is still there.
    pub fn evacuate(&mut self, host: usize, plans: u32) -> Result<(), Broken> {
        let name = self.hosts[host].name.clone();
        if self.fleet.host(&name).is_none_or(|h| h.state != HostState::Evacuating || !h.connected) {
            return Ok(());
        }
        let options = EvacuateOptions { parallel: PARALLEL as u32, ..EvacuateOptions::default() };
        let plan = godwit_plan::evacuate(&self.fleet, &name, &options).map_err(|error| self.contradiction(error))?;
        self.begin(Goal::Evacuate { host, plans: plans + 1 }, plan.steps)
    }

    /// The container has the room now, or the plan has failed and it stays as it is.
    fn grow_in_place(&mut self, container: usize, memory: Bytes, cpu: MilliCpu) -> Result<(), Broken> {
        let name = self.containers[container].name.clone();
        let Some(known) = self.fleet.container(&name).cloned() else { return Ok(()) };
        let Some(home) = self.fleet.home(&name).cloned() else { return Ok(()) };
        let free = self.fleet.free_memory(&home).unwrap_or_default();
        let free_cpu = self.fleet.free_cpu(&home).unwrap_or_default();
        let more = memory.0.saturating_sub(known.reserved_memory.0);
        let more_cpu = u64::from(cpu.0.saturating_sub(known.reserved_cpu.0));
        if self.containers[container].flight.is_none() && more <= free.0 && more_cpu <= free_cpu {
            self.fleet.set_container(Container { reserved_memory: memory, reserved_cpu: cpu, ..known });
            self.touched.insert(self.host_numbers[&home]);
            self.counts.grown += 1;
        } else {
            self.counts.growth_refused += 1;
        }
        Ok(())
    }
}
