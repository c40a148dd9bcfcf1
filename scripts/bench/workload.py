"""What every contestant moves, and the client that looks at it: the same for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kernel import NetNamespace, run, start

INTERVAL_MS = 50
FILL_TIMEOUT_S = 300


@dataclass(frozen=True)
class Workload:
    """One size of Redis and one pace of its client."""

    name: str
    mib: int
    client_us: int


WORKLOADS = (
    Workload("redis-small-idle", 0, 50_000),
    Workload("redis-1gib-load", 1024, 500),
    Workload("redis-4gib-load", 4096, 500),
)


@dataclass
class Move:
    """One measured move. Times in milliseconds."""

    started_unix_ms: float = 0.0
    ended_unix_ms: float = 0.0
    total_ms: float = 0.0
    downtime_ms: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    bytes_sent: int = 0
    cpu_s: float = 0.0
    gap_ms: float = 0.0
    second_gap_ms: float = 0.0
    errors: int = 0
    messages: list[str] = field(default_factory=list)


class Failed(Exception):
    """A contestant could not do a move; the text is what it said."""


@dataclass(frozen=True)
class Place:
    """Where to start the clients: a command in front (of a lab) or a namespace."""

    address: str
    before: Sequence[str] = ()
    network: NetNamespace | None = None
    mounts: int | None = None


def warm(mib: int) -> None:
    """Touches and releases memory: pages that a virtual machine has given back cost ten times as much at first use."""
    program = (
        "import mmap,sys\nn=int(sys.argv[1])\nm=mmap.mmap(-1,n<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\n"
        "b=b'\\1'*(1<<20)\nfor i in range(n): m[i<<20:(i+1)<<20]=b"
    )
    run(["python3", "-c", program, str(mib + 256)], timeout=600)


def fill(godwit: str, place: Place, mib: int) -> None:
    """Writes values that can be verified."""
    if not mib:
        return
    done = run(
        [*place.before, godwit, "workload", "redis-fill", "--address", place.address, "--mib", str(mib)],
        place.network, place.mounts, FILL_TIMEOUT_S,
    )
    if done.returncode:
        raise Failed(f"redis-fill: {(done.stderr or done.stdout).strip()[-500:]}")


def check(godwit: str, place: Place, mib: int) -> list[str]:
    """Reads all values on the target; what is wrong with them."""
    if not mib:
        return []
    done = run(
        [*place.before, godwit, "workload", "redis-check", "--address", place.address, "--mib", str(mib)],
        place.network, place.mounts, FILL_TIMEOUT_S,
    )
    return [f"redis-check: {(done.stderr or done.stdout).strip()[-500:]}"] if done.returncode else []


class Client:
    """`godwit workload redis-client`: every INCR must be answered by the next number, on one connection."""

    def __init__(self, godwit: str, place: Place, interval_us: int) -> None:
        self._report = tempfile.TemporaryFile("w+")
        self._log = tempfile.TemporaryFile("w+")
        command = [
            *place.before, godwit, "workload", "redis-client", "--address", place.address,
            "--interval-us", str(interval_us), "--interval-ms", str(INTERVAL_MS), "--until-stdin-closes",
        ]
        self._process = start(
            command, place.network, place.mounts, stdin=subprocess.PIPE, stdout=self._report, stderr=self._log
        )

    def finish(self, move: Move) -> None:
        """Ends the client and notes what it saw around the move."""
        try:
            self._process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise Failed("the client never ended: its connection hangs") from None
        self._report.seek(0)
        self._log.seek(0)
        try:
            seen = json.loads(self._report.read())
        except ValueError:
            raise Failed(f"the client gave no report: {self._log.read().strip()[-500:]}") from None
        until = move.ended_unix_ms + 1_000
        gaps = [
            i["client_gap_ms"] for i in seen.get("intervals", []) if move.started_unix_ms <= i["until_unix_ms"] <= until
        ]
        gaps.sort(reverse=True)
        move.gap_ms = gaps[0] if gaps else seen["client_gap_ms"]
        move.second_gap_ms = gaps[1] if len(gaps) > 1 else 0.0
        move.errors = seen["errors"] + seen["reconnects"]
        move.messages += seen["messages"]

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._report.close()
        self._log.close()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Polls until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"timed out: {what}")
        time.sleep(0.02)


def answers(place: Place, godwit: str) -> bool:
    """Whether Redis answers."""
    done = run(
        [*place.before, godwit, "workload", "redis-client", "--address", place.address,
         "--interval-us", "1000", "--seconds", "1"],
        place.network, place.mounts, 30,
    )
    return done.returncode == 0


def busy_s() -> float:
    """CPU seconds that all processors have worked so far, without waiting and without what a hypervisor took."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def now_ms() -> float:
    return time.time() * 1e3
