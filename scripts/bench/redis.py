"""Redis: filled with values and counted on, or with thousands of idle connections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from program import Program, Tools, copy_with_libraries
from workload import Client, Move, Place

REDIS = "/usr/bin/redis-server"
COMPOSE = """name: bench
services:
  cache:
    image: oci:{images}/redis:latest
    command: redis-server --save ''
    ports: ["6379:6379"]
    x-godwit:
      cloudlets: {{reserved: 2, limit: 64}}
"""
ARGUMENTS = ["--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]


class Redis(Program):
    """Values of a size, and one connection that increments a number."""

    service, port = "cache", 6379

    def __init__(self, tools: Tools, mib: int, client_us: int) -> None:
        super().__init__(tools)
        self._mib, self._client_us = mib, client_us
        self.warm_mib, self.need_mib = mib, 3 * mib

    def _workload(self, verb: str, place: Place, *more: str) -> list[str]:
        return [self.tools.godwit, "workload", verb, "--address", place.address, *more]

    def compose(self) -> str:
        return COMPOSE.format(images=self.tools.images)

    def command(self, directory: Path) -> list[str]:
        return [REDIS, *ARGUMENTS]

    def root(self, directory: Path) -> None:
        copy_with_libraries([REDIS], directory)

    def command_in_root(self) -> list[str]:
        return [REDIS, *ARGUMENTS]

    def answers(self, place: Place) -> bool:
        command = self._workload("redis-client", place, "--interval-us", "1000", "--seconds", "1")
        return place.run(command, 30).returncode == 0

    def fill(self, place: Place) -> None:
        if self._mib:
            place.must(self._workload("redis-fill", place, "--mib", str(self._mib)))

    def client(self, place: Place) -> Client:
        return Client(place, self._workload("redis-client", place, "--interval-us", str(self._client_us)))

    def check(self, place: Place) -> list[str]:
        if not self._mib:
            return []
        done = place.run(self._workload("redis-check", place, "--mib", str(self._mib)))
        return [f"redis-check: {(done.stderr or done.stdout).strip()[-500:]}"] if done.returncode else []


class IdleConnections(Redis):
    """Thousands of connections that do nothing, and one that shows the gap."""

    def __init__(self, tools: Tools, connections: int, client_us: int) -> None:
        super().__init__(tools, 0, client_us)
        self._connections = connections
        self.need_mib = 1024

    def client(self, place: Place) -> Crowd:
        command = self._workload("redis-idle", place, "--connections", str(self._connections))
        return Crowd(Client(place, command, intervals=False), lambda: super(IdleConnections, self).client(place))


class Crowd:
    """Those that wait, and the one that counts."""

    def __init__(self, idle: Client, counting: Callable[[], Client]) -> None:
        self._idle = idle
        self._counting: Client | None = None
        try:
            idle.wait_connected(60)
            self._counting = counting()
        except BaseException:
            self.kill()
            raise

    def finish(self, move: Move) -> None:
        """The gap is that of the one; each of the others has to answer."""
        assert self._counting
        self._counting.finish(move)
        move.note_errors(self._idle.report())

    def kill(self) -> None:
        for client in (self._idle, self._counting):
            if client:
                client.kill()
