"""Namespaces, netlink and raw devices, without starting a program for each.

Starting `ip` or `nsenter` costs milliseconds. Inside a move they would be counted against the system that is
measured, so what has to happen there is done by system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

CLONE_NEWNS = 0x0002_0000
CLONE_NEWNET = 0x4000_0000
PR_SET_PDEATHSIG = 1
MS_PRIVATE_RECURSIVE = (1 << 18) | 0x4000
MNT_DETACH = 2
TUNSETIFF = 0x4004_54CA
IFF_TAP_NO_PI = 0x1002

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def setns(fd: int) -> None:
    """Enters a namespace: the calling thread only."""
    _check(_libc.setns(fd, 0), "setns")


def mount(source: str, target: str, kind: str, data: str = "") -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), 0, data.encode()), f"mount {target}")


def bind(source: str, target: str) -> None:
    _check(_libc.mount(source.encode(), target.encode(), None, 0x1000, None), f"bind {source} to {target}")


def umount(target: str) -> None:
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def enter_private_mounts() -> int:
    """Gives this process mounts of its own and returns a descriptor of those it had.

    All that is mounted for the benchmark vanishes with it, however it ends.
    """
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, MS_PRIVATE_RECURSIVE, None), "make mounts private")
    return before


class NetNamespace:
    """A network namespace that lasts as long as its descriptor is open or a process is in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = -1

        def make() -> None:
            _check(_libc.unshare(CLONE_NEWNET), "unshare")
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        _in_thread(make)

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function inside; only this process's main thread keeps its own network."""
        return _in_thread(lambda: (setns(self.fd), function())[1])

    def ip(self, commands: str, program: str = "ip") -> None:
        """Runs lines of `ip`, `bridge` or `tc` commands inside."""
        done = run([program, "-batch", "-"], network=self, input=commands)
        if done.returncode:
            raise RuntimeError(f"{program} in {self.name}: {done.stderr.strip()}")

    def index(self, device: str) -> int:
        return self.call(lambda: socket.if_nametoindex(device))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _in_thread(function: Callable[[], T]) -> T:
    """Namespaces belong to threads: one that changes its own is thrown away afterwards."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001: it is raised again below
            failure.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _entering(network: NetNamespace | None, mounts: int | None, dies: bool) -> Callable[[], None]:
    net_fd = network.fd if network else None

    def enter() -> None:
        if net_fd is not None:
            setns(net_fd)
        if mounts is not None:
            setns(mounts)
        if dies:
            # A benchmark that is killed leaves no helper behind.
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return enter


def start(
    command: Sequence[str],
    network: NetNamespace | None = None,
    mounts: int | None = None,
    dies: bool = True,
    **options: Any,
) -> subprocess.Popen[str]:
    """Starts a program in a network and a mount namespace."""
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(command, text=True, preexec_fn=_entering(network, mounts, dies), **options)


def run(
    command: Sequence[str],
    network: NetNamespace | None = None,
    mounts: int | None = None,
    timeout: float = 120.0,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end and keeps what it wrote."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run(
        command, text=True, timeout=timeout, preexec_fn=_entering(network, mounts, True), **options
    )


def wait(process: subprocess.Popen[str], seconds: float) -> int:
    """Waits for a program's end and returns at once when it comes; `Popen.wait` looks every 50 ms only."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            if not select.select([pidfd], [], [], seconds)[0]:
                raise TimeoutError(f"{process.args} does not end")
        finally:
            os.close(pidfd)
    return process.wait()


class Forwarding:
    """Sets fixed entries of one bridge port's forwarding table, each known to hold when the call returns."""

    def __init__(self, network: NetNamespace) -> None:
        self._network = network
        self._socket = network.call(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        self._indexes: dict[str, int] = {}

    def learn(self, *ports: str) -> None:
        """Looks up ports before time matters."""
        for port in ports:
            self._indexes[port] = self._network.index(port)

    def point(self, mac: str, port: str) -> None:
        """Frames to `mac` leave by `port` from now on."""
        new_neighbour, flags = 28, 0x1 | 0x4 | 0x100 | 0x400  # request, acknowledge, replace, create
        address = bytes.fromhex(mac.replace(":", ""))
        body = struct.pack("=BxxxiHBB", 7, self._indexes[port], 0x40, 0x04, 0)  # AF_BRIDGE, NUD_NOARP, NTF_MASTER
        body += struct.pack("=HH", 10, 2) + address + b"\0\0"  # NDA_LLADDR
        self._socket.send(struct.pack("=IHHII", 16 + len(body), new_neighbour, flags, 1, 0) + body)
        answer = self._socket.recv(4096)
        error = struct.unpack_from("=i", answer, 16)[0]
        if error:
            raise OSError(-error, f"forwarding {mac} to {port}: {os.strerror(-error)}")

    def close(self) -> None:
        self._socket.close()


class Tap:
    """A device whose frames wait until they are read: its queue is where a moving program's frames are parked.

    Reading completes checksums that the sender left to the hardware, which a packet socket on a veth would not.
    """

    def __init__(self, network: NetNamespace, name: str) -> None:
        self.name = name

        def make() -> int:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP_NO_PI))
            return fd

        self.fd = network.call(make)

    def frames(self) -> list[bytes]:
        """Takes all frames that wait."""
        taken = []
        while True:
            try:
                taken.append(os.read(self.fd, 65_536))
            except BlockingIOError:
                return taken

    def close(self) -> None:
        os.close(self.fd)


def packet_socket(network: NetNamespace, device: str) -> socket.socket:
    """A socket that puts whole frames on a device."""

    def make() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        raw.bind((device, 0))
        return raw

    return network.call(make)
