"""A writer: memory that is rewritten at a given rate, all over the place, and verified."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from program import Program, Tools, copy_with_libraries
from workload import Client, Failed, Place, wait_until

COMPOSE = """name: bench
services:
  writer:
    image: oci:{image}:workload
    command: [memory-writer, --port, "{port}", --memory-mib, "{mib}", --mb-per-second, "{rate}"]
    ports: ["{port}:{port}"]
    x-godwit:
      cloudlets: {{reserved: 2, limit: 64}}
"""
PAGE_BYTES = 4_096
# Its two passes over all memory after the move.
CHECK_S = 120
# With less than this share of its rate the workload is not what its name says.
LEAST_SHARE = 0.8


class Writer(Program):
    """One thread that writes; one connection with data in both directions."""

    service, port = "writer", 7_000

    def __init__(self, tools: Tools, mib: int, mb_per_second: int, client_us: int) -> None:
        super().__init__(tools)
        self._mib, self._rate, self._client_us = mib, mb_per_second, client_us
        self.warm_mib, self.need_mib = mib, 3 * mib
        self._image = tools.disk / "writer-image"

    def compose(self) -> str:
        if not self._image.exists():
            Place("").must([self.tools.godwit, "workload", "image", "--out", str(self._image)])
        return COMPOSE.format(image=self._image, port=self.port, mib=self._mib, rate=self._rate)

    def command(self, directory: Path) -> list[str]:
        arguments = ["--port", str(self.port), "--memory-mib", str(self._mib), "--mb-per-second", str(self._rate)]
        return [self.tools.godwit, "workload", "memory-writer", *arguments]

    def root(self, directory: Path) -> None:
        copy_with_libraries([self.tools.godwit], directory)

    def command_in_root(self) -> list[str]:
        return self.command(Path("/"))

    def _status(self, place: Place) -> dict[str, Any] | None:
        text = place.run([self.tools.godwit, "workload", "status", "--address", place.address], 60).stdout
        return json.loads(text) if text.strip() else None

    def answers(self, place: Place) -> bool:
        return self._status(place) is not None

    def fill(self, place: Place) -> None:
        """It fills itself; whether it keeps its rate is looked at."""
        before, begun = self._status(place), time.monotonic()
        time.sleep(2)
        after, ended = self._status(place), time.monotonic()
        if not before or not after:
            raise Failed("the writer does not answer")
        pages = after["memory_pages_written"] - before["memory_pages_written"]
        rate = pages * PAGE_BYTES / 1e6 / (ended - begun)
        if rate < LEAST_SHARE * self._rate:
            raise Failed(f"the writer writes {rate:.0f} MB/s instead of {self._rate}: this machine is too slow or busy")

    def client(self, place: Place) -> Client:
        command = [self.tools.godwit, "workload", "client", "--address", place.address]
        return Client(place, [*command, "--interval-us", str(self._client_us)])

    def check(self, place: Place) -> list[str]:
        """All memory is verified at least once by the program itself after the move."""
        newest = self._status(place)
        if newest is None:
            return ["the writer does not answer"]
        enough = newest["memory_passes"] + 2

        def over() -> bool:
            nonlocal newest
            newest = self._status(place)
            return newest is None or not newest["ok"] or newest["memory_passes"] >= enough

        wait_until(over, CHECK_S, "the writer's own check of its memory")
        if newest is None or not newest["ok"]:
            return [f"the writer found: {(newest or {}).get('violations', 'nothing: it has ended')}"]
        return []
