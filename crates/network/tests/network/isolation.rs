//! What must not get through: to other environments, to the host, as somebody else.

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use godwit_network::{GATEWAY_MAC, Mac, host_mac};

use crate::lab::{Environment, SILENCE, Space, World, apply, is_root};
use crate::wire::{Listener, PATIENCE, arp, ethernet, send_frames, udp};

const BROADCAST: Mac = Mac([0xff; 6]);
const NOBODY: Mac = Mac([0; 6]);
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;

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
        let cases: [(&[u8], Vec<u8>); 13] = [
            (b"foreign-mac", ethernet(target.0, foreign.0, IPV4, &say(me.1, b"foreign-mac"))),
            (b"unknown-mac", ethernet(target.0, stranger, IPV4, &say(me.1, b"unknown-mac"))),
            (b"foreign-ip", ethernet(target.0, me.0, IPV4, &say(foreign.1, b"foreign-ip"))),
            (b"gateway-ip", ethernet(target.0, me.0, IPV4, &say(env.gateway(), b"gateway-ip"))),
            (b"gateway-mac", ethernet(target.0, GATEWAY_MAC, IPV4, &say(me.1, b"gateway-mac"))),
            (b"arp-for-other", ethernet(BROADCAST, me.0, ARP, &arp(2, (me.0, foreign.1), target, b"arp-for-other"))),
            (b"arp-asks-as", ethernet(BROADCAST, me.0, ARP, &arp(1, (me.0, foreign.1), target, b"arp-asks-as"))),
            (b"arp-host", ethernet(BROADCAST, me.0, ARP, &arp(2, (me.0, env.host_address(0)), target, b"arp-host"))),
            (b"arp-gateway", ethernet(target.0, me.0, ARP, &arp(2, (me.0, env.gateway()), target, b"arp-gateway"))),
            (b"arp-mac", ethernet(target.0, me.0, ARP, &arp(2, (foreign.0, me.1), target, b"arp-mac"))),
            (b"ipv6-packet", ethernet(target.0, me.0, 0x86dd, b"`\0\0\0\0\x0b;\x40 ipv6-packet and more, quite long")),
            (b"tagged-vlan", ethernet(target.0, me.0, 0x8100, &tagged)),
            (b"dhcp-server", ethernet(target.0, me.0, IPV4, &dhcp)),
        ];
        let spanning = ethernet(stp, me.0, 0x0027, b"spanning-tree, long enough to be a frame");
        let cases = cases.into_iter().chain([(&b"spanning-tree"[..], spanning)]);
        for (number, (mark, frame)) in cases.enumerate() {
            // The same way is open for what is honest, so the silence means something.
            let honest = format!("honest-packet-{number:02}");
            let behind = ethernet(target.0, me.0, IPV4, &say(me.1, honest.as_bytes()));
            env.containers[attacker].space.inside(|| send_frames(&[frame, behind]));
            let name = String::from_utf8_lossy(mark);
            assert_eq!(listener.first_of(&[mark, honest.as_bytes()]), Some(1), "{name} at {}", target.1);
        }
    }
}

/// Neighbours on the same host answer for themselves. For those of other hosts the bridge answers from what it was
/// told, so that a question needs nobody else's answer, and is answered during a move too.
#[test]
fn questions_are_answered_and_cross_hosts_only_where_they_must() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let mut env = Environment::new(89);
    let (asker, near, far) = (env.start(&world, 0, &[]), env.start(&world, 0, &[]), env.start(&world, 1, &[]));
    apply(&world, &[&env]);
    let who = |index: usize| (env.containers[index].port.mac, env.containers[index].port.address);
    let (me, space) = (who(asker), &env.containers[asker].space);
    let ears: Vec<Listener> = env.containers.iter().map(|container| container.space.inside(Listener::open)).collect();
    let question = |about: Ipv4Addr, mark: &[u8]| ethernet(BROADCAST, me.0, ARP, &arp(1, me, (NOBODY, about), mark));
    // Operation, sender: what an answer for `of` begins with.
    let answer = |of: (Mac, Ipv4Addr)| [&[0, 2][..], &of.0.0, &of.1.octets()].concat();
    let fence = |to: usize, mark: &[u8]| ethernet(who(to).0, me.0, IPV4, &udp((me.1, 1000), (who(to).1, 1000), mark));

    space.inside(|| send_frames(&[question(who(near).1, b"about-near"), fence(far, b"behind-near")]));
    assert!(ears[near].hears(b"about-near"));
    assert!(ears[asker].hears(&answer(who(near))));

    space.inside(|| send_frames(&[question(who(far).1, b"about-far"), fence(far, b"behind-far")]));
    assert!(ears[near].hears(b"about-far"), "who is local hears every honest question");
    assert!(ears[asker].hears(&answer(who(far))));
    assert_eq!(ears[far].first_of(&[b"about-far", b"behind-far"]), Some(1), "it was answered already");

    // The other host's own address is nobody's but its own: asked there, and answered from there.
    let other = (host_mac(world.hosts[1].address), env.host_address(1));
    space.inside(|| send_frames(&[question(other.1, b"about-host")]));
    assert!(ears[asker].hears(&answer(other)));

    // Questions about the gateway stay on their host: only the local gateway may answer.
    space.inside(|| send_frames(&[question(env.gateway(), b"about-gateway"), fence(far, b"behind-gateway")]));
    assert!(ears[asker].hears(&answer((GATEWAY_MAC, env.gateway()))));
    assert_eq!(ears[far].first_of(&[b"about-gateway", b"behind-gateway"]), Some(1));
}

fn connects(space: &Space, to: Ipv4Addr, port: u16, patience: Duration) -> bool {
    space.inside(|| TcpStream::connect_timeout(&(to, port).into(), patience).is_ok())
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
            assert!(inside.no_answer_from(other.port.address));
            assert!(!connects(inside, other.port.address, 80, SILENCE));
            // By force: the other's address on the own wire, sent to the gateway.
            inside.sh(&format!("ip route replace {}/32 dev eth0", other.port.address));
            inside.sh(&format!("ip neigh replace {} lladdr {GATEWAY_MAC} dev eth0", other.port.address));
            assert!(inside.no_answer_from(other.port.address));
        }
        assert!(two.containers[0].space.pings(two.containers[1].port.address));
        // The host's own services, by each of its addresses.
        let host = &world.hosts[0];
        let _services = host.space.inside(|| TcpListener::bind("0.0.0.0:2222").unwrap());
        let addresses = [host.address, one.gateway(), one.host_address(0), two.gateway(), two.host_address(0)];
        for address in addresses {
            assert!(!connects(inside, address, 2222, SILENCE), "{address}");
        }
        assert!(inside.no_answer_from(two.gateway()));
        assert!(connects(&world.client, host.address, 2222, PATIENCE), "the host must stay open to its own network");
        // Another host's services, and a forged overlay packet to it.
        let other = &world.hosts[1];
        let _more = other.space.inside(|| TcpListener::bind("0.0.0.0:2222").unwrap());
        assert!(!connects(inside, other.address, 2222, SILENCE));
        let target = &two.containers[1];
        let listener = target.space.inside(Listener::open);
        let from = (two.containers[0].port.address, 1000);
        let forge = |space: &Space, mark: &[u8]| {
            let packet = udp(from, (target.port.address, 1000), mark);
            let inner = ethernet(target.port.mac, two.containers[0].port.mac, IPV4, &packet);
            let vxlan = [&[8, 0, 0, 0, 0, 0, 87, 0][..], &inner].concat();
            space.inside(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                let _ = socket.send_to(&vxlan, (other.address, 4789));
            });
        };
        forge(inside, b"forged-overlay");
        forge(&world.client, b"forged-overlay");
        forge(&host.space, b"honest-overlay");
        let first = listener.first_of(&[b"forged-overlay", b"honest-overlay"]);
        assert_eq!(first, Some(1), "the same packet from a host of the environment is real");
        // The outside cannot route into an environment.
        world.client.sh(&format!("ip route add 10.87.0.0/20 via {}", host.address));
        assert!(world.client.no_answer_from(two.containers[0].port.address));
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
    let setting =
        |key: &str| space.inside(|| std::fs::read_to_string(format!("/proc/sys/net/{key}"))).unwrap_or_default();
    assert_eq!(setting("ipv4/ip_unprivileged_port_start").trim(), "0");
    assert_eq!(setting("ipv4/ping_group_range").split_whitespace().next(), Some("0"));
    assert_eq!(setting("ipv6/conf/eth0/disable_ipv6").trim(), "1");
    assert!(matches!(setting("mptcp/enabled").trim(), "0" | ""));
    let link = space.sh("ip -o link show eth0");
    assert!(link.contains("mtu 1450") && link.contains(&env.containers[0].port.mac.to_string()), "{link}");
    let neighbour = space.sh("ip neigh show");
    assert!(neighbour.contains("PERMANENT"), "{neighbour}");
}
