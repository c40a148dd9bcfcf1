//! What must not get through: to other environments, to the host, as somebody else.

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use godwit_network::{GATEWAY_MAC, Mac};

use crate::lab::{Environment, Space, World, apply, is_root};
use crate::wire::{Listener, arp, ethernet, send_frames, udp};

const BROADCAST: Mac = Mac([0xff; 6]);
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const QUIET: Duration = Duration::from_millis(150);
const SOON: Duration = Duration::from_secs(2);

#[test]
fn a_container_cannot_speak_as_another() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let mut env = Environment::new(85);
    let (attacker, near, far) = (env.start(&world, 0, &[]), env.start(&world, 0, &[]), env.start(&world, 1, &[]));
    apply(&world, &[&env]);
    let who = |index: usize| (env.containers[index].port.mac, env.containers[index].port.address);
    let (me, victim) = (who(attacker), who(near));
    let stranger: Mac = Mac([2, 0, 0, 0, 9, 9]);
    for listener_at in [near, far] {
        let target = who(listener_at);
        let listener = env.containers[listener_at].space.inside(Listener::open);
        let say = |from: Ipv4Addr, mark: &[u8]| udp((from, 1000), (target.1, 1000), mark);
        let tagged = [&[0, 1, 8, 0][..], &say(me.1, b"tagged-vlan")].concat();
        let stp = Mac([0x01, 0x80, 0xc2, 0, 0, 0]);
        let dhcp = udp((me.1, 67), (target.1, 68), b"dhcp-server");
        let foreign = if listener_at == near { who(far) } else { victim };
        let cases: [(&[u8], Vec<u8>); 11] = [
            (b"foreign-mac", ethernet(target.0, foreign.0, IPV4, &say(me.1, b"foreign-mac"))),
            (b"unknown-mac", ethernet(target.0, stranger, IPV4, &say(me.1, b"unknown-mac"))),
            (b"foreign-ip", ethernet(target.0, me.0, IPV4, &say(foreign.1, b"foreign-ip"))),
            (b"gateway-ip", ethernet(target.0, me.0, IPV4, &say(env.gateway(), b"gateway-ip"))),
            (b"gateway-mac", ethernet(target.0, GATEWAY_MAC, IPV4, &say(me.1, b"gateway-mac"))),
            (b"arp-for-other", ethernet(BROADCAST, me.0, ARP, &arp(2, (me.0, foreign.1), target, b"arp-for-other"))),
            (b"arp-gateway", ethernet(target.0, me.0, ARP, &arp(2, (me.0, env.gateway()), target, b"arp-gateway"))),
            (b"arp-mac", ethernet(target.0, me.0, ARP, &arp(2, (foreign.0, me.1), target, b"arp-mac"))),
            (b"ipv6-packet", ethernet(target.0, me.0, 0x86dd, b"`\0\0\0\0\x0b;\x40 ipv6-packet and more, quite long")),
            (b"tagged-vlan", ethernet(target.0, me.0, 0x8100, &tagged)),
            (b"dhcp-server", ethernet(target.0, me.0, IPV4, &dhcp)),
        ];
        for (mark, frame) in cases {
            env.containers[attacker].space.inside(|| send_frames(&[frame.clone()]));
            let name = String::from_utf8_lossy(mark);
            assert!(!listener.hears(mark, QUIET), "{name} arrived at {}", target.1);
        }
        let frame = ethernet(stp, me.0, 0x0027, b"spanning-tree, long enough to be a frame");
        env.containers[attacker].space.inside(|| send_frames(&[frame]));
        assert!(!listener.hears(b"spanning-tree", QUIET));
        // The same way is open for what is honest, so the silence above meant something.
        let honest = [
            ethernet(target.0, me.0, IPV4, &say(me.1, b"honest-packet")),
            ethernet(BROADCAST, me.0, ARP, &arp(1, me, (Mac([0; 6]), target.1), b"honest-question")),
        ];
        env.containers[attacker].space.inside(|| send_frames(&honest));
        assert!(listener.hears(b"honest-packet", SOON));
        assert!(listener.hears(b"honest-question", SOON));
    }
    // Questions about the gateway stay on their host: only the local gateway may answer.
    let listener = env.containers[far].space.inside(Listener::open);
    let question = ethernet(BROADCAST, me.0, ARP, &arp(1, me, (Mac([0; 6]), env.gateway()), b"who-is-gateway"));
    env.containers[attacker].space.inside(|| send_frames(&[question]));
    assert!(!listener.hears(b"who-is-gateway", QUIET));
}

fn connects(space: &Space, to: Ipv4Addr, port: u16) -> bool {
    space.inside(|| TcpStream::connect_timeout(&(to, port).into(), Duration::from_millis(300)).is_ok())
}

#[test]
fn environments_and_hosts_are_out_of_reach() {
    if !is_root() {
        return;
    }
    for bridge_nf in [true, false] {
        let world = World::with(2, vec![], bridge_nf);
        let (mut one, mut two) = (Environment::new(86), Environment::new(87));
        one.start(&world, 0, &[]);
        two.start(&world, 0, &[]);
        two.start(&world, 1, &[]);
        apply(&world, &[&one, &two]);
        let inside = &one.containers[0].space;
        for other in &two.containers {
            let _listener = other.space.inside(|| TcpListener::bind("0.0.0.0:80").unwrap());
            assert!(!inside.pings(other.port.address));
            assert!(!connects(inside, other.port.address, 80));
            // By force: the other's address on the own wire, sent to the gateway.
            inside.sh(&format!("ip route replace {}/32 dev eth0", other.port.address));
            inside.sh(&format!("ip neigh replace {} lladdr {GATEWAY_MAC} dev eth0", other.port.address));
            assert!(!inside.pings(other.port.address));
        }
        assert!(two.containers[0].space.pings(two.containers[1].port.address));
        // The host's own services, by each of its addresses.
        let host = &world.hosts[0];
        let _services = host.space.inside(|| TcpListener::bind("0.0.0.0:2222").unwrap());
        let addresses = [host.address, one.gateway(), one.host_address(0), two.gateway(), two.host_address(0)];
        for address in addresses {
            assert!(!connects(inside, address, 2222), "{address}");
        }
        assert!(!inside.pings(two.gateway()));
        assert!(connects(&world.client, host.address, 2222), "the host must stay open to its own network");
        // Another host's services, and a forged overlay packet to it.
        let other = &world.hosts[1];
        let _more = other.space.inside(|| TcpListener::bind("0.0.0.0:2222").unwrap());
        assert!(!connects(inside, other.address, 2222));
        let target = &two.containers[1];
        let listener = target.space.inside(Listener::open);
        let from = (two.containers[0].port.address, 1000);
        let packet = udp(from, (target.port.address, 1000), b"forged-overlay");
        let inner = ethernet(target.port.mac, two.containers[0].port.mac, IPV4, &packet);
        let vxlan = [&[8, 0, 0, 0, 0, 0, 87, 0][..], &inner].concat();
        let forge = |space: &Space| {
            space.inside(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                let _ = socket.send_to(&vxlan, (other.address, 4789));
            });
        };
        forge(inside);
        forge(&world.client);
        assert!(!listener.hears(b"forged-overlay", QUIET));
        forge(&host.space);
        assert!(listener.hears(b"forged-overlay", SOON), "the same packet from a host of the environment is real");
        // The outside cannot route into an environment.
        world.client.sh(&format!("ip route add 10.87.0.0/20 via {}", host.address));
        assert!(!world.client.pings(two.containers[0].port.address));
    }
}

#[test]
fn the_container_gets_its_settings() {
    if !is_root() {
        return;
    }
    let world = World::new(1);
    let mut env = Environment::new(88);
    env.start(&world, 0, &[]);
    apply(&world, &[&env]);
    let space = &env.containers[0].space;
    let setting = |key: &str| space.inside(|| std::fs::read_to_string(format!("/proc/sys/net/{key}"))).unwrap_or_default();
    assert_eq!(setting("ipv4/ip_unprivileged_port_start").trim(), "0");
    assert_eq!(setting("ipv4/ping_group_range").split_whitespace().next(), Some("0"));
    assert_eq!(setting("ipv6/conf/eth0/disable_ipv6").trim(), "1");
    assert!(matches!(setting("mptcp/enabled").trim(), "0" | ""));
    let link = space.sh("ip -o link show eth0");
    assert!(link.contains("mtu 1450") && link.contains(&env.containers[0].port.mac.to_string()), "{link}");
    let neighbour = space.sh("ip neigh show");
    assert!(neighbour.contains("PERMANENT"), "{neighbour}");
}
