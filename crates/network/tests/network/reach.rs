//! Who reaches whom: across hosts by address and by name, from outside by published ports, the world by NAT.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use godwit_network::{Protocol, PublishedPort};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

use crate::lab::{CLIENT, Environment, MTU, Space, World, apply, is_root};
use crate::wire::{PATIENCE, ping};

#[test]
fn containers_reach_each_other_by_address() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let mut env = Environment::new(77);
    for host in [0, 0, 1] {
        env.start(&world, host, &[]);
    }
    apply(&world, &[&env]);
    for from in &env.containers {
        for to in &env.containers {
            assert!(from.space.pings(to.port.address), "{} to {}", from.port.address, to.port.address);
        }
        assert!(from.space.pings(env.gateway()), "{} to its gateway", from.port.address);
        assert!(from.space.pings(CLIENT), "{} to the outside", from.port.address);
        let full = from.space.inside(|| ping(env.containers[2].port.address, MTU as usize - 28, PATIENCE));
        assert!(full, "a full packet crosses the overlay");
    }
    // The gateway's own entry may get lost in a container: the question is answered, and by the local host.
    let space = &env.containers[0].space;
    space.sh("ip neigh flush dev eth0 nud permanent");
    assert!(space.pings(env.gateway()));
    let entry = space.sh(&format!("ip neigh show {}", env.gateway()));
    assert!(entry.contains("02:67:77:00:00:01"), "{entry}");
}

/// Asks the environment's gateway from inside `space`.
fn ask(space: &Space, gateway: Ipv4Addr, name: &str, kind: RecordType, tcp: bool) -> Message {
    let mut query = Message::query();
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    let bytes = query.to_vec().unwrap();
    let answer = space.inside(|| {
        let mut buffer = vec![0; 4096];
        if tcp {
            let mut stream = TcpStream::connect((gateway, 53)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&[&u16::try_from(bytes.len()).unwrap().to_be_bytes(), &bytes[..]].concat()).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            buffer.truncate(u16::from_be_bytes(length).into());
            stream.read_exact(&mut buffer).unwrap();
        } else {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send_to(&bytes, (gateway, 53)).unwrap();
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(from, SocketAddr::from((gateway, 53)));
            buffer.truncate(length);
        }
        buffer
    });
    Message::from_vec(&answer).unwrap()
}

fn addresses(answer: &Message) -> Vec<Ipv4Addr> {
    let address = |record: &hickory_proto::rr::Record| match &record.data {
        RData::A(address) => Some(address.0),
        _ => None,
    };
    answer.answers.iter().filter_map(address).collect()
}

#[test]
fn names_are_answered_on_every_host() {
    if !is_root() {
        return;
    }
    // A resolver outside answers everything with the question itself: enough to know it was asked.
    let world = World::with(2, vec![SocketAddr::from((CLIENT, 5353))], true);
    let resolver = world.client.inside(|| UdpSocket::bind((CLIENT, 5353)).unwrap());
    let echo = thread::spawn(move || {
        let mut buffer = [0; 512];
        let (length, from) = resolver.recv_from(&mut buffer).unwrap();
        resolver.send_to(&buffer[..length], from).unwrap();
    });
    let mut env = Environment::new(78);
    env.start(&world, 0, &["db-1", "db"]);
    env.start(&world, 1, &["db-2", "db"]);
    apply(&world, &[&env]);
    let both: Vec<Ipv4Addr> = env.containers.iter().map(|container| container.port.address).collect();
    for (index, container) in env.containers.iter().enumerate() {
        let ask = |name: &str, kind, tcp| ask(&container.space, env.gateway(), name, kind, tcp);
        for tcp in [false, true] {
            assert_eq!(addresses(&ask("db-2.", RecordType::A, tcp)), [both[1]]);
            assert_eq!(addresses(&ask("DB-1.env78.internal.", RecordType::A, tcp)), [both[0]]);
        }
        let firsts: Vec<_> = (0..2).map(|_| addresses(&ask("db.", RecordType::A, false))).collect();
        assert_ne!(firsts[0], firsts[1], "addresses should take turns");
        assert!(firsts.iter().all(|answer| answer.len() == 2));
        let none = ask("db.", RecordType::AAAA, false);
        assert_eq!((none.metadata.response_code, none.answers.len()), (ResponseCode::NoError, 0));
        let unknown = ask("nobody.env78.internal.", RecordType::A, false);
        assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
        if index == 0 {
            assert_eq!(ask("example.org.", RecordType::A, false).queries.len(), 1);
        }
    }
    echo.join().unwrap();
    // A name that goes away is not answered any more.
    env.containers[1].names = vec![];
    apply(&world, &[&env]);
    assert_eq!(addresses(&ask(&env.containers[0].space, env.gateway(), "db.", RecordType::A, false)), [both[0]]);
}

/// A server that tells each client the address it came from, `clients` times.
fn whoami(space: &Space, port: u16, clients: usize) -> thread::JoinHandle<()> {
    let listener = space.inside(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
    thread::spawn(move || {
        for _ in 0..clients {
            let (mut stream, from) = listener.accept().unwrap();
            let own = stream.local_addr().unwrap().ip();
            write!(stream, "{own} {}", from.ip()).unwrap();
        }
    })
}

/// What the server said: its own address and the one it saw.
fn visit(space: &Space, to: Ipv4Addr, port: u16) -> Option<(Ipv4Addr, Ipv4Addr)> {
    space.inside(|| {
        let mut stream = TcpStream::connect_timeout(&(to, port).into(), PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (own, seen) = text.split_once(' ')?;
        Some((own.parse().ok()?, seen.parse().ok()?))
    })
}

#[test]
fn published_ports_lead_to_containers_on_any_host() {
    if !is_root() {
        return;
    }
    for bridge_nf in [true, false] {
        let world = World::with(3, vec![], bridge_nf);
        let mut env = Environment::new(79);
        env.start(&world, 1, &[]);
        env.start(&world, 2, &[]);
        let targets: Vec<_> = env.containers.iter().map(|container| (container.port.address, 80)).collect();
        let publish = |host_port, targets: &[(Ipv4Addr, u16)]| PublishedPort {
            host_port,
            protocol: Protocol::Tcp,
            targets: targets.to_vec(),
        };
        env.published = vec![publish(8080, &targets), publish(8081, &targets[..1]), publish(8082, &[])];
        apply(&world, &[&env]);
        let servers: Vec<_> = [6, 2].iter().zip(&env.containers).map(|(n, c)| whoami(&c.space, 80, *n)).collect();
        let ingress = &world.hosts[0];
        let seen = env.host_address(0);
        // From outside, in turn, and replies return to the ingress host.
        let mut answers: Vec<_> = (0..4).filter_map(|_| visit(&world.client, ingress.address, 8080)).collect();
        answers.sort_unstable();
        let first = (targets[0].0, seen);
        let second = (targets[1].0, seen);
        assert_eq!(answers, [first, first, second, second], "bridge_nf {bridge_nf}");
        assert_eq!(visit(&world.client, ingress.address, 8081), Some(first));
        // From the ingress host itself, also by its loopback address.
        assert_eq!(visit(&ingress.space, ingress.address, 8081), Some(first));
        assert_eq!(visit(&ingress.space, Ipv4Addr::LOCALHOST, 8081), Some(first));
        // From a container of the environment to its own published port, on its own host.
        let own = visit(&env.containers[0].space, world.hosts[1].address, 8081);
        assert_eq!(own, Some((targets[0].0, env.host_address(1))));
        // Without targets the host itself answers, and nobody listens there.
        assert_eq!(visit(&world.client, ingress.address, 8082), None);
        servers.into_iter().for_each(|server| server.join().unwrap());
    }
}

#[test]
fn egress_carries_the_hosts_address() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let mut env = Environment::new(80);
    env.start(&world, 1, &[]);
    apply(&world, &[&env]);
    let server = whoami(&world.client, 7000, 1);
    let answer = visit(&env.containers[0].space, CLIENT, 7000);
    assert_eq!(answer, Some((CLIENT, world.hosts[1].address)));
    server.join().unwrap();
}
