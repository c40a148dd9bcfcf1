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


def _connection(pid: int, port: int) -> socket.socket | None:
    """The process's own established TCP connection that has `port` at either end, shared with it."""
    try:
        links = [fd for fd in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")]
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        for link in links:
            fd = _libc.syscall(PIDFD_GETFD, pidfd, int(link), 0)
            if fd < 0:
                continue
            shared = socket.socket(fileno=fd)
            with contextlib.suppress(OSError, IndexError, TypeError):
                if shared.type == socket.SOCK_STREAM and port in (shared.getpeername()[1], shared.getsockname()[1]):
                    return shared
            shared.close()
        return None
    finally:
        os.close(pidfd)


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

    def _watch(self) -> None:
        connection = None
        while connection is None and not self._end.wait(LOOK_S):
            for pid in _descendants(self._pid):
                connection = connection or _connection(pid, self._port)
        if connection is None:
            return
        lay_before = 0
        with connection:
            while not self._end.wait(LOOK_S):
                try:
                    lies = _queued(connection, SIOCOUTQNSD)
                    if lies and lies == lay_before == _queued(connection, TIOCOUTQ):
                        for cork in (0, 1):
                            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, cork)
                    lay_before = lies
                    if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7:  # closed
                        return
                except OSError:
                    return

    def stop(self) -> None:
        """Lets go: our share of the connection would keep it open."""
        self._end.set()
        self._thread.join(5)
