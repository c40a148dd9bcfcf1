"""What hosts of a lab hold: counted so that what a move leaves behind shows, however little it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel import run
from lab import CONTROLLER, Lab
from workload import Failed

# Threads of a pool end after ten idle seconds, address entries and sockets after less: what is there longer stays.
WINDOW_S = 12.0
LOOK_EVERY_S = 0.5
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Measure:
    """One thing that is counted, and how much more of it there may be in the end."""

    name: str
    unit: str
    slack: int


MIB = 1 << 10
DAEMON = (
    # An allocator keeps some of what it once had, in pieces, and TLS remembers up to 256 sessions; a leak of 10 KiB in
    # each of 450 moves would be more.
    Measure("memory", "KiB", 4 * MIB),
    Measure("descriptors", "", 0),
    # A pool has as many as were busy at once in the last ten seconds.
    Measure("threads", "", 4),
)
HOST = (
    *DAEMON,
    Measure("processes", "", 0),
    Measure("zombies", "", 0),
    Measure("namespaces", "", 0),
    Measure("mounts", "", 0),
    Measure("links", "", 0),
    Measure("forwarding", "", 0),
    Measure("neighbours", "", 0),
    Measure("routes", "", 0),
    Measure("firewall", "", 0),
    Measure("cgroups", "", 0),
    Measure("state files", "", 0),
    Measure("run files", "", 0),
    Measure("run bytes", "KiB", MIB),
)
# It remembers: up to 500 moves and 2,000 events are kept, in memory too.
CONTROLLER_MEASURES = (Measure("memory", "KiB", 16 * MIB), *DAEMON[1:])


def measures(node: str) -> tuple[Measure, ...]:
    return CONTROLLER_MEASURES if node == CONTROLLER else HOST


def sample(lab: Lab, nodes: list[str]) -> dict[str, dict[str, int]]:
    """For each node the least of everything in a window of time: what comes and goes does not count."""
    least: dict[str, dict[str, int]] = {}
    deadline = time.monotonic() + WINDOW_S
    while True:
        for node in nodes:
            found = _look(lab, node)
            before = least.setdefault(node, found)
            least[node] = {name: min(value, before[name]) for name, value in found.items()}
        if time.monotonic() >= deadline:
            return least
        time.sleep(LOOK_EVERY_S)


def daemon_pid(lab: Lab, node: str) -> int:
    try:
        return int(json.loads((lab.run / f"{node}.daemon.json").read_text())["pid"])
    except (OSError, ValueError, KeyError) as error:
        raise Failed(f"{node} has no daemon: {error}") from None


def daemon(lab: Lab, node: str) -> dict[str, int]:
    """What the agent, or the controller, itself has."""
    pid = daemon_pid(lab, node)
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise Failed(f"the daemon of {node} has ended: {error}") from None
    # The program's own file is in the page cache, and counts as it happens to be read.
    memory = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return {"memory": memory, "descriptors": descriptors, "threads": int(status["Threads"])}


def _look(lab: Lab, node: str) -> dict[str, int]:
    found = daemon(lab, node)
    if node == CONTROLLER:
        return found
    pid = daemon_pid(lab, node)
    mounted = [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    groups = list(_cgroups(f"godwit-lab-{lab.name}/{node}"))
    # What is asked here runs in a group of its own; it is not the host's.
    pids = {int(line) for group in groups if "exec" not in group.parts for line in _lines(group / "cgroup.procs")}
    found["processes"] = len(pids)
    found["zombies"] = sum(_state(child) == "Z" for child in _children(pid))
    found["namespaces"] = len({link for each in pids for link in _namespaces(each)})
    found["mounts"] = len(mounted)
    found["cgroups"] = len(groups)
    network = _network(lab, node)
    found.update(network)
    found["state files"] = sum(1 for _ in _files(lab.state / node, set()))
    root = f"/proc/{pid}/root"
    files = list(_files(Path(f"{root}/run/godwit"), {root + point for point in mounted}))
    found["run files"] = len(files)
    found["run bytes"] = sum(_size(file) for file in files) >> 10
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # it went away
        return []


def _size(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for line in _lines(task / "children") for child in line.split()]


def _state(pid: int) -> str:
    return "".join(_lines(Path(f"/proc/{pid}/stat"))).rpartition(")")[2].strip()[:1]


def _namespaces(pid: int) -> Iterator[str]:
    for kind in ("net", "mnt", "pid", "user", "ipc", "uts", "cgroup"):
        try:
            yield os.readlink(f"/proc/{pid}/ns/{kind}")
        except OSError:
            return


def _cgroups(path: str) -> Iterator[Path]:
    # Hierarchies with several controllers have further names, which are links.
    hierarchies = [each for each in (CGROUPS, *CGROUPS.iterdir()) if each.is_dir() and not each.is_symlink()]
    for hierarchy in hierarchies:
        for directory, _, _ in os.walk(hierarchy / path):
            yield Path(directory)


def _files(directory: Path, mounted: set[str]) -> Iterator[Path]:
    """Everything below, without what other mounts hold and without containers' own files."""
    for at, directories, files in os.walk(directory):
        own = Path(at).name in ("upper", "rootfs", "work") or Path(at).parent.name == "volumes"
        directories[:] = [] if own else [name for name in directories if os.path.join(at, name) not in mounted]
        for name in [*directories, *([] if own else files)]:
            yield Path(at, name)


def _network(lab: Lab, node: str) -> dict[str, int]:
    """What the kernel knows of links, addresses and rules in a host's network."""
    script = (
        "ip -j link; echo; bridge -j fdb; echo; ip -j neigh show nud permanent; echo;"
        " ip -j route show table all; echo; nft -j list ruleset"
    )
    done = run([*lab.on(node), "sh", "-c", script], timeout=60)
    if done.returncode:
        raise Failed(f"looking at the network of {node}: {done.stderr.strip()[-300:]}")
    parts: list[Any] = [json.loads(part) for part in done.stdout.split("\n") if part.strip()]
    if len(parts) != 5:
        raise Failed(f"looking at the network of {node}: {done.stdout[:300]!r}")
    names = ("links", "forwarding", "neighbours", "routes")
    counts = {name: len(part) for name, part in zip(names, parts)}
    return {**counts, "firewall": _objects(parts[4]["nftables"])}


def _objects(rules: list[dict[str, Any]]) -> int:
    """Tables, chains, rules, sets, and what is in sets."""
    return sum(1 + len(body.get("elem", ())) for each in rules for body in each.values())
