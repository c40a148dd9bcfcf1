//! Talkers that number what they say, and a "container" that answers every word: what was lost or overtaken shows.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_network::{Protocol, PublishedPort};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use crate::lab::{Environment, Space, World, apply, until};
use crate::wire::PATIENCE;

pub const PORT: u16 = 9000;
/// Pause between two words of a talker.
const PACE: Duration = Duration::from_millis(1);
/// How long nothing comes to a socket before it counts as empty. Twice what a frame takes on a loaded machine and more.
const EMPTY: Duration = Duration::from_millis(100);
/// How long the server waits for a word before it looks whether it should stop.
const GLANCE: Duration = Duration::from_millis(5);

/// Who sent it and its number.
pub type Word = (u8, u32);

fn encode((talker, number): Word) -> [u8; 5] {
    let [a, b, c, d] = number.to_be_bytes();
    [talker, a, b, c, d]
}

fn decode(bytes: &[u8]) -> Word {
    (bytes[0], u32::from_be_bytes(bytes[1..5].try_into().unwrap()))
}

/// An environment with a server on host 0 and a talker on each host, and the server published on each host.
pub fn stage(world: &World, vni: u32) -> Environment {
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

/// A container on each host, and an outside client by each host's published port.
pub struct Talkers {
    all: Vec<Talker>,
    stop: Arc<AtomicBool>,
}

struct Talker {
    sent: Arc<AtomicU32>,
    /// Number of the newest answer and one.
    answered: Arc<AtomicU32>,
    thread: JoinHandle<Vec<u32>>,
}

/// What became of one talker's words.
pub struct Told {
    pub sent: u32,
    pub heard: Vec<u32>,
    pub answers: Vec<u32>,
}

impl Talkers {
    pub fn start(world: &World, env: &Environment) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let server = (env.containers[0].port.address, PORT);
        let inside = env.containers[1..].iter().map(|container| (&container.space, server));
        let outside = world.hosts.iter().map(|host| (&world.client, (host.address, PORT)));
        let all = inside.chain(outside).zip(0..).map(|((space, to), talker)| talk(space, talker, to, &stop));
        Self { all: all.collect(), stop }
    }

    /// How many words each has sent.
    pub fn sent(&self) -> Vec<u32> {
        self.all.iter().map(|talker| talker.sent.load(Ordering::SeqCst)).collect()
    }

    /// Returns when each has had an answer to a word it said after this call.
    pub fn wait_for_answers(&self) {
        for (number, (talker, said)) in self.all.iter().zip(self.sent()).enumerate() {
            until(&format!("an answer to talker {number}"), || {
                (talker.answered.load(Ordering::SeqCst) > said).then_some(())
            });
        }
    }

    /// Returns when each has said some more.
    pub fn wait_for_words(&self) {
        for (talker, said) in self.all.iter().zip(self.sent()) {
            until("more words", || (talker.sent.load(Ordering::SeqCst) > said + 20).then_some(()));
        }
    }

    /// Waits for the last answers, stops the server, and sorts what happened by talker.
    pub fn finish(self, mut heard: Vec<Word>, server: Server) -> Vec<Told> {
        self.stop.store(true, Ordering::SeqCst);
        let results: Vec<(u32, Vec<u32>)> = self
            .all
            .into_iter()
            .map(|talker| (talker.thread.join().unwrap(), talker.sent.load(Ordering::SeqCst)))
            .map(|(answers, sent)| (sent, answers))
            .collect();
        heard.extend(server.freeze().0);
        let mut by_talker: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        for (talker, number) in heard {
            by_talker.entry(talker.into()).or_default().push(number);
        }
        let told = results.into_iter().enumerate().map(|(talker, (sent, answers))| Told {
            sent,
            answers,
            heard: by_talker.remove(&talker).unwrap_or_default(),
        });
        told.collect()
    }
}

/// Sends a numbered word each millisecond until told to stop, and then waits for the answers that are due: all of them,
/// or the last one and then nothing for a while.
fn talk(space: &Space, talker: u8, to: (Ipv4Addr, u16), stop: &Arc<AtomicBool>) -> Talker {
    let socket = space.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.connect(to).unwrap();
    make_room(&socket);
    socket.set_nonblocking(true).unwrap();
    let (sent, answered) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (stop, said, last) = (stop.clone(), sent.clone(), answered.clone());
    let thread = thread::spawn(move || {
        let (mut number, mut answers, mut end) = (0, Vec::new(), None);
        let mut newest = Instant::now();
        let mut buffer = [0; 64];
        loop {
            if stop.load(Ordering::SeqCst) {
                let end = *end.get_or_insert(Instant::now() + PATIENCE);
                let quiet = last.load(Ordering::SeqCst) == number && newest.elapsed() > 2 * EMPTY;
                if answers.len() >= number as usize || quiet || Instant::now() > end {
                    return answers;
                }
            } else if socket.send(&encode((talker, number))).is_ok() {
                number += 1;
                said.store(number, Ordering::SeqCst);
            }
            while let Ok(length) = socket.recv(&mut buffer) {
                let (from, number) = decode(&buffer[..length]);
                assert_eq!(from, talker, "an answer meant for another");
                answers.push(number);
                last.fetch_max(number + 1, Ordering::SeqCst);
                newest = Instant::now();
            }
            thread::sleep(PACE);
        }
    });
    Talker { sent, answered, thread }
}

/// All that waited arrives at once, words as well as answers: a socket with room for less would drop what the network
/// delivered.
fn make_room(socket: &UdpSocket) {
    setsockopt(socket, RcvBufForce, &(64 << 20)).unwrap();
}

/// Answers every word until it is frozen.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Vec<Word>, UdpSocket)>,
}

impl Server {
    /// A socket for it in `space`; what arrives before [`Server::start`] waits in it.
    pub fn bind(space: &Space) -> UdpSocket {
        let socket = space.inside(|| UdpSocket::bind(("0.0.0.0", PORT)).unwrap());
        make_room(&socket);
        socket
    }

    pub fn start(socket: UdpSocket) -> Self {
        socket.set_read_timeout(Some(GLANCE)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let (mut heard, mut buffer) = (Vec::new(), [0; 64]);
            while !stopped.load(Ordering::SeqCst) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    heard.push(decode(&buffer[..length]));
                    socket.send_to(&buffer[..length], from).unwrap();
                }
            }
            (heard, socket)
        });
        Self { stop, thread }
    }

    /// What it heard and answered, and its socket with all that it did not read.
    pub fn freeze(self) -> (Vec<Word>, UdpSocket) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// What the frozen socket had received but not read: carried over and answered at the destination, as a checkpoint
/// would do it.
pub fn unread(socket: &UdpSocket) -> Vec<(Word, SocketAddr)> {
    socket.set_read_timeout(Some(EMPTY)).unwrap();
    let (mut carried, mut buffer) = (Vec::new(), [0; 64]);
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        carried.push((decode(&buffer[..length]), from));
    }
    carried
}

/// Answers from the restored socket what was carried over.
pub fn answer(socket: &UdpSocket, carried: &[(Word, SocketAddr)]) -> Vec<Word> {
    for (word, from) in carried {
        socket.send_to(&encode(*word), from).unwrap();
    }
    carried.iter().map(|(word, _)| *word).collect()
}

/// Every word was heard and answered, once and in order.
pub fn assert_complete(told: Vec<Told>, what: &str) {
    for (talker, Told { sent, heard, answers }) in told.into_iter().enumerate() {
        let all: Vec<u32> = (0..sent).collect();
        assert!(sent > 0, "talker {talker} said nothing ({what})");
        assert_eq!(first_difference(&heard, &all), None, "server heard talker {talker} ({what})");
        assert_eq!(first_difference(&answers, &all), None, "talker {talker} was answered ({what})");
    }
}

/// Where two lists part.
#[derive(Debug, PartialEq)]
pub struct Difference {
    at: usize,
    got: Vec<u32>,
    want: Vec<u32>,
    lengths: (usize, usize),
}

pub fn first_difference(got: &[u32], want: &[u32]) -> Option<Difference> {
    let at = (0..got.len().max(want.len())).find(|at| got.get(*at) != want.get(*at))?;
    let from = |list: &[u32]| list.iter().skip(at).take(8).copied().collect();
    Some(Difference { at, got: from(got), want: from(want), lengths: (got.len(), want.len()) })
}
