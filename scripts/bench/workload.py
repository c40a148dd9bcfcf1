"""One measured move, and the clients that look at it: the same for every contestant."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel import NetNamespace, run, start

INTERVAL_MS = 50
CLIENT_TIMEOUT_S = 300


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

    def note_gaps(self, gaps: Sequence[tuple[float, float]]) -> None:
        """Of intervals, each with its end and the longest silence that ended in it: the two longest around the move."""
        until = self.ended_unix_ms + 1_000
        around = sorted((gap for end, gap in gaps if self.started_unix_ms <= end <= until), reverse=True)
        if not around:
            raise Failed("the client saw nothing around the move")
        self.gap_ms = around[0]
        self.second_gap_ms = around[1] if len(around) > 1 else 0.0

    def note_errors(self, seen: dict[str, Any]) -> None:
        """What a client's report has of them."""
        self.errors += seen["errors"] + seen["reconnects"]
        self.messages += seen["messages"]


class Failed(Exception):
    """A contestant could not do a move; the text is what it said."""


@dataclass(frozen=True)
class Place:
    """Where to start the clients, a command in front (of a lab) or a namespace; and how to run something inside."""

    address: str
    before: Sequence[str] = ()
    network: NetNamespace | None = None
    mounts: int | None = None
    inside: Callable[[Sequence[str]], str] | None = None

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]

    def run(self, command: Sequence[str], timeout: float = CLIENT_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Runs a client to its end."""
        return run([*self.before, *command], self.network, self.mounts, timeout)

    def must(self, command: Sequence[str], timeout: float = CLIENT_TIMEOUT_S) -> str:
        """As `run`, of a client that has to succeed; its standard output."""
        done = self.run(command, timeout)
        if done.returncode:
            raise Failed(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip()[-500:]}")
        return done.stdout

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a client with a standard input that can be closed."""
        return start([*self.before, *command], self.network, self.mounts, stdin=subprocess.PIPE, **options)


def warm(mib: int) -> None:
    """Touches and releases memory: pages that a virtual machine has given back cost ten times as much at first use."""
    program = (
        "import mmap,sys\nn=int(sys.argv[1])\nm=mmap.mmap(-1,n<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\n"
        "b=b'\\1'*(1<<20)\nfor i in range(n): m[i<<20:(i+1)<<20]=b"
    )
    run(["python3", "-c", program, str(mib + 256)], timeout=600)


class Client:
    """A `godwit workload` client that reports intervals, at work when this is made."""

    def __init__(self, place: Place, command: Sequence[str], intervals: bool = True) -> None:
        self._report = tempfile.TemporaryFile("w+")
        self._log = tempfile.NamedTemporaryFile("w+")
        self._what = command[2]
        more = ["--interval-ms", str(INTERVAL_MS)] if intervals else []
        self._process = place.start(
            [*command, *more, "--until-stdin-closes"], stdout=self._report, stderr=self._log
        )

    def wait_connected(self, seconds: float) -> None:
        """Returns when it says so."""
        wait_until(lambda: self.ended() or "connected" in self._heard(), seconds, f"{self._what} to connect")
        if self.ended():
            raise Failed(f"{self._what} ended: {self._heard()[-500:]}")

    def _heard(self) -> str:
        with open(self._log.name, encoding="utf-8", errors="replace") as log:
            return log.read().strip()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def report(self) -> dict[str, Any]:
        """Ends the client; what it says."""
        try:
            self._process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise Failed(f"{self._what} never ended: a connection hangs") from None
        self._report.seek(0)
        try:
            found: dict[str, Any] = json.loads(self._report.read())
        except ValueError:
            raise Failed(f"{self._what} gave no report: {self._heard()[-500:]}") from None
        return found

    def finish(self, move: Move) -> None:
        """Ends the client and notes what it saw around the move."""
        seen = self.report()
        gaps = [(each["until_unix_ms"], each["client_gap_ms"]) for each in seen.get("intervals", [])]
        move.note_gaps(gaps or [(move.ended_unix_ms, seen["client_gap_ms"])])
        move.note_errors(seen)

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


def busy_s() -> float:
    """CPU seconds that all processors have worked so far, without waiting and without what a hypervisor took."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def now_ms() -> float:
    return time.time() * 1e3
