"""CRIU alone, driven at its best.

- The program is process 1 of a process namespace of its own, so that its number is free on the other side.
- CRIU finds its cache of kernel features on a tmpfs; without it each start spends some 20 ms on looking.
- It is frozen by its control group when CRIU is about to stop it: CRIU, which looks at a group that is not yet
  frozen only every 100 ms, goes on at once. Then frames to it are turned to the target, wait there, and are
  delivered when the sockets are complete and before it runs on. CRIU's own network lock would lose them, and
  their sender would wait for its retransmission timer: so it is off.
- Stop and copy: pages go over the link to a page server, which writes them to a tmpfs; nothing else is copied,
  the small image files are simply there. That is in CRIU's favour.
- Lazy: each step begins when the one before it says that it is ready, by --status-fd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from freezer import Freezer
from hooks import Hooks
from kernel import run, start, wait
from peerlab import GUEST_ADDRESS, PAGES_ADDRESS, PeerLab
from program import Program
from uncork import Uncork
from workload import Failed, Move, Place, wait_until

PORT = 27_000
# What is started by it is in a control group from its first instant, with all that it starts itself.
JOIN = 'echo 0 >"$0/cgroup.procs" && exec "$@"'


class Criu:
    """One contestant: stop and copy, or lazy pages."""

    def __init__(self, name: str, lab: PeerLab, work: Path, criu: str) -> None:
        self.name, self._lazy = name, name == "criu-lazy-pages"
        self._lab, self._work, self._criu = lab, work / name, criu
        self.place = Place("")
        self._program: Program | None = None
        self._pid = 0
        self._helpers: list[subprocess.Popen[str]] = []
        self._hooks: Hooks | None = None
        self._freezer: Freezer | None = None
        self._uncorks: list[Uncork] = []

    def prepare(self, program: Program) -> None:
        """Starts a program at the source."""
        self._program = program
        self.place = Place(f"{GUEST_ADDRESS}:{program.port}", network=self._lab.client)
        self._lab.at_source()
        self._work.mkdir()
        os.chmod(self._work, 0o755)
        self._freezer = Freezer(self.name)
        self._hooks = Hooks(self._work, self._lab, self._freezer.freeze)
        program.make_files(self._work)
        joining = ["sh", "-c", JOIN, self._freezer.path, "setsid"]
        launcher = start(
            ["unshare", *program.namespaces, "--fork", *joining, *program.command(self._work)],
            self._lab.guest["A"], dies=False, cwd=self._work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        self._helpers.append(launcher)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        wait_until(lambda: bool(children.read_text().split()), 10, f"start of {program.service}")
        self._pid = int(children.read_text().split()[0])

    def move(self) -> Move:
        """Moves it from A to B."""
        assert self._hooks
        self._hooks.reset()
        images = self._work / "images"
        images.mkdir()
        move = Move()
        sent = self._lab.bytes_sent()
        begun = time.monotonic()
        times = self._lazy_move(images) if self._lazy else self._copy_move(images)
        move.total_ms = (time.monotonic() - begun) * 1e3
        move.bytes_sent = self._lab.bytes_sent() - sent
        stopped, resumed = self._hooks.times("pre-dump", "pre-resume")
        move.downtime_ms = (resumed - stopped) * 1e3
        previous = stopped
        for part, at in times:
            move.parts[part] = (at - previous) * 1e3
            previous = at
        move.parts["restore"] = (resumed - previous) * 1e3
        self._pid = int((self._work / "restored.pid").read_text())
        return move

    def _command(self, verb: str, images: Path, *more: str) -> list[str]:
        return [self._criu, verb, "-D", str(images), "-W", str(self._work), "-o", f"{verb}.log", "-v1", *more]

    def _dump(self, images: Path, *more: str) -> list[str]:
        assert self._hooks and self._freezer
        return self._command(
            "dump", images, "-t", str(self._pid), "--tcp-established", "--network-lock", "skip",
            "--manage-cgroups=ignore", "--freeze-cgroup", self._freezer.path,
            "--action-script", self._hooks.script, *more,
        )

    def _restore(self, images: Path, *more: str) -> None:
        assert self._hooks
        command = self._command(
            "restore", images, "-d", "--tcp-established", "--network-lock", "skip", "--manage-cgroups=ignore",
            "--pidfile", str(self._work / "restored.pid"), "--action-script", self._hooks.script, *more,
        )
        process = self._spawn(command, "B")
        self._end(process, "restore")

    def _spawn(self, command: list[str], side: str, **options: object) -> subprocess.Popen[str]:
        process = start(
            command, self._lab.guest[side], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
        )
        self._helpers.append(process)
        return process

    def _end(self, process: subprocess.Popen[str], verb: str) -> None:
        if wait(process, 300):
            raise Failed(f"criu {verb} ended with {process.returncode}: {tail(self._work / f'{verb}.log')}")

    def _ready(self, verb: str, images: Path, side: str, *more: str) -> subprocess.Popen[str]:
        """Starts a part of CRIU and waits until it says that it is ready."""
        reading, writing = os.pipe()
        try:
            command = self._dump(images, *more) if verb == "dump" else self._command(verb, images, *more)
            process = self._spawn([*command, "--status-fd", str(writing)], side, pass_fds=(writing,))
            os.close(writing)
            writing = -1
            if not os.read(reading, 1):
                wait(process, 60)
                raise Failed(f"criu {verb} ended with {process.returncode}: {tail(self._work / f'{verb}.log')}")
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)
        return process

    def _uncork(self, process: subprocess.Popen[str]) -> None:
        self._uncorks.append(Uncork(process.pid, PORT))

    def _let_go(self) -> None:
        for uncork in self._uncorks:
            uncork.stop()
        self._uncorks.clear()

    def _copy_move(self, images: Path) -> list[tuple[str, float]]:
        address = ("--address", PAGES_ADDRESS["B"], "--port", str(PORT))
        server = self._ready("page-server", images, "B", *address)
        dump = self._spawn(self._dump(images, "--page-server", *address), "A")
        self._uncork(dump)
        self._end(dump, "dump")
        self._let_go()
        self._end(server, "page-server")
        dumped = time.monotonic()
        self._restore(images)
        return [("dump", dumped)]

    def _lazy_move(self, images: Path) -> list[tuple[str, float]]:
        address = ("--address", PAGES_ADDRESS["A"], "--port", str(PORT))
        dump = self._ready("dump", images, "A", "--lazy-pages", *address)
        dumped = time.monotonic()
        pages = self._ready("lazy-pages", images, "B", "--page-server", *address)
        self._uncork(dump)
        self._uncork(pages)
        connected = time.monotonic()
        self._restore(images, "--lazy-pages")
        self._end(pages, "lazy-pages")
        self._end(dump, "dump")
        return [("dump", dumped), ("connect", connected)]

    def cleanup(self) -> None:
        """Ends all that is left of a move, whatever state it is in."""
        if self._hooks:
            self._hooks.close()
            self._hooks = None
        self._let_go()
        if self._freezer:
            self._freezer.thaw()
        for process in self._helpers[1:]:
            if process.poll() is None:
                process.kill()
            process.wait()
        # Both the source, if a move failed, and the target.
        restored = self._work / "restored.pid"
        pids = {self._pid, int(restored.read_text()) if restored.exists() else 0} - {0}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not running(pid), 10, "end of what was moved")
        self._pid = 0
        for process in self._helpers[:1]:
            process.wait()
        self._helpers.clear()
        if self._freezer:
            self._freezer.close()
            self._freezer = None
        if self._work.exists():
            shutil.rmtree(self._work)
        if self._program:
            self._program.remove_files()
            self._program = None


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def tail(log: Path) -> str:
    """The errors at the end of a log."""
    if not log.exists():
        return "no log"
    lines = log.read_text(errors="replace").splitlines()
    wrong = [line for line in lines if "Error" in line] or lines
    return " | ".join(line.strip() for line in wrong[-4:])[-800:]


def version(criu: str) -> str:
    """What this CRIU calls itself."""
    done = run([criu, "--version"])
    return done.stdout.split("\n")[0].removeprefix("Version:").strip()
