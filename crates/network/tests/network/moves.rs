//! A container changes hosts while others talk to it: nothing is lost, nothing is out of order, nobody is told.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use godwit_network::EnvironmentNetwork;

use crate::lab::{Environment, Space, World, apply, is_root, until};
use crate::talk::{Server, Talkers, answer, assert_complete, stage, unread};

/// A point in a move, after what it is named for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Parked,
    Prepared,
    Diverted,
    Unplugged,
    Attached,
    Plugged,
    /// While it is under way.
    Delivering,
    Delivered,
    Detached,
}

fn move_under_load(vni: u32, bridge_nf: bool, at: &(dyn Fn(At, &World, &Environment) + Sync)) {
    let world = World::with(3, vec![], bridge_nf);
    let env = stage(&world, vni);
    move_in(&world, env, &format!("bridge_nf {bridge_nf}"), at);
}

/// Moves container 0 of `env` from host 0 to host 1 under load, calls `at` on the way, and checks every word.
fn move_in(world: &World, mut env: Environment, what: &str, at: &(dyn Fn(At, &World, &Environment) + Sync)) {
    let (source, destination) = (&world.hosts[0], &world.hosts[1]);
    let port = env.containers[0].port.clone();
    let server = Server::start(Server::bind(&env.containers[0].space));
    let talkers = Talkers::start(world, &env);
    talkers.wait_for_answers();

    // Prepare: nothing is held up by it, however long it takes.
    let parking = destination.park(&port).unwrap();
    at(At::Parked, world, &env);
    source.prepare_divert(&port);
    at(At::Prepared, world, &env);
    talkers.wait_for_answers();
    assert_eq!(parking.counts().frames, 0, "a parking must not hold frames before the source diverts");

    // Freeze.
    let (mut heard, socket) = server.freeze();
    source.divert(&port, destination.address);
    at(At::Diverted, world, &env);
    source.mute(&port.id);
    source.unplug(&port.id);
    at(At::Unplugged, world, &env);
    let carried = unread(&socket);
    talkers.wait_for_words();
    until("frames that wait", || (parking.counts().frames > 0).then_some(()));

    // Restore: the port can send at once, inbound still waits.
    let space = Space::new(true);
    destination.attach(&port, space.pid);
    at(At::Attached, world, &env);
    destination.plug(&port.id);
    at(At::Plugged, world, &env);
    let socket = Server::bind(&space);
    heard.extend(answer(&socket, &carried));
    talkers.wait_for_words();
    let server = Server::start(socket);

    // Activate.
    let delivered = thread::scope(|scope| {
        let delivery = scope.spawn(|| destination.on(|_| async move { parking.deliver().await }));
        at(At::Delivering, world, &env);
        delivery.join().unwrap().unwrap()
    });
    println!("{what}, carried {}: {delivered:?}", carried.len());
    assert_eq!(delivered.dropped, 0);
    assert!(delivered.frames > 0);
    at(At::Delivered, world, &env);
    talkers.wait_for_answers();

    // The others learn of it one after the other, the third host last.
    let old = std::mem::replace(&mut env.containers[0].space, space);
    env.containers[0].host = 1;
    destination.apply(&[env.view(world, 1)]);
    source.detach(&port.id);
    at(At::Detached, world, &env);
    talkers.wait_for_answers();
    source.apply(&[env.view(world, 0)]);
    drop(old);
    talkers.wait_for_answers();
    world.hosts[2].apply(&[env.view(world, 2)]);
    talkers.wait_for_answers();

    assert_complete(talkers.finish(heard, server), what);
    let leftovers = destination.leftovers();
    assert!(!leftovers.iter().any(|name| name.starts_with("gwt")), "{leftovers:?}");
}

#[test]
fn no_frame_is_lost_or_overtaken_when_a_container_moves() {
    if !is_root() {
        return;
    }
    for bridge_nf in [true, false] {
        move_under_load(90, bridge_nf, &|_, _, _| ());
    }
}

/// A frozen container's TCP still sends by itself; once muted it must not, and a move that failed gives it back.
#[test]
fn a_muted_container_says_and_hears_nothing_until_it_is_plugged_again() {
    if !is_root() {
        return;
    }
    let world = World::new(1);
    let mut env = Environment::new(91);
    for _ in 0..2 {
        env.start(&world, 0, &[]);
    }
    apply(&world, &[&env]);
    let [muted, other] = env.containers.as_slice() else { panic!("two containers") };
    let one_way = |from: &Space, to: &Space, address: Ipv4Addr, word: &str| {
        let socket = to.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        from.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(word.as_bytes(), (address, 9)).unwrap());
        let mut heard = [0; 16];
        socket.recv(&mut heard).is_ok_and(|length| &heard[..length] == word.as_bytes())
    };
    let reaches = |out: bool| match out {
        true => one_way(&muted.space, &other.space, other.port.address, "out"),
        false => one_way(&other.space, &muted.space, muted.port.address, "in"),
    };
    assert!(reaches(true) && reaches(false));
    let host = &world.hosts[0];
    for also_unplugged in [false, true] {
        host.mute(&muted.port.id);
        assert!(!reaches(true) && !reaches(false));
        if also_unplugged {
            host.unplug(&muted.port.id);
            // Nothing to do, and no error.
            host.mute(&muted.port.id);
        }
        host.plug(&muted.port.id);
        assert!(reaches(true) && reaches(false), "unplugged as well: {also_unplugged}");
    }
}

/// What hosts are told may be older than the steps of a move, and is then newer than some of them.
#[test]
fn an_apply_at_any_step_of_a_move_undoes_nothing() {
    if !is_root() {
        return;
    }
    move_under_load(92, true, &|at, world, env| {
        let [source, destination, third] = world.hosts.as_slice() else { panic!("three hosts") };
        let mac = env.containers[0].port.mac.to_string();
        let leads_to = |host: &crate::lab::Host, what: &str| {
            let entries = host.entries();
            let found = entries.iter().any(|line| line.starts_with(&mac) && line.contains(what));
            assert!(found, "{at:?}: {mac} does not lead to {what}: {entries:?}");
        };
        let there = format!("dst {}", destination.address);
        // Everybody is told that the container is on host 0, as it was before the move.
        if at != At::Delivered && at != At::Detached {
            for host in 0..3 {
                world.hosts[host].apply(&[env.view_if(world, host, 0)]);
            }
        }
        match at {
            At::Parked | At::Prepared => {}
            At::Diverted | At::Unplugged => leads_to(source, &there),
            At::Attached => leads_to(destination, "dev gwt"),
            // The store names the destination before all frames are delivered there.
            At::Plugged => {
                destination.apply(&[env.view_if(world, 1, 1)]);
                leads_to(destination, "dev gwt");
                leads_to(source, &there);
            }
            At::Delivering => destination.apply(&[env.view_if(world, 1, 1)]),
            At::Delivered => {
                leads_to(destination, "dev gwp");
                // The third host is told by a divert, and then by a description that is older.
                third.divert(&env.containers[0].port, destination.address);
                third.apply(&[env.view_if(world, 2, 0)]);
                leads_to(third, &there);
                // An old description also at the destination: what is plugged in there counts.
                destination.apply(&[env.view_if(world, 1, 0)]);
                leads_to(destination, "dev gwp");
            }
            // The port is gone, and the source is still told that the container is there.
            At::Detached => {
                source.apply(&[env.view_if(world, 0, 0)]);
                leads_to(source, &there);
                third.apply(&[env.view_if(world, 2, 1)]);
                leads_to(third, &there);
            }
        }
    });
}

/// Applies on every host without a pause, from before the move until after it.
#[test]
fn applies_without_a_pause_disturb_no_move() {
    if !is_root() {
        return;
    }
    let world = World::new(3);
    let env = stage(&world, 93);
    let views: Vec<Vec<EnvironmentNetwork>> =
        (0..2).map(|there| (0..3).map(|host| env.view_if(&world, host, there)).collect()).collect();
    let (there, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let rounds = thread::scope(|scope| {
        let (world, views, there, over) = (&world, &views, &there, &over);
        let appliers: Vec<_> = (0..3)
            .map(|host| {
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !over.load(Ordering::SeqCst) {
                        world.hosts[host].apply(&[views[there.load(Ordering::SeqCst)][host].clone()]);
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let end = SetAtEnd(over);
        move_in(world, env, "applies without a pause", &|at, _, _| {
            // The store names the destination, and then frames are delivered.
            if at == At::Plugged {
                there.store(1, Ordering::SeqCst);
            }
        });
        drop(end);
        appliers.into_iter().map(|applier| applier.join().unwrap()).collect::<Vec<u32>>()
    });
    println!("applied {rounds:?} times");
    assert!(rounds.iter().all(|rounds| *rounds > 10), "{rounds:?}");
}

/// Also when the test fails: the others would go on for ever.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
