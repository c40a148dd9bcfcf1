"""godwit itself: two hosts of a lab, and `godwit migrate`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from lab import CLIENT, ENTRANCE, Lab
from program import Program
from workload import Failed, Move, Place, wait_until

LAB, LINK = "godwit-bench", "10gbit"
# Where services have their port outside, if not the same.
OUTSIDE = {80: 8080}


class Godwit:
    """One contestant."""

    name = "godwit"

    def __init__(self, program: str, mounts: int) -> None:
        self._lab = Lab(program, LAB, mounts)
        self._up = self._applied = False
        self._container = self._target = ""
        self.place = Place("")

    def prepare(self, program: Program) -> None:
        """Starts a program on a host."""
        if not self._up:
            self._up = True
            self._lab.up(2, LINK)
        self._applied = True
        self._lab.godwit("env", "apply", "--wait", "-f", "-", input=program.compose())
        self._container = f"bench/{program.service}-1"
        address = f"{ENTRANCE}:{OUTSIDE.get(program.port, program.port)}"
        self.place = Place(address, self._lab.on(CLIENT), mounts=self._lab.mounts, inside=self._inside)
        host = self._lab.ask_list("ps")[0]["host"]
        self._target = "h2" if host == "h1" else "h1"

    def _inside(self, command: Sequence[str]) -> str:
        return self._lab.godwit("exec", self._container, "--", *command)

    def move(self) -> Move:
        """Moves it to the other host."""
        begun = time.monotonic()
        self._lab.godwit("migrate", self._container, "--to", self._target)
        total_ms = (time.monotonic() - begun) * 1e3
        # As for the others: from the command's start to its end.
        return Move(total_ms=total_ms)

    def describe(self, move: Move) -> None:
        """Adds what godwit says of its last move; asked for when the move is no longer measured."""
        newest = max(self._lab.ask_list("move", "list"), key=lambda found: found["requested_at_ms"])
        summary = newest.get("summary")
        if not summary:
            raise Failed(f"godwit says of the move: {json.dumps(newest)[:500]}")
        move.downtime_ms = summary["downtime_ms"]
        move.parts = dict(summary["downtime_parts"])
        move.bytes_sent = summary["bytes_sent"]

    def cleanup(self) -> None:
        """Removes the container; the lab stays for the next move."""
        if self._applied:
            self._applied = False
            self._lab.godwit("env", "delete", "--yes", "bench")
            wait_until(lambda: not self._lab.ask_list("ps"), 60, "removal of the container")

    def close(self) -> None:
        """Removes the lab."""
        if self._up:
            self._up = False
            self._lab.down()
