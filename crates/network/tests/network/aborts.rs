//! Moves that do not happen: afterwards everything is as it was, and no frame has gone to where the container is not.

use std::net::UdpSocket;

use godwit_network::Parking;

use crate::lab::{Environment, Host, Space, World, is_root, until};
use crate::talk::{Server, Talkers, Told, assert_complete, first_difference, stage};

/// What must be the same again: rules and forwarding entries of every host.
fn picture(world: &World) -> Vec<(String, Vec<String>)> {
    world.hosts.iter().map(|host| (host.rules(), host.entries())).collect()
}

fn give_up(host: &Host, parking: Parking, drop_only: bool) {
    if drop_only {
        drop(parking);
    } else {
        host.on(|_| async move { parking.cancel().await }).unwrap();
    }
}

/// How far the move gets, and in which order the two hosts learn that it is off.
#[derive(Debug, Clone, Copy)]
struct Abort {
    diverted: bool,
    arrived: bool,
    source_first: bool,
    drop_only: bool,
}

#[test]
fn an_aborted_move_leaves_everything_as_it_was() {
    if !is_root() {
        return;
    }
    let world = World::new(3);
    let env = stage(&world, 91);
    let before = picture(&world);
    for (diverted, arrived) in [(false, false), (true, false), (true, true)] {
        for (source_first, drop_only) in [(true, false), (false, true)] {
            abort(&world, &env, Abort { diverted, arrived, source_first, drop_only }, &before);
        }
    }
}

fn abort(world: &World, env: &Environment, case: Abort, before: &[(String, Vec<String>)]) {
    let [source, destination, third] = world.hosts.as_slice() else { panic!("three hosts") };
    let port = env.containers[0].port.clone();
    let server = Server::start(Server::bind(&env.containers[0].space));
    let talkers = Talkers::start(world, env);
    talkers.wait_for_answers();
    let parking = destination.park(&port).unwrap();
    source.prepare_divert(&port);
    let mut copy = None;
    let sent_before = talkers.sent();
    if case.diverted {
        source.divert(&port, destination.address);
        third.divert(&port, destination.address);
        source.mute(&port.id);
        source.unplug(&port.id);
        talkers.wait_for_words();
        until("frames that wait", || (parking.counts().frames > 0).then_some(()));
        // A second parking for the same port is refused and does no harm to the first.
        assert!(destination.park(&port).is_err());
    }
    if case.arrived {
        let space = Space::new(true);
        destination.attach(&port, space.pid);
        destination.plug(&port.id);
        let socket = Server::bind(&space);
        socket.set_nonblocking(true).unwrap();
        talkers.wait_for_words();
        copy = Some((space, socket));
    }
    // The move is off. Other hosts are told last, and what they are told is what they were told before.
    if case.source_first {
        source.plug(&port.id);
        give_up(destination, parking, case.drop_only);
    } else {
        give_up(destination, parking, case.drop_only);
        source.plug(&port.id);
    }
    if case.diverted {
        third.divert(&port, source.address);
    }
    until("the end of the tap", || {
        let names = destination.leftovers();
        (!names.iter().any(|name| name.starts_with("gwt"))).then_some(())
    });
    // What came to the destination while it held frames is not with the source; what is said from now on is.
    let sent_after = talkers.sent();
    talkers.wait_for_answers();
    if let Some((space, socket)) = copy {
        assert!(nothing_came(&socket), "{case:?}: frames went to a copy that never ran");
        destination.detach(&port.id);
        drop(space);
    }
    talkers.wait_for_answers();
    for (host, _) in world.hosts.iter().zip(0..) {
        let names = host.leftovers();
        assert!(names.iter().all(|name| !name.starts_with("gwt")), "{case:?}: {names:?}");
    }
    assert_eq!(picture(world), before, "{case:?}");

    let told = talkers.finish(vec![], server);
    if !case.diverted {
        return assert_complete(told, "nothing was diverted");
    }
    for (Told { sent, heard, answers }, (first, last)) in told.into_iter().zip(sent_before.into_iter().zip(sent_after))
    {
        // One may be between being counted and being sent.
        let outside = |number: &u32| *number < first || *number > last;
        let kept: Vec<u32> = heard.iter().copied().filter(outside).collect();
        let all: Vec<u32> = (0..sent).filter(outside).collect();
        assert_eq!(first_difference(&kept, &all), None, "{case:?}");
        assert!(heard.is_sorted_by(|one, next| one < next), "{case:?}");
        assert_eq!(first_difference(&answers, &heard), None, "{case:?}");
    }
}

fn nothing_came(socket: &UdpSocket) -> bool {
    socket.recv_from(&mut [0; 64]).is_err()
}

/// The destination may be told nothing of the environment any more, or of another one first.
#[test]
fn a_parking_keeps_its_network_until_it_ends() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let mut env = Environment::new(94);
    env.start(&world, 0, &[]);
    crate::lab::apply(&world, &[&env]);
    let destination = &world.hosts[1];
    let parking = destination.park(&env.containers[0].port).unwrap();
    let before = destination.leftovers();
    destination.apply(&[]);
    assert_eq!(destination.leftovers(), before);
    destination.on(|_| async move { parking.cancel().await }).unwrap();
    destination.apply(&[]);
    assert_eq!(destination.leftovers(), Vec::<String>::new());
    // A parking can be opened again at once after one was dropped.
    destination.apply(&[env.view(&world, 1)]);
    drop(destination.park(&env.containers[0].port).unwrap());
    let again = destination.park(&env.containers[0].port).unwrap();
    destination.on(|_| async move { again.cancel().await }).unwrap();
}
