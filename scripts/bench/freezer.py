"""A control group that can be frozen, in whichever version of the hierarchy this machine has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

V1 = Path("/sys/fs/cgroup/freezer")
V2 = Path("/sys/fs/cgroup")


def freeze_group(path: Path) -> None:
    """Freezes a group and returns when nothing in it runs any more."""
    state = path / "freezer.state"
    if state.exists():
        state.write_text("FROZEN")
        _wait(lambda: state.read_text().strip() == "FROZEN")
    else:
        (path / "cgroup.freeze").write_text("1")
        _wait(lambda: "frozen 1" in (path / "cgroup.events").read_text())


def thaw_group(path: Path) -> None:
    """Lets it run on."""
    with contextlib.suppress(OSError):
        if (path / "freezer.state").exists():
            (path / "freezer.state").write_text("THAWED")
        else:
            (path / "cgroup.freeze").write_text("0")


def _wait(frozen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not frozen():
        if time.monotonic() > deadline:
            raise TimeoutError("the control group does not freeze")


class Freezer:
    """A group of one contestant."""

    def __init__(self, name: str) -> None:
        self._group = (V1 if V1.is_dir() else V2) / f"godwit-bench-{name}"
        self._group.mkdir(exist_ok=True)
        self.path = str(self._group)

    def freeze(self) -> None:
        freeze_group(self._group)

    def thaw(self) -> None:
        thaw_group(self._group)

    def close(self) -> None:
        deadline = time.monotonic() + 5
        while True:
            try:
                return self._group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
