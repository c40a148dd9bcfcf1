//! A container changes hosts while others talk to it: nothing is lost, nothing is out of order, nobody is told.
//!
//! The "container" is a UDP socket that answers every datagram. What its socket on the source had received but not
//! read when it was frozen is carried over and answered on the destination, as a checkpoint would do it.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_network::{Parking, Port, Protocol, PublishedPort};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use crate::lab::{Environment, Space, World, apply, is_root};

const PORT: u16 = 9000;
const PACE: Duration = Duration::from_millis(1);
const SETTLE: Duration = Duration::from_millis(100);
/// How long a talker waits for the last answers.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// Who sent it and its number.
type Word = (u8, u32);

fn encode((talker, number): Word) -> [u8; 5] {
    let [a, b, c, d] = number.to_be_bytes();
    [talker, a, b, c, d]
}

fn decode(bytes: &[u8]) -> Word {
    (bytes[0], u32::from_be_bytes(bytes[1..5].try_into().unwrap()))
}

/// Sends a numbered word each millisecond until told to stop; returns how many, and the answers in order.
fn talk(space: &Space, talker: u8, to: (Ipv4Addr, u16), stop: &Arc<AtomicBool>) -> JoinHandle<(u32, Vec<u32>)> {
    let socket = space.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.connect(to).unwrap();
    socket.set_nonblocking(true).unwrap();
    let stop = stop.clone();
    thread::spawn(move || {
        let (mut number, mut answers, mut end) = (0, Vec::new(), None);
        let mut buffer = [0; 64];
        while end.is_none_or(|end| Instant::now() < end) {
            if stop.load(Ordering::Relaxed) {
                end.get_or_insert(Instant::now() + LAST_ANSWERS);
            } else if socket.send(&encode((talker, number))).is_ok() {
                number += 1;
            }
            while let Ok(length) = socket.recv(&mut buffer) {
                let (from, number) = decode(&buffer[..length]);
                assert_eq!(from, talker, "an answer meant for another");
                answers.push(number);
            }
            thread::sleep(PACE);
        }
        (number, answers)
    })
}

/// Answers every word until told to stop; returns what it heard, and the socket.
fn listen(socket: UdpSocket, stop: Arc<AtomicBool>) -> JoinHandle<(Vec<Word>, UdpSocket)> {
    socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    thread::spawn(move || {
        let (mut heard, mut buffer) = (Vec::new(), [0; 64]);
        while !stop.load(Ordering::Relaxed) {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                heard.push(decode(&buffer[..length]));
                socket.send_to(&buffer[..length], from).unwrap();
            }
        }
        (heard, socket)
    })
}

fn bind(space: &Space) -> UdpSocket {
    let socket = space.inside(|| UdpSocket::bind(("0.0.0.0", PORT)).unwrap());
    // All that waited arrives at once: room for it, or the socket itself would drop what the network delivered.
    setsockopt(&socket, RcvBufForce, &(16 << 20)).unwrap();
    socket
}

fn park(world: &World, host: usize, port: &Port) -> Parking {
    let port = port.clone();
    world.hosts[host].on(|network| async move { network.park(&port).await }).unwrap()
}

/// An environment with a server on host 0 and a talker on each host, and the server published on each host.
fn stage(world: &World, vni: u32) -> Environment {
    let mut env = Environment::new(vni);
    env.start(world, 0, &["server"]);
    for host in 0..world.hosts.len() {
        env.start(world, host, &[]);
    }
    let target = (env.containers[0].port.address, PORT);
    env.published = vec![PublishedPort { host_port: PORT, protocol: Protocol::Udp, targets: vec![target] }];
    apply(world, &[&env]);
    env
}

/// Talkers: a container on each host, and an outside client by each host's published port.
fn start_talkers(world: &World, env: &Environment, stop: &Arc<AtomicBool>) -> Vec<JoinHandle<(u32, Vec<u32>)>> {
    let server = (env.containers[0].port.address, PORT);
    let inside = env.containers[1..].iter().map(|container| (&container.space, server));
    let outside = world.hosts.iter().map(|host| (&world.client, (host.address, PORT)));
    let all = inside.chain(outside).enumerate();
    all.map(|(talker, (space, to))| talk(space, u8::try_from(talker).unwrap(), to, stop)).collect()
}

#[test]
fn no_frame_is_lost_or_overtaken_when_a_container_moves() {
    if !is_root() {
        return;
    }
    for bridge_nf in [true, false] {
        move_under_load(bridge_nf);
    }
}

fn move_under_load(bridge_nf: bool) {
    let world = World::with(3, vec![], bridge_nf);
    let mut env = stage(&world, 90);
    let (source, destination) = (&world.hosts[0], &world.hosts[1]);
    let port = env.containers[0].port.clone();
    let (stop, freeze) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let server = listen(bind(&env.containers[0].space), freeze.clone());
    let talkers = start_talkers(&world, &env, &stop);
    thread::sleep(SETTLE);

    // Prepare: nothing is held up by it, however long it takes.
    let parking = park(&world, 1, &port);
    let (mac, vni, to) = (port.mac, port.vni, destination.address);
    source.on(|network| async move { network.prepare_divert(mac, vni).await }).unwrap();
    thread::sleep(SETTLE);
    assert_eq!(parking.counts().frames, 0, "a parking must not hold frames before the source diverts");

    // Freeze.
    freeze.store(true, Ordering::Relaxed);
    let (mut heard, socket) = server.join().unwrap();
    let began = Instant::now();
    source.on(|network| async move { network.divert(mac, vni, to).await }).unwrap();
    let diverted = began.elapsed();
    // An apply that does not know yet must not bring the frames back.
    source.apply(&[env.view(&world, 0)]);
    destination.apply(&[env.view(&world, 1)]);
    let mut carried = Vec::new();
    let mut buffer = [0; 64];
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        carried.push((decode(&buffer[..length]), from));
    }
    let id = port.id.clone();
    source.on(|network| async move { network.unplug(&id).await }).unwrap();
    thread::sleep(SETTLE);
    assert!(parking.counts().frames > 0, "frames should wait by now");

    // Restore: the port can send at once, inbound still waits.
    let space = Space::new(true);
    let began = Instant::now();
    destination.attach(&port, space.pid);
    let attached = began.elapsed();
    destination.plug(&port.id);
    let plugged = began.elapsed() - attached;
    let socket = bind(&space);
    for (word, from) in &carried {
        heard.push(*word);
        socket.send_to(&encode(*word), from).unwrap();
    }
    thread::sleep(SETTLE);
    let done = Arc::new(AtomicBool::new(false));
    let server = listen(socket, done.clone());

    // Activate.
    let began = Instant::now();
    let delivered = destination.on(|_| async move { parking.deliver().await }).unwrap();
    println!(
        "bridge_nf {bridge_nf}: divert {diverted:?}, attach {attached:?}, plug {plugged:?}, deliver {:?}: {delivered:?}",
        began.elapsed()
    );
    assert_eq!(delivered.dropped, 0);
    assert!(delivered.frames > 0);
    thread::sleep(SETTLE);

    // The others learn of it one after the other, the third host last.
    let old = std::mem::replace(&mut env.containers[0].space, space);
    env.containers[0].host = 1;
    let id = port.id.clone();
    destination.apply(&[env.view(&world, 1)]);
    source.on(|network| async move { network.detach(&id).await }).unwrap();
    source.apply(&[env.view(&world, 0)]);
    drop(old);
    thread::sleep(SETTLE);
    world.hosts[2].apply(&[env.view(&world, 2)]);
    thread::sleep(SETTLE);

    stop.store(true, Ordering::Relaxed);
    let results: Vec<_> = talkers.into_iter().map(|talker| talker.join().unwrap()).collect();
    done.store(true, Ordering::Relaxed);
    heard.extend(server.join().unwrap().0);
    for (talker, (sent, answers)) in results.into_iter().enumerate() {
        let talker = u8::try_from(talker).unwrap();
        let all: Vec<u32> = (0..sent).collect();
        let numbers: Vec<u32> = heard.iter().filter(|(from, _)| *from == talker).map(|(_, number)| *number).collect();
        assert!(sent > 300, "talker {talker} sent only {sent}");
        assert_eq!(first_difference(&numbers, &all), None, "server heard talker {talker} (bridge_nf {bridge_nf})");
        assert_eq!(first_difference(&answers, &all), None, "talker {talker} was answered (bridge_nf {bridge_nf})");
    }
    let leftovers = destination.on(|network| async move { network.leftovers().await }).unwrap();
    assert!(!leftovers.iter().any(|name| name.starts_with("gwt")), "{leftovers:?}");
}

/// Position and both values where two lists part, and their lengths.
fn first_difference(got: &[u32], want: &[u32]) -> Option<(usize, Option<u32>, Option<u32>, usize, usize)> {
    let length = got.len().max(want.len());
    let at = (0..length).find(|at| got.get(*at) != want.get(*at))?;
    Some((at, got.get(at).copied(), want.get(at).copied(), got.len(), want.len()))
}

#[test]
fn a_cancelled_move_leaves_everything_as_it_was() {
    if !is_root() {
        return;
    }
    let world = World::new(3);
    let env = stage(&world, 91);
    let (source, destination) = (&world.hosts[0], &world.hosts[1]);
    let port = env.containers[0].port.clone();
    let before = (source.rules(), destination.rules(), source.space.sh("bridge fdb show"));
    let server = (port.address, PORT);
    let reaches = |space: &Space| {
        space.inside(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            socket.send_to(&encode((0, 0)), server).unwrap();
            socket.recv_from(&mut [0; 64]).is_ok()
        })
    };
    let stop = Arc::new(AtomicBool::new(false));
    let listener = listen(bind(&env.containers[0].space), stop.clone());
    for drop_only in [false, true] {
        let parking = park(&world, 1, &port);
        let (mac, vni, to) = (port.mac, port.vni, destination.address);
        source.on(|network| async move { network.divert(mac, vni, to).await }).unwrap();
        let id = port.id.clone();
        source.on(|network| async move { network.unplug(&id).await }).unwrap();
        for container in &env.containers[1..] {
            assert!(!reaches(&container.space), "frames should wait at the destination");
        }
        assert!(parking.counts().frames >= 3);
        // A second parking for the same port is refused and does no harm to the first.
        let again = port.clone();
        assert!(destination.on(|network| async move { network.park(&again).await }).is_err());
        let space = Space::new(true);
        destination.attach(&port, space.pid);
        destination.plug(&port.id);
        // It failed: the destination gives up, the source goes on.
        if drop_only {
            drop(parking);
        } else {
            destination.on(|_| async move { parking.cancel().await }).unwrap();
        }
        let id = port.id.clone();
        destination.on(|network| async move { network.detach(&id).await }).unwrap();
        source.plug(&port.id);
        destination.apply(&[env.view(&world, 1)]);
        for container in &env.containers[1..] {
            assert!(reaches(&container.space), "drop_only {drop_only}");
        }
        let names = destination.on(|network| async move { network.leftovers().await }).unwrap();
        assert!(names.iter().all(|name| !name.starts_with("gwt") && !name.contains(&port.id)), "{names:?}");
        let after = (source.rules(), destination.rules(), source.space.sh("bridge fdb show"));
        assert_eq!(sorted(&after.2), sorted(&before.2));
        assert_eq!((after.0, after.1), (before.0.clone(), before.1.clone()));
    }
    stop.store(true, Ordering::Relaxed);
    listener.join().unwrap();
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}
