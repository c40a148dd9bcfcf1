"""Turns frames at the two moments that only CRIU knows: right before it stops a program, and right before it lets
the program run on. CRIU calls a script; the script asks this process by a named pipe and waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from peerlab import PeerLab
from workload import Failed

SCRIPT = """#!/bin/sh
case $CRTOOLS_SCRIPT_ACTION in
pre-dump | pre-resume) echo "$CRTOOLS_SCRIPT_ACTION" >{work}/ask; read -r answer <{work}/told ;;
esac
"""


class Hooks:
    """Answers the script from a thread."""

    def __init__(self, work: Path, lab: PeerLab, freeze: Callable[[], None] | None = None) -> None:
        self._lab, self._freeze = lab, freeze
        self._times: dict[str, float] = {}
        self.script = str(work / "hook")
        Path(self.script).write_text(SCRIPT.format(work=work))
        os.chmod(self.script, 0o755)
        for name in ("ask", "told"):
            os.mkfifo(work / name)
        # Opened for both ways: neither end then waits for the other to open it.
        self._ask = os.open(work / "ask", os.O_RDWR | os.O_CLOEXEC)
        self._told = os.open(work / "told", os.O_RDWR | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            asked = os.read(self._ask, 64).decode().strip()
            if asked == "end":
                return
            if asked == "pre-dump":
                if self._freeze:
                    self._freeze()
                self._times[asked] = time.monotonic()
                self._lab.park_at_target()
            else:
                self._lab.deliver()
                self._times[asked] = time.monotonic()
            os.write(self._told, b"go\n")

    def reset(self) -> None:
        self._times.clear()

    def times(self, *actions: str) -> list[float]:
        """When they happened."""
        missing = [action for action in actions if action not in self._times]
        if missing:
            raise Failed(f"CRIU never came to {', '.join(missing)}")
        return [self._times[action] for action in actions]

    def close(self) -> None:
        os.write(self._ask, b"end\n")
        self._thread.join(5)
        os.close(self._ask)
        os.close(self._told)
