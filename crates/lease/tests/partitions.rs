//! Tries to make two copies run: hosts and a controller with clocks of their own, links that are cut and late, restarts.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use godwit_lease::{Beat, Book, Grant, Holder, LEASE_MS, MARGIN_MS, VOUCH_TIMEOUT_MS, Witness, choose_witnesses};
use godwit_model::HostName;

const BEAT_MS: u64 = 2_000;
const STEP_MS: u64 = 100;
/// A host comes to a standstill within this time after its lease has ended.
const STANDSTILL_MS: u64 = 2_000;

struct Host {
    name: HostName,
    holder: Holder,
    /// Its clock: an offset, and a rate in parts per 10,000.
    offset: u64,
    rate: i64,
    up: bool,
    to_controller: bool,
    /// Milliseconds that messages take on the way to and from the controller.
    delay: u64,
    next_beat: u64,
    next_ask: u64,
    out: Vec<(u64, Beat)>,
    back: Vec<(u64, Grant)>,
    /// The revision at which the controller gave away what it has.
    lost_at: Option<u64>,
    may_run_until: u64,
    /// The revision that the controller last told it on its link.
    told: u64,
}

impl Host {
    fn clock(&self, now: u64) -> u64 {
        self.offset + (now as i64 + now as i64 * self.rate / 10_000) as u64
    }
}

struct World {
    rng: fastrand::Rng,
    now: u64,
    hosts: Vec<Host>,
    /// Pairs of hosts that do not hear each other.
    cut: Vec<(usize, usize)>,
    book: Option<Book>,
    revision: u64,
    /// What the store has for each host: what it holds at least, and what was offered.
    stored: BTreeMap<HostName, [Vec<HostName>; 2]>,
    losses: usize,
    /// The controller is cut off from everybody until then; one host stays cut off when that is over.
    alone_until: Option<(u64, usize)>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let count = rng.usize(2..=7);
        let hosts: Vec<Host> = (1..=count)
            .map(|n| {
                let offset = rng.u64(0..1_000_000);
                Host {
                    name: HostName::new(format!("h{n}")).unwrap(),
                    holder: Holder::free(offset),
                    offset,
                    rate: rng.i64(-20..=20),
                    up: true,
                    to_controller: true,
                    delay: rng.u64(0..300),
                    next_beat: 0,
                    next_ask: 0,
                    out: Vec::new(),
                    back: Vec::new(),
                    lost_at: None,
                    may_run_until: 0,
                    told: 0,
                }
            })
            .collect();
        let names: Vec<HostName> = hosts.iter().map(|h| h.name.clone()).collect();
        let offered = choose_witnesses(&names).to_vec();
        let stored = names.iter().map(|name| (name.clone(), [Vec::new(), offered.clone()])).collect();
        Self {
            rng,
            now: 0,
            hosts,
            cut: Vec::new(),
            book: Some(Book::new(0)),
            revision: 1,
            stored,
            losses: 0,
            alone_until: None,
        }
    }

    fn witnesses(&self, of: &HostName) -> Vec<Witness> {
        let address = "127.0.0.1:1".parse().unwrap();
        self.stored[of][1].iter().map(|host| Witness { host: host.clone(), address }).collect()
    }

    fn step(&mut self) {
        self.now += STEP_MS;
        let now = self.now;
        if let Some((until, stays)) = self.alone_until
            && now >= until
        {
            self.alone_until = None;
            for (at, host) in self.hosts.iter_mut().enumerate() {
                host.to_controller = at != stays;
            }
        }
        for at in 0..self.hosts.len() {
            self.host_step(at);
        }
        if self.book.is_some() {
            self.controller_step();
        }
        for host in &mut self.hosts {
            if host.up && host.holder.may_run(host.clock(now)) {
                host.may_run_until = now;
                assert!(
                    host.lost_at.is_none(),
                    "{} runs at {now} what was given away at revision {:?}: {:?}",
                    host.name,
                    host.lost_at,
                    host.holder
                );
            }
        }
    }

    fn host_step(&mut self, at: usize) {
        let now = self.now;
        let host = &mut self.hosts[at];
        if !host.up {
            return;
        }
        let clock = host.clock(now);
        host.holder.look(clock);
        if now >= host.next_beat {
            host.next_beat = now + BEAT_MS;
            if host.to_controller && self.book.is_some() {
                host.out.push((now + host.delay, host.holder.beat(clock)));
            }
        }
        let arrived: Vec<Grant> = host.back.extract_if(.., |(when, _)| *when <= now).map(|(_, grant)| grant).collect();
        for grant in arrived {
            let revision = grant.revision;
            host.holder.granted(grant, clock);
            // What it shall be came before the grant: it lets go of what it lost before it says that this is carried out.
            if host.lost_at.is_some_and(|lost| lost <= revision) {
                host.lost_at = None;
            }
            host.holder.carried_out(revision, clock);
        }
        if self.hosts[at].holder.needs_witnesses(clock) && now >= self.hosts[at].next_ask {
            self.ask_witnesses(at, clock);
        }
    }

    fn ask_witnesses(&mut self, at: usize, asked: u64) {
        let now = self.now;
        self.hosts[at].next_ask = now + BEAT_MS;
        let mut by: Vec<HostName> = Vec::new();
        for other in 0..self.hosts.len() {
            let heard = other == at || !self.cut.contains(&(at.min(other), at.max(other)));
            let host = &mut self.hosts[other];
            if heard && host.up {
                let clock = host.clock(now);
                if host.holder.vouch(clock) {
                    by.push(host.name.clone());
                }
            }
        }
        let host = &mut self.hosts[at];
        let late = self.rng.u64(0..=VOUCH_TIMEOUT_MS);
        host.holder.vouched(asked, &by, asked + late);
    }

    fn controller_step(&mut self) {
        let now = self.now;
        let Some(mut book) = self.book.take() else { return };
        if now.is_multiple_of(1_000) {
            book.look(now);
        }
        for at in 0..self.hosts.len() {
            let witnesses = self.witnesses(&self.hosts[at].name);
            let host = &mut self.hosts[at];
            let arrived: Vec<Beat> = host.out.extract_if(.., |(when, _)| *when <= now).map(|(_, beat)| beat).collect();
            // Words go out some time after the store has changed.
            if self.rng.u32(0..8) == 0 {
                host.told = self.revision;
            }
            for beat in arrived {
                if let Some(stored) = self.stored.get_mut(&host.name) {
                    stored[0] = beat.witnesses.clone();
                }
                if let Some(grant) = book.asked(&host.name, &beat, host.told, witnesses.clone(), now)
                    && host.to_controller
                {
                    host.back.push((now + host.delay, grant));
                }
            }
        }
        for at in 0..self.hosts.len() {
            let host = &self.hosts[at];
            if host.lost_at.is_some() {
                continue;
            }
            let [held, offered] = &self.stored[&host.name];
            if book.seize(&host.name, &[held, offered], now).is_ok() {
                self.revision += 1;
                self.losses += 1;
                book.decided(&host.name, self.revision);
                let host = &mut self.hosts[at];
                assert!(host.may_run_until + STANDSTILL_MS <= now, "{} has no time to stand still", host.name);
                host.lost_at = Some(self.revision);
            }
        }
        self.book = Some(book);
    }

    fn happen(&mut self) {
        let at = self.rng.usize(0..self.hosts.len());
        let now = self.now;
        match self.rng.u32(0..12) {
            0 => self.hosts[at].to_controller = false,
            1 | 2 => self.hosts[at].to_controller = true,
            3 => {
                let other = self.rng.usize(0..self.hosts.len());
                if other != at {
                    self.cut.push((at.min(other), at.max(other)));
                }
            }
            4 => self.cut.clear(),
            5 => {
                // What was on its way to a controller that ends is lost with it.
                self.book = None;
                for host in &mut self.hosts {
                    host.out.clear();
                }
            }
            6 => {
                if self.book.is_none() {
                    self.book = Some(Book::new(now));
                    // Every link is a new one, and begins with the newest word.
                    self.hosts.iter_mut().for_each(|host| host.told = self.revision);
                }
            }
            7..=9 => {
                self.hosts[at].to_controller = false;
                self.alone_until = Some((now + self.rng.u64(3_000..12_000), at));
                let also = self.rng.u64(0..5_000);
                for host in &mut self.hosts {
                    host.to_controller = false;
                    host.next_beat += also / 10;
                }
            }
            10 => self.hosts[at].delay = self.rng.u64(0..3_000),
            // The agent, or the whole host, is started anew.
            _ => {
                let host = &mut self.hosts[at];
                host.out.clear();
                host.back.clear();
                let clock = host.clock(now);
                let until = host.holder.until().filter(|_| self.rng.bool());
                if !host.holder.witnesses().is_empty() {
                    host.holder = Holder::resumed(host.holder.witnesses().to_vec(), until, clock);
                }
            }
        }
    }
}

#[test]
fn nothing_runs_that_was_given_away() {
    let mut losses = 0;
    for seed in 0..2_000 {
        let mut world = World::new(seed);
        for step in 0..2_400 {
            world.step();
            if step % 20 == 0 && world.rng.u32(0..4) == 0 {
                world.happen();
            }
        }
        losses += world.losses;
    }
    assert!(losses > 1_000, "only {losses} hosts were lost: nothing was tried");
}

fn quiet(count: usize) -> World {
    let mut world = World::new(1);
    let template = |n: usize| Host {
        name: HostName::new(format!("h{n}")).unwrap(),
        holder: Holder::free(0),
        offset: 0,
        rate: 0,
        up: true,
        to_controller: true,
        delay: 5,
        next_beat: n as u64 * 300,
        next_ask: 0,
        out: Vec::new(),
        back: Vec::new(),
        lost_at: None,
        may_run_until: 0,
        told: 0,
    };
    world.hosts = (1..=count).map(template).collect();
    let names: Vec<HostName> = world.hosts.iter().map(|h| h.name.clone()).collect();
    let offered = choose_witnesses(&names).to_vec();
    world.stored = names.iter().map(|name| (name.clone(), [offered.clone(), offered.clone()])).collect();
    for _ in 0..300 {
        world.step();
    }
    assert_eq!(world.losses, 0);
    world
}

#[test]
fn a_dead_host_is_lost_soon_and_no_other() {
    for count in 2..=7 {
        let mut world = quiet(count);
        world.hosts[count - 1].up = false;
        let died = world.now;
        while world.losses == 0 && world.now < died + 60_000 {
            world.step();
        }
        assert!(world.hosts[count - 1].lost_at.is_some(), "{count} hosts");
        assert!(world.now - died <= LEASE_MS + MARGIN_MS + 1_000, "{count} hosts: {} ms", world.now - died);
        for _ in 0..600 {
            world.step();
        }
        assert_eq!(world.losses, 1, "{count} hosts");
    }
}

#[test]
fn without_a_controller_everything_runs_on() {
    for count in 1..=7 {
        let mut world = quiet(count);
        world.book = None;
        let ended = world.now;
        for _ in 0..6_000 {
            world.step();
            for host in &world.hosts {
                assert!(host.holder.may_run(host.clock(world.now)), "{count} hosts: {} stands still", host.name);
            }
        }
        // Nor is anything lost when it is back, whoever comes first.
        assert!(world.now > ended + 500_000);
        world.book = Some(Book::new(world.now));
        for _ in 0..600 {
            world.step();
        }
        assert_eq!(world.losses, 0, "{count} hosts");
    }
}

#[test]
fn who_is_cut_off_alone_stands_still_and_goes_on_when_nothing_was_taken() {
    let mut world = quiet(3);
    world.hosts[2].to_controller = false;
    world.cut = vec![(0, 2), (1, 2)];
    let cut = world.now;
    while world.hosts[2].holder.may_run(world.hosts[2].clock(world.now)) {
        world.step();
        assert!(world.now < cut + LEASE_MS + 1_000);
    }
    // Healed before the margin is over: it still owns everything.
    world.hosts[2].to_controller = true;
    for _ in 0..50 {
        world.step();
    }
    assert_eq!(world.losses, 0);
    assert!(world.hosts[2].holder.may_run(world.hosts[2].clock(world.now)));
}
