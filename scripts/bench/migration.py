"""Moves programs by godwit, by CRIU and by runc between two hosts on this machine, and compares what a client saw.

The systems take turns, move by move, so that what else the machine does meets all of them. Every move is of a
program that was just started and filled, with a client at work, after memory was made warm.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from criu import Criu, version
from godwit import Godwit
from kernel import enter_private_mounts, mount, run, start, umount
from peerlab import HOST_ADDRESS, PeerLab, settle
from program import Program, Tools, Watch
from runc import Runc
from workload import Failed, Move, busy_s, now_ms, wait_until, warm
from workloads import WORKLOADS

SYSTEMS = ("godwit", "criu-stop-and-copy", "criu-lazy-pages", "runc-stop-and-copy")
MOVES, QUICK_MOVES = 5, 3
STEADY_S = 1.0
BASE_S = 0.5
AFTER_S = 1.1
# What CRIU needs where root lacks CAP_SYS_RESOURCE: a dump holds every page in pipes, and who serves lazy pages
# copies by way of a pipe of 4 MiB; without it the move fails ("tee: 65536: Operation not permitted").
LIMITS = {"fs/pipe-user-pages-soft": 0, "fs/pipe-max-size": 4 << 20, "vm/unprivileged_userfaultfd": 1}
NOTES = (
    "Client gap: the longest time between two answers; in redis-small-idle at least the client's own 50 ms.",
    "CRIU, runc: pages are sent over the link; the other image files (1 to 3 MB), the root file system and all files are"
    " on both hosts at no cost; godwit carries the files too. Downtime: from the frozen group to the moment right before"
    " the program runs on.",
    "nginx-midstream: the client's receive buffer of 64 KiB hides some 3 ms of silence.",
    "CRIU, runc: the benchmark sends what CRIU leaves corked on its connection (up to 200 ms each time without).",
    "bytes_sent: of godwit as it says itself, of the others all that left the source's link.",
    "cpu_s: of the whole machine, less what it used in the half second before; other work on it counts.",
)


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="./dev bench migration", description=__doc__.split("\n")[0])
    parser.add_argument("--report", metavar="FILE", required=True, help="where the figures go, as JSON")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MOVES} moves each instead of {MOVES}, Redis only")
    parser.add_argument("--moves", type=int, help="moves of each system, for development")
    parser.add_argument("--only", metavar="WORKLOADS", help=f"of {', '.join(names)}")
    parser.add_argument("--systems", metavar="SYSTEMS", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--mib", type=int, help="size of the large workloads, for development")
    parser.add_argument("--check-arguments", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.only:
        names = [workload.name for workload in WORKLOADS if workload.quick or not given.quick]
    given.only = _chosen(parser, given.only, names)
    given.moves = given.moves or (QUICK_MOVES if given.quick else MOVES)
    given.systems = _chosen(parser, given.systems, SYSTEMS)
    return given


def _chosen(parser: argparse.ArgumentParser, text: str | None, known: Sequence[str]) -> list[str]:
    chosen = text.split(",") if text else list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"unknown: {name}; there are {', '.join(known)}")
    return chosen


def raise_limits() -> dict[str, str]:
    """Sets what CRIU needs; what was there before."""
    before = {}
    for name, value in LIMITS.items():
        path = Path("/proc/sys") / name
        if not path.exists():
            continue
        was = path.read_text().strip()
        if int(was) != value and not (name.endswith("max-size") and int(was) > value):
            before[name] = was
            path.write_text(str(value))
    return before


def available_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


def measure_link(lab: PeerLab) -> dict[str, Any]:
    """What one stream of TCP gets over the link that pages go over."""
    server = start(["iperf3", "-s", "-1", "-B", HOST_ADDRESS["B"]], lab.host["B"], stdout=-3, stderr=-3)
    try:
        time.sleep(0.3)
        done = run(["iperf3", "-c", HOST_ADDRESS["B"], "-t", "2", "-J"], lab.host["A"], timeout=30)
        rate = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 8
        return {"iperf3_bytes_per_s": round(rate)}
    except (ValueError, KeyError, OSError) as error:
        return {"iperf3_bytes_per_s": None, "failure": f"iperf3: {error}"}
    finally:
        server.kill()
        server.wait()


def one_move(system: Any, program: Program) -> Move:
    """Starts, fills, moves and verifies; leaves nothing behind."""
    client: Watch | None = None
    try:
        system.prepare(program)
        wait_until(lambda: program.answers(system.place), 60, f"the first answer of {program.service}")
        program.fill(system.place)
        warm(program.warm_mib)
        client = program.client(system.place)
        time.sleep(STEADY_S)
        base = busy_s()
        time.sleep(BASE_S)
        began, busy = time.monotonic(), busy_s()
        idle_rate = (busy - base) / BASE_S
        started = now_ms()
        move: Move = system.move()
        move.cpu_s = max(0.0, busy_s() - busy - idle_rate * (time.monotonic() - began))
        move.started_unix_ms, move.ended_unix_ms = started, now_ms()
        if isinstance(system, Godwit):
            system.describe(move)
        time.sleep(AFTER_S)
        client.finish(move)
        wrong = program.check(system.place)
        move.errors += len(wrong)
        move.messages += wrong
        return move
    finally:
        if client:
            client.kill()
        system.cleanup()


def measure(name: str, systems: Sequence[Any], program: Program, moves: int) -> list[dict[str, Any]]:
    """All moves of one workload, the systems taking turns."""
    good: dict[str, list[Move]] = {system.name: [] for system in systems}
    failed: dict[str, list[str]] = {system.name: [] for system in systems}
    able = [system for system in systems if system.name not in program.cannot]
    for number in range(1, moves + 1):
        for system in able:
            label = f"{name}, {system.name}, move {number} of {moves}"
            try:
                move = one_move(system, program)
            except (Failed, OSError, TimeoutError, RuntimeError, subprocess.SubprocessError) as error:
                failed[system.name].append(str(error))
                say(f"{label}: failed: {error}")
                continue
            good[system.name].append(move)
            say(
                f"{label}: gap {move.gap_ms:.0f} ms, then {move.second_gap_ms:.0f}; down {move.downtime_ms:.0f} ms"
                f" ({', '.join(f'{name} {ms:.0f}' for name, ms in move.parts.items())}), total {move.total_ms:.0f} ms,"
                f" {move.bytes_sent >> 20} MiB, {move.cpu_s:.2f} CPU s, {move.errors} errors"
            )
    return [report.result(name, s.name, good[s.name], failed[s.name], program.cannot.get(s.name)) for s in systems]


def main() -> int:
    given = arguments()
    if given.check_arguments:
        return 0
    program = os.environ.get("GODWIT_BIN") or f"{os.environ.get('CARGO_TARGET_DIR') or 'target'}/debug/godwit"
    program = os.path.abspath(program)
    criu = "/opt/godwit/criu/criu" if os.path.exists("/opt/godwit/criu/criu") else "criu"
    images = Path(os.environ.get("GODWIT_IMAGES") or ".images").resolve()
    output = Path(given.report).resolve()
    if os.geteuid():
        say("error: not root: namespaces and mounts need it; run: sudo ./dev bench migration")
        return 1
    if not os.access(program, os.X_OK):
        say(f"error: {program} is not there: build it, or name another by GODWIT_BIN")
        return 1
    if not output.parent.is_dir():
        say(f"error: {output.parent} is no directory: the report could not be written")
        return 1
    lock = open("/run/lock/godwit-bench.lock", "w")  # noqa: SIM115: held to the end of the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("error: another benchmark runs on this machine: the two would measure each other")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    limits = raise_limits()
    mounts = enter_private_mounts()
    work = Path(tempfile.mkdtemp(prefix="godwit-bench-"))
    with contextlib.ExitStack() as stack:
        stack.callback(restore_limits, limits)
        # Labs do not see what is mounted here, but all of the disk.
        disk = Path(tempfile.mkdtemp(prefix="godwit-bench-", dir="/var/tmp"))
        disk.chmod(0o755)
        stack.callback(shutil.rmtree, disk, ignore_errors=True)
        stack.callback(work.rmdir)
        mount("bench", str(work), "tmpfs", "mode=755,size=90%")
        stack.callback(umount, str(work))
        # CRIU keeps what it learned about the kernel in /run only if that is a tmpfs.
        mount("bench", "/run", "tmpfs", "mode=755")
        lab = PeerLab()
        stack.callback(lab.close)
        settle()
        found = compare(given, Tools(program, images, disk), criu, work, mounts, lab)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(report.table(found))
    bad = any(entry["errors"] or entry.get("failures") for entry in found["results"])
    return 1 if bad else 0


def restore_limits(limits: dict[str, str]) -> None:
    for name, value in limits.items():
        (Path("/proc/sys") / name).write_text(value)


def compare(
    given: argparse.Namespace, tools: Tools, criu: str, work: Path, mounts: int, lab: PeerLab
) -> dict[str, Any]:
    """Measures everything that was asked for."""
    load = [Path("/proc/loadavg").read_text().split()[:3]]
    made: dict[str, Any] = {
        "godwit": lambda: Godwit(tools.godwit, mounts),
        "criu-stop-and-copy": lambda: Criu("criu-stop-and-copy", lab, work, criu),
        "criu-lazy-pages": lambda: Criu("criu-lazy-pages", lab, work, criu),
        "runc-stop-and-copy": lambda: Runc(lab, work, criu),
    }
    systems = [made[name]() for name in SYSTEMS if name in given.systems]
    chosen = [workload.resized(given.mib) for workload in WORKLOADS if workload.name in given.only]
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    if float(load[0][0]) > 1:
        say(f"warning: load average {load[0][0]}: other work on this machine is in every figure")
    link = measure_link(lab)
    try:
        for workload in chosen:
            program = workload.program(tools)
            need, have = program.need_mib, available_mib()
            if have < need:
                skipped.append({"workload": workload.name, "why": f"{have} MiB of memory available, {need} needed"})
                say(f"{workload.name}: skipped: {skipped[-1]['why']}")
                continue
            results += measure(workload.name, systems, program, given.moves)
    finally:
        for system in systems:
            if isinstance(system, Godwit):
                system.close()
    load.append(Path("/proc/loadavg").read_text().split()[:3])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {
        "cpus": os.cpu_count(), "memory": memory, "kernel": os.uname().release, "criu": version(criu),
        "load_average_at_start": [float(value) for value in load[0]],
        "load_average_at_end": [float(value) for value in load[1]],
    }
    return {
        "results": results, "link": link, "machine": machine, "ratios": report.ratios(results), "skipped": skipped,
        "notes": NOTES,
        "workloads": {
            workload.name: workload.settings for workload in chosen
        },
    }


if __name__ == "__main__":
    sys.exit(main())
