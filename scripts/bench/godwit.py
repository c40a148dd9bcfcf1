"""godwit itself: two hosts of a lab, and `godwit migrate`."""

from __future__ import annotations

import json
import time
from pathlib import Path

from kernel import run
from workload import Failed, Move, Place, wait_until

LAB = "godwit-bench"
COMPOSE = """name: bench
services:
  cache:
    image: oci:{images}/redis:latest
    command: redis-server --save ''
    ports: ["6379:6379"]
    x-godwit:
      cloudlets: {{reserved: 2, limit: 64}}
"""
TERMINAL_SECONDS = 600


class Godwit:
    """One contestant."""

    name = "godwit"

    def __init__(self, program: str, mounts: int, images: Path, work: Path) -> None:
        self._program, self._mounts = program, mounts
        self._compose = work / "bench.yaml"
        self._compose.write_text(COMPOSE.format(images=images))
        self._text = self._compose.read_text()
        self._up = self._applied = False
        self._target = ""
        before = [program, "-q", "lab", "exec", "--name", LAB, "client", "--"]
        self.place = Place("192.168.77.11:6379", before=before, mounts=mounts)

    def _run(self, *arguments: str, **options: object) -> str:
        done = run([self._program, *arguments], mounts=self._mounts, timeout=TERMINAL_SECONDS, **options)
        if done.returncode:
            raise Failed(f"godwit {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[-800:]}")
        return done.stdout

    def _ask(self, *arguments: str) -> list[dict[str, object]]:
        """What a listing says, whether it is a list or an object around one."""
        answer = json.loads(self._run("--lab", LAB, "--output", "json", *arguments))
        while isinstance(answer, dict):
            answer = next(value for value in answer.values() if isinstance(value, list))
        return answer

    def prepare(self) -> None:
        """Starts Redis on a host."""
        if not self._up:
            run([self._program, "-q", "lab", "down", "--name", LAB], mounts=self._mounts)
            self._run("-q", "lab", "up", "--name", LAB, "--hosts", "2", "--link", "10gbit")
            self._up = True
        self._applied = True
        self._run("-q", "--lab", LAB, "env", "apply", "--wait", "-f", "-", input=self._text)
        host = self._ask("ps")[0]["host"]
        self._target = "h2" if host == "h1" else "h1"

    def move(self) -> Move:
        """Moves it to the other host."""
        begun = time.monotonic()
        self._run("-q", "--lab", LAB, "migrate", "bench/cache-1", "--to", self._target)
        total_ms = (time.monotonic() - begun) * 1e3
        # As for the others: from the command's start to its end.
        return Move(total_ms=total_ms)

    def describe(self, move: Move) -> None:
        """Adds what godwit says of its last move; asked for when the move is no longer measured."""
        newest = max(self._ask("move", "list"), key=lambda found: found["requested_at_ms"])
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
            self._run("-q", "--lab", LAB, "env", "delete", "--yes", "bench")
            wait_until(lambda: not self._ask("ps"), 60, "removal of the container")

    def close(self) -> None:
        """Removes the lab."""
        if self._up:
            self._up = False
            self._run("-q", "lab", "down", "--name", LAB)
