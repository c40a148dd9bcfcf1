"""Sends what CRIU leaves lying.

CRIU corks its connection to the page server and never pulls the cork: the last bytes of a dump, and sometimes bytes
in between, wait for the kernel's 200 ms. That is an oversight of CRIU and no property of stop and copy. So the
benchmark looks every few milliseconds whether bytes lie there while none are under way, and pushes them.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import socket
import threading
from pathlib import Path

from termios import TIOCOUTQ

SIOCOUTQNSD = 0x894B
PIDFD_GETFD = 438
LOOK_S = 0.003

_libc = ctypes.CDLL(None, use_errno=True)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _sockets(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
                    found.append(int(fd))
    return found


def _share(pid: int, fd: int, port: int) -> socket.socket | None:
    """The process's own socket `fd`, if it is a TCP connection with `port` at either end."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        shared_fd = _libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if shared_fd < 0:
        return None
    try:
        shared = socket.socket(fileno=shared_fd)
    except OSError:  # no longer a socket
        os.close(shared_fd)
        return None
    with contextlib.suppress(OSError, IndexError, TypeError):
        if shared.type == socket.SOCK_STREAM and port in (shared.getpeername()[1], shared.getsockname()[1]):
            return shared
    shared.close()
    return None


def _queued(connection: socket.socket, what: int) -> int:
    number = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), what, number)
    return number[0]


class Uncork:
    """Watches a process and its descendants for the time of one move."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid, self._port = pid, port
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _find(self) -> tuple[int, int] | None:
        for pid in _descendants(self._pid):
            for fd in _sockets(pid):
                if shared := _share(pid, fd, self._port):
                    shared.close()
                    return pid, fd
        return None

    def _watch(self) -> None:
        found, lay_before = None, 0
        while not self._end.wait(LOOK_S):
            found = found or self._find()
            # Shared only for the look: what is shared stays open when CRIU closes it.
            if found is None or (connection := _share(*found, self._port)) is None:
                found, lay_before = None, 0
                continue
            with connection, contextlib.suppress(OSError):
                lies = _queued(connection, SIOCOUTQNSD)
                if lies and lies == lay_before == _queued(connection, TIOCOUTQ):
                    for cork in (0, 1):
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, cork)
                lay_before = lies

    def stop(self) -> None:
        self._end.set()
        self._thread.join(5)
