"""The two hosts between which CRIU and runc move: as a lab of godwit has them, with what these tools need.

           client                       each link: 10 Gbit/s by tbf both ways, as in a lab
             │
    ────── switch ──────
     │                │
    hostA           hostB               a bridge each, with an address for runc and the page server
     │                │
    guestA          guestB              where the program runs: eth0 (same address on both) and, for CRIU's pages, eth1

The guests' links are up from the start and know their neighbours; which of them gets frames is decided by
forwarding entries. Nothing is learned: a switch that learns would follow the first frame instead of us.
"""

from __future__ import annotations

import contextlib
import os
import time

from kernel import Forwarding, NetNamespace, Tap, packet_socket

GUEST_MAC, GUEST_ADDRESS = "02:00:00:00:00:05", "10.77.0.5"
CLIENT_MAC, CLIENT_ADDRESS = "02:00:00:00:00:09", "10.77.0.9"
HOST_ADDRESS = {"A": "10.78.0.11", "B": "10.78.0.12"}
PAGES_ADDRESS = {"A": "10.78.0.21", "B": "10.78.0.22"}
HOST_MAC = {"A": "02:00:00:00:01:0a", "B": "02:00:00:00:01:0b"}
PAGES_MAC = {"A": "02:00:00:00:02:0a", "B": "02:00:00:00:02:0b"}
# Ports of the client: another range for each move, in turns.
FIRST_PORT, PORTS, PORT_RANGES = 10_000, 9_000, 6
DRAIN_S = 5.0
# The same arithmetic as `godwit lab --link 10gbit`.
SHAPE = "tbf rate 10000000000bit burst 1250000 limit 26250000"


class PeerLab:
    """Makes all of it; `close` and also the end of the process remove it."""

    def __init__(self) -> None:
        self.switch, self.client = NetNamespace("switch"), NetNamespace("client")
        self.host = {side: NetNamespace(f"host{side}") for side in "AB"}
        self.guest = {side: NetNamespace(f"guest{side}") for side in "AB"}
        for network in (self.switch, self.client, *self.host.values(), *self.guest.values()):
            quiet = "net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6"
            network.call(lambda: [_write(f"/proc/sys/{name.replace('.', '/')}", "1") for name in quiet])
            network.ip("link set lo up\n")
        self.switch.ip("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set br0 up\n")
        _cable(self.switch, "client", self.client, "eth0", CLIENT_MAC)
        self.client.ip(
            f"addr add {CLIENT_ADDRESS}/24 dev eth0\n"
            f"neigh replace {GUEST_ADDRESS} lladdr {GUEST_MAC} dev eth0 nud permanent\n"
        )
        for side in "AB":
            self._make_side(side)
        self._fix_forwarding()
        for network, device in [(self.client, "eth0"), (self.switch, "client")] + [
            pair for side in "AB" for pair in ((self.host[side], "uplink"), (self.switch, f"port{side}"))
        ]:
            network.ip(f"qdisc replace dev {device} root {SHAPE}\n", "tc")
        self.park = Tap(self.host["B"], "park")
        self.host["B"].ip("link set park master br0\nlink set park up\n")
        self.host["B"].ip("link set dev park learning off\n", "bridge")
        self.sink = Tap(self.host["A"], "sink")
        self.host["A"].ip("link set sink master br0\nlink set sink up\n")
        self._moves = 0
        self._switching, self._arriving = Forwarding(self.switch), Forwarding(self.host["B"])
        self._leaving = Forwarding(self.host["A"])
        self._leaving.learn("uplink", "sink")
        self._switching.learn("portA", "portB")
        self._arriving.learn("park", "guest")
        self._deliver = packet_socket(self.host["B"], "guest")
        self.at_source()

    def _make_side(self, side: str) -> None:
        host, guest, other = self.host[side], self.guest[side], "B" if side == "A" else "A"
        host.ip(
            f"link add br0 address {HOST_MAC[side]} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n"
            f"link set br0 up\naddr add {HOST_ADDRESS[side]}/24 dev br0\n"
        )
        _cable(self.switch, f"port{side}", host, "uplink", None)
        host.ip("link set uplink master br0\n")
        _cable(host, "guest", guest, "eth0", GUEST_MAC)
        _cable(host, "pages", guest, "eth1", PAGES_MAC[side])
        guest.ip(
            f"addr add {GUEST_ADDRESS}/24 dev eth0\naddr add {PAGES_ADDRESS[side]}/24 dev eth1\n"
            f"neigh replace {CLIENT_ADDRESS} lladdr {CLIENT_MAC} dev eth0 nud permanent\n"
            f"neigh replace {PAGES_ADDRESS[other]} lladdr {PAGES_MAC[other]} dev eth1 nud permanent\n"
            "route replace 10.78.0.0/24 dev eth1 rto_min 2ms\n"
        )
        host.ip(f"neigh replace {HOST_ADDRESS[other]} lladdr {HOST_MAC[other]} dev br0 nud permanent\n")

    def _fix_forwarding(self) -> None:
        learning = "link set dev {} learning off\n"
        self.switch.ip("".join(learning.format(p) for p in ("client", "portA", "portB")), "bridge")
        entry = "fdb replace {} dev {} master static\n"
        commands = entry.format(CLIENT_MAC, "client")
        for side in "AB":
            commands += entry.format(HOST_MAC[side], f"port{side}") + entry.format(PAGES_MAC[side], f"port{side}")
            other = "B" if side == "A" else "A"
            inside = "".join(learning.format(p) for p in ("uplink", "guest", "pages"))
            inside += "".join(entry.format(m, "uplink") for m in (CLIENT_MAC, HOST_MAC[other], PAGES_MAC[other]))
            inside += entry.format(PAGES_MAC[side], "pages") + entry.format(GUEST_MAC, "guest")
            self.host[side].ip(inside, "bridge")
        self.switch.ip(commands, "bridge")

    def at_source(self) -> None:
        """Frames for the program go to host A; on host B they would wait."""
        self._drain()
        # No connection is taken for one of an earlier move, of which a guest may still know.
        self._moves += 1
        first = FIRST_PORT + self._moves % PORT_RANGES * PORTS
        ports = f"{first} {first + PORTS - 1}"
        self.client.call(lambda: _write("/proc/sys/net/ipv4/ip_local_port_range", ports))
        self._leaving.point(CLIENT_MAC, "uplink")
        self._arriving.point(GUEST_MAC, "park")
        self._switching.point(GUEST_MAC, "portA")
        self.park.frames()

    def _drain(self) -> None:
        """Waits for the end of what an earlier move's connections still say to each other. Without an answer to its
        last word a socket stays for minutes, and CRIU cannot restore another with the same addresses."""
        deadline = time.monotonic() + DRAIN_S
        while self.guest["B"].call(_open_connections) and time.monotonic() < deadline:
            time.sleep(0.02)

    def park_at_target(self) -> None:
        """From now on frames for the program go to host B and wait there: none meets a namespace without its socket.

        To be called when it has stopped. Then nothing may leave the source any more: its kernel goes on repeating
        what nobody acknowledges, with later TCP timestamps than the restored socket's, which the client would
        then refuse as old for as long as the move took.
        """
        self._switching.point(GUEST_MAC, "portB")
        self._leaving.point(CLIENT_MAC, "sink")

    def deliver(self) -> int:
        """Hands the waiting frames to the program's new place, and all later ones."""
        frames = self.park.frames()
        for frame in frames:
            self._deliver.send(frame)
        self._arriving.point(GUEST_MAC, "guest")
        late = self.park.frames()
        for frame in late:
            self._deliver.send(frame)
        return len(frames) + len(late)

    def bytes_sent(self) -> int:
        """What host A has sent over its link so far."""

        def read() -> int:
            with open("/proc/thread-self/net/dev", encoding="ascii") as table:
                line = next(line for line in table if line.strip().startswith("uplink:"))
            return int(line.split(":")[1].split()[8])

        return self.host["A"].call(read)

    def close(self) -> None:
        for part in (self._switching, self._arriving, self._leaving, self._deliver, self.park, self.sink):
            with contextlib.suppress(OSError):
                part.close()
        for network in (*self.guest.values(), *self.host.values(), self.client, self.switch):
            network.close()


def _write(path: str, text: str) -> None:
    with contextlib.suppress(FileNotFoundError), open(path, "w", encoding="ascii") as file:
        file.write(text)


def _open_connections() -> bool:
    """Whether this network namespace has a TCP socket that neither listens nor only waits for its time to be over."""
    with open("/proc/thread-self/net/tcp", encoding="ascii") as table:
        return any(line.split()[3] not in ("06", "0A") for line in list(table)[1:])


def _cable(near: NetNamespace, port: str, far: NetNamespace, device: str, mac: str | None) -> None:
    """A veth from a bridge's port to a device elsewhere, both up."""
    address = f"address {mac} " if mac else ""
    path = f"/proc/{os.getpid()}/fd/{far.fd}"
    near.ip(
        f"link add {port} type veth peer name {device} {address}netns {path}\n"
        f"link set {port} master br0\nlink set {port} up\n"
    )
    far.ip(f"link set {device} up\n")


def settle() -> None:
    """Time for what the kernel does once a second about links that came up."""
    time.sleep(1.2)
