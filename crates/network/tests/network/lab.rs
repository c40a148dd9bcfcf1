//! A small world that is gone when the test process is: every namespace is held by a process that dies with it.

use std::fs::{self, File};
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use godwit_network::{
    Endpoint, EnvironmentNetwork, GATEWAY_MAC, HostNetwork, HostNetworkConfig, Location, Mac, NetworkError, Parking,
    Port, PublishedPort, Subnet,
};
use nix::sched::{CloneFlags, setns};

use crate::wire::{PATIENCE, ping};

pub const MTU: u32 = 1450;
/// How long what must not be answered is listened for. Shorter than it takes on a loaded machine makes such a test
/// weaker, never wrong.
pub const SILENCE: Duration = Duration::from_millis(500);
/// Pause between two looks at something that does not tell by itself.
const LOOK: Duration = Duration::from_millis(2);

/// False, with the word why, if the tests of this file cannot run.
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

/// Waits for what `look` returns, and fails with `what` if it does not come within [`PATIENCE`].
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        thread::sleep(LOOK);
    }
}

/// A network namespace and the process that holds it.
pub struct Space {
    process: Child,
    pub pid: u32,
}

impl Space {
    /// `owned`: in a user namespace of its own, as a container's is.
    pub fn new(owned: bool) -> Self {
        let user: &[&str] = if owned { &["--user", "--map-root-user"] } else { &[] };
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net"])
            .args(user)
            .args(["sh", "-c", "echo ready; exec sleep 3600"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("setpriv and unshare are there");
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the namespace was not made");
        Self { pid: process.id(), process }
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let net = format!("--net=/proc/{}/ns/net", self.pid);
        Command::new("nsenter").arg(net).arg(program).args(arguments).output().unwrap()
    }

    /// Runs a command line (no quoting) and returns its output; it must succeed.
    pub fn sh(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let output = self.run(words[0], &words[1..]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn ok(&self, line: &str) -> bool {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.run(words[0], &words[1..]).status.success()
    }

    /// Whether one echo request is answered, however late: a lost one is not sent again.
    pub fn pings(&self, address: Ipv4Addr) -> bool {
        self.inside(|| ping(address, 56, PATIENCE))
    }

    /// Whether an echo request stays without an answer for longer than any answer takes.
    pub fn no_answer_from(&self, address: Ipv4Addr) -> bool {
        !self.inside(|| ping(address, 56, SILENCE))
    }

    /// Runs `work` on a thread in this namespace and waits for it.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = self.namespace();
        let body = move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(body).join()).unwrap()
    }

    pub fn namespace(&self) -> File {
        File::open(format!("/proc/{}/ns/net", self.pid)).unwrap()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A host: a namespace with `eth0` on the fabric, and a runtime whose threads live in it.
pub struct Host {
    pub network: HostNetwork,
    pub space: Space,
    pub address: Ipv4Addr,
    runtime: tokio::runtime::Runtime,
}

impl Host {
    fn new(fabric: &Space, number: u8, resolvers: Vec<SocketAddr>, bridge_nf: bool) -> Self {
        let space = Space::new(false);
        let address = join(fabric, &space, number);
        let knob = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        let runtime = space.inside(|| {
            if fs::exists(knob).unwrap() {
                fs::write(knob, if bridge_nf { "1" } else { "0" }).unwrap();
            }
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
        });
        let config = HostNetworkConfig { tunnel_address: address, uplink: Some("eth0".into()), resolvers };
        let network = runtime.block_on(runtime.spawn(HostNetwork::open(config))).unwrap().unwrap();
        Self { network, space, address, runtime }
    }

    /// Runs `work` on the host's own threads.
    pub fn on<F, T>(&self, work: impl FnOnce(HostNetwork) -> F) -> T
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        self.runtime.block_on(self.runtime.spawn(work(self.network.clone()))).unwrap()
    }

    pub fn apply(&self, wanted: &[EnvironmentNetwork]) {
        let wanted = wanted.to_vec();
        let errors = self.on(|network| async move { network.apply(&wanted).await });
        assert!(errors.is_empty(), "{errors:?}");
    }

    pub fn attach(&self, port: &Port, pid: u32) {
        let port = port.clone();
        self.on(|network| async move { network.attach(&port, pid).await }).unwrap();
    }

    pub fn plug(&self, id: &str) {
        let id = id.to_owned();
        self.on(|network| async move { network.plug(&id).await }).unwrap();
    }

    pub fn mute(&self, id: &str) {
        let id = id.to_owned();
        self.on(|network| async move { network.mute(&id).await }).unwrap();
    }

    pub fn unplug(&self, id: &str) {
        let id = id.to_owned();
        self.on(|network| async move { network.unplug(&id).await }).unwrap();
    }

    pub fn detach(&self, id: &str) {
        let id = id.to_owned();
        self.on(|network| async move { network.detach(&id).await }).unwrap();
    }

    pub fn park(&self, port: &Port) -> Result<Parking, NetworkError> {
        let port = port.clone();
        self.on(|network| async move { network.park(&port).await })
    }

    pub fn prepare_divert(&self, port: &Port) {
        let (mac, vni) = (port.mac, port.vni);
        self.on(|network| async move { network.prepare_divert(mac, vni).await }).unwrap();
    }

    pub fn divert(&self, port: &Port, to: Ipv4Addr) {
        let (mac, vni) = (port.mac, port.vni);
        self.on(|network| async move { network.divert(mac, vni, to).await }).unwrap();
    }

    pub fn leftovers(&self) -> Vec<String> {
        self.on(|network| async move { network.leftovers().await }).unwrap()
    }

    /// The forwarding entries, sorted.
    pub fn entries(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.space.sh("bridge fdb show").lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    }

    pub fn rules(&self) -> String {
        self.space.sh("nft -s list ruleset")
    }
}

fn join(fabric: &Space, space: &Space, number: u8) -> Ipv4Addr {
    let (name, address) = (format!("p{number}"), Ipv4Addr::new(192, 0, 2, number));
    space.sh(&format!("ip link add eth0 type veth peer name {name} netns {}", fabric.pid));
    fabric.sh(&format!("ip link set {name} master br0 up"));
    space.sh("ip link set lo up");
    space.sh(&format!("ip addr add {address}/24 dev eth0"));
    space.sh("ip link set eth0 up");
    address
}

/// Hosts 192.0.2.1, .2, … and an outside client 192.0.2.100 on one bridge.
pub struct World {
    pub hosts: Vec<Host>,
    pub client: Space,
    _fabric: Space,
}

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);

impl World {
    pub fn new(hosts: u8) -> Self {
        Self::with(hosts, vec![], true)
    }

    pub fn with(hosts: u8, resolvers: Vec<SocketAddr>, bridge_nf: bool) -> Self {
        let fabric = Space::new(false);
        fabric.sh("ip link add br0 type bridge");
        fabric.sh("ip link set br0 up");
        let client = Space::new(false);
        join(&fabric, &client, 100);
        let hosts = (1..=hosts).map(|number| Host::new(&fabric, number, resolvers.clone(), bridge_nf)).collect();
        Self { hosts, client, _fabric: fabric }
    }
}

/// A container and where it is.
pub struct Container {
    pub space: Space,
    pub port: Port,
    pub host: usize,
    pub names: Vec<String>,
}

/// One environment over all hosts of a world: knows what each should be told.
pub struct Environment {
    pub vni: u32,
    pub containers: Vec<Container>,
    pub published: Vec<PublishedPort>,
}

impl Environment {
    pub fn new(vni: u32) -> Self {
        Self { vni, containers: vec![], published: vec![] }
    }

    /// 10.VNI.0.0/20, gateway .1, hosts .2 and up, containers 10.VNI.1.1 and up.
    pub fn ip(&self, third: u8, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.vni.try_into().unwrap(), third, last)
    }

    pub fn gateway(&self) -> Ipv4Addr {
        self.ip(0, 1)
    }

    pub fn host_address(&self, host: usize) -> Ipv4Addr {
        self.ip(0, 2 + u8::try_from(host).unwrap())
    }

    pub fn port(&self, number: u8) -> Port {
        let vni = u8::try_from(self.vni).unwrap();
        Port {
            id: format!("{:08x}{:04x}", self.vni * 256 + u32::from(number), number),
            vni: self.vni,
            mac: Mac([2, 0, 0, 0, vni, number]),
            address: self.ip(1, number),
            prefix_len: 20,
            gateway: self.gateway(),
            mtu: MTU,
            neighbours: vec![(self.gateway(), GATEWAY_MAC)],
        }
    }

    /// Starts a container on `host` and plugs it in; [`Environment::apply`] makes it known.
    pub fn start(&mut self, world: &World, host: usize, names: &[&str]) -> usize {
        let port = self.port(u8::try_from(self.containers.len()).unwrap() + 1);
        let space = Space::new(true);
        world.hosts[host].attach(&port, space.pid);
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        self.containers.push(Container { space, port, host, names });
        self.containers.len() - 1
    }

    /// What `host` is told while container 0 is said to be on host `first_on`.
    pub fn view_if(&self, world: &World, host: usize, first_on: usize) -> EnvironmentNetwork {
        let mut view = self.view(world, host);
        let there = world.hosts[first_on].address;
        view.endpoints[0].at = if first_on == host { Location::Local } else { Location::Remote(there) };
        view
    }

    pub fn view(&self, world: &World, host: usize) -> EnvironmentNetwork {
        let at = |other: usize| {
            if other == host { Location::Local } else { Location::Remote(world.hosts[other].address) }
        };
        let endpoints = self.containers.iter().map(|container| Endpoint {
            mac: container.port.mac,
            address: container.port.address,
            at: at(container.host),
            names: container.names.clone(),
        });
        let others = world.hosts.iter().map(|other| other.address).filter(|other| *other != world.hosts[host].address);
        EnvironmentNetwork {
            vni: self.vni,
            subnet: Subnet::new(self.ip(0, 0), 20).unwrap(),
            gateway: self.gateway(),
            host_address: self.host_address(host),
            mtu: MTU,
            domain: format!("env{}.internal", self.vni),
            remotes: others.collect(),
            endpoints: endpoints.collect(),
            ports: self.published.clone(),
        }
    }
}

/// Tells every host everything, and plugs what is not plugged.
pub fn apply(world: &World, environments: &[&Environment]) {
    for (number, host) in world.hosts.iter().enumerate() {
        let views: Vec<_> = environments.iter().map(|environment| environment.view(world, number)).collect();
        host.apply(&views);
    }
    for container in environments.iter().flat_map(|environment| &environment.containers) {
        world.hosts[container.host].plug(&container.port.id);
    }
}
