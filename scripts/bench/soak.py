"""Many moves in a row of a program that checks itself, and whether anything of them is left on the hosts.

Three hosts, one container that keeps memory, files, pipes, timers and a child process busy, one client with streams in
both directions. It goes well only if no byte was wrong, no connection was lost, it is the same process in the end, and
hosts hold no more than after the warm-up: memory, descriptors, threads, processes, mounts, links, cgroups, files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hoststate
from kernel import run, start
from lab import CLIENT, CONTROLLER, ENTRANCE, Lab
from workload import Failed, wait_until

HOSTS = 3
NODES = [f"h{number}" for number in range(1, HOSTS + 1)]
LINK = "10gbit"
CONNECTIONS = 8
PORT = 7_000
CONTAINER = "soak/w-1"
INTERVAL_MS = 100
# A silence that a move caused is over within this time after the move.
AFTER_MS = 500
TREND_EVERY = 50
COMPOSE = """name: soak
services:
  w:
    image: oci:{image}:workload
    command: [memory-files-streams, --port, "{port}", --dir, /data, --memory-mib, "32"]
    volumes: ["files:/data"]
    ports: ["{port}:{port}"]
volumes: {{files: {{}}}}
"""


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev soak", description=__doc__.split("\n\n")[0].replace("\n", " "))
    parser.add_argument("--moves", type=int, default=500, help="how many (500)")
    parser.add_argument("--warm-up", type=int, default=50, metavar="MOVES", help="after how many it is counted (50)")
    parser.add_argument("--report", metavar="FILE", help="where the figures go, as JSON")
    parser.add_argument("--lab", metavar="NAME", default="godwit-soak", help="name of the lab (godwit-soak)")
    parser.add_argument("--check-arguments", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not 1 <= given.warm_up <= given.moves - HOSTS or given.moves > 100_000:
        parser.error(f"--moves {given.moves} --warm-up {given.warm_up}: at least {HOSTS} moves must follow the warm-up")
    # Counted twice with the container on the same host: what it holds there itself is no growth.
    given.warm_up += (given.moves - given.warm_up) % HOSTS
    return given


class Soak:
    """One run, from a lab that is up."""

    def __init__(self, lab: Lab, work: Path) -> None:
        self._lab, self._work = lab, work
        self._address = f"{ENTRANCE}:{PORT}"
        self._client: subprocess.Popen[str] | None = None
        self._said = open(work / "client.log", "w+")  # noqa: SIM115: closed with the run
        self._told = open(work / "client.json", "w+")  # noqa: SIM115
        self.moves: list[dict[str, Any]] = []
        self.trend: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def prepare(self) -> None:
        """Starts the container and its client."""
        image = self._work / "image"
        done = run([self._lab.program, "workload", "image", "--out", str(image)])
        if done.returncode:
            raise Failed(f"godwit workload image: {done.stderr.strip()}")
        text = COMPOSE.format(image=image, port=PORT)
        self._lab.godwit("env", "apply", "--wait", "-f", "-", input=text)
        wait_until(lambda: self._ask_status() is not None, 60, "the first answer of the workload")
        command = [
            *self._lab.on(CLIENT), self._lab.program, "workload", "client", "--address", self._address,
            "--connections", str(CONNECTIONS), "--interval-ms", str(INTERVAL_MS), "--until-stdin-closes",
        ]
        self._client = start(command, stdin=subprocess.PIPE, stdout=self._told, stderr=self._said)
        log = self._work / "client.log"
        wait_until(lambda: "connected" in log.read_text(), 60, "data on all connections")

    def _ask_status(self) -> dict[str, Any] | None:
        """What the workload says of itself; nothing where it does not answer."""
        command = [*self._lab.on(CLIENT), self._lab.program, "workload", "status", "--address", self._address]
        text = run(command, timeout=60).stdout
        return json.loads(text) if text.strip() else None

    def status(self) -> dict[str, Any]:
        status = self._ask_status()
        if status is None:
            raise Failed("the workload does not answer")
        return status

    def move_on(self, number: int) -> None:
        """One move to the next host."""
        if self._client is None or self._client.poll() is not None:
            raise Failed("the client has ended")
        at = next(each["host"] for each in self._lab.ask_list("ps") if each["name"] == CONTAINER)
        to = NODES[(NODES.index(at) + 1) % HOSTS]
        began = time.monotonic()
        done = self._lab.ask("migrate", CONTAINER, "--to", to)
        if done["outcome"]["state"] != "done":
            raise Failed(f"move {number} from {at} to {to}: {json.dumps(done['outcome'])}")
        summary = done["summary"]
        self.moves.append({
            "from": at, "to": to, "took_ms": (time.monotonic() - began) * 1e3,
            "downtime_ms": summary["downtime_ms"], "bytes_sent": summary["bytes_sent"],
            "began_unix_ms": done["requested_at_ms"], "ended_unix_ms": done["finished_at_ms"] or time.time() * 1e3,
        })
        if number % TREND_EVERY == 0:
            nodes = {node: hoststate.daemon(self._lab, node) for node in [CONTROLLER, *NODES]}
            self.trend.append({"moves": number, "daemons": nodes})
            memory = ", ".join(f"{node} {found['memory'] >> 10}" for node, found in nodes.items())
            say(f"{number} moves; MiB of memory: {memory}")

    def finish(self, before: dict[str, Any]) -> dict[str, Any]:
        """Ends the client and judges what it and the workload say; the client's report."""
        after = self.status()
        for name in ("instance", "pid", "started_unix_ms"):
            if after[name] != before[name]:
                self.problems.append(f"not the same process: {name} was {before[name]} and is {after[name]}")
        if not after["ok"] or after["streams_broken"]:
            self.problems.append(f"the workload says: {json.dumps(after)}")
        assert self._client
        try:
            self._client.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            raise Failed("the client does not end: a connection hangs") from None
        self._told.seek(0)
        try:
            seen = json.loads(self._told.read())
        except ValueError:
            raise Failed(f"the client gave no report: {(self._work / 'client.log').read_text()[-500:]}") from None
        if seen["errors"] or seen["reconnects"]:
            self.problems.append(f"{seen['errors']} errors, {seen['reconnects']} reconnects: {seen['messages']}")
        intervals = seen.pop("intervals")
        for move in self.moves:
            until = move["ended_unix_ms"] + AFTER_MS
            gaps = [
                each["client_gap_ms"] for each in intervals
                if move["began_unix_ms"] <= each["until_unix_ms"] <= until + INTERVAL_MS
            ]
            move["client_gap_ms"] = max(gaps, default=None)
        return {"client": seen, "workload": after}

    def close(self) -> None:
        if self._client and self._client.poll() is None:
            self._client.kill()
            self._client.wait()
        self._said.close()
        self._told.close()


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, the value that one in a hundred exceeds, and the worst."""
    if not values:
        return None
    values = sorted(values)
    p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
    return {"median": round(statistics.median(values), 1), "p99": round(p99, 1), "worst": round(values[-1], 1)}


def compare(first: dict[str, dict[str, int]], last: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """A row for each thing that is counted on each node."""
    rows = []
    for node in first:
        for measure in hoststate.measures(node):
            before, after = first[node][measure.name], last[node][measure.name]
            rows.append({
                "node": node, "what": measure.name, "unit": measure.unit, "after_warm_up": before, "in_the_end": after,
                "allowed_growth": measure.slack, "grew": after - before > measure.slack,
            })
    return rows


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['after_warm_up']} → {row['in_the_end']}" + ("!" if row["grew"] else "")


def table(report: dict[str, Any]) -> str:
    """For a terminal: figures, then what grew or changed."""
    lines = [f"moves: {report['moves']}, of them {report['warm_up']} to warm up; {report['seconds']:.0f} s"]
    for name, label in (("downtime_ms", "downtime"), ("client_gap_ms", "client gap"), ("took_ms", "move")):
        if found := report[name]:
            cells = "   ".join(f"{key} {found[key]:7.1f} ms" for key in ("median", "p99", "worst"))
            lines.append(f"{label:12} {cells}")
    rows = report["hosts"]
    nodes = list(dict.fromkeys(row["node"] for row in rows))
    if rows:
        lines.append(f"{'AFTER WARM-UP → END':20}" + "".join(f"{node:>18}" for node in nodes))
    for what in dict.fromkeys(row["what"] for row in rows):
        found = {row["node"]: row for row in rows if row["what"] == what}
        unit = next(iter(found.values()))["unit"]
        cells = [cell(found.get(node)) for node in nodes]
        lines.append(f"{f'{what} {unit}':20}" + "".join(f"{text:>18}" for text in cells))
    lines += [f"NOT AS IT SHOULD BE: {problem}" for problem in report["problems"]]
    if not report["problems"]:
        lines.append("no error, no lost connection, the same process, and nothing grew")
    return "\n".join(lines)


def work(soak: Soak, lab: Lab, given: argparse.Namespace, report: dict[str, Any]) -> None:
    """All moves; what is found out is in the report, also when this ends early."""
    nodes = [CONTROLLER, *NODES]
    soak.prepare()
    before = soak.status()
    first: dict[str, dict[str, int]] = {}
    for number in range(1, given.moves + 1):
        soak.move_on(number)
        if number == given.warm_up:
            say(f"{number} moves to warm up; counting what hosts hold")
            first = hoststate.sample(lab, nodes)
    say(f"{given.moves} moves; counting what hosts hold")
    report["hosts"] = compare(first, hoststate.sample(lab, nodes))
    report.update(soak.finish(before))
    for row in report["hosts"]:
        if row["grew"]:
            soak.problems.append(
                f"{row['node']}: {row['what']} grew from {row['after_warm_up']} to {row['in_the_end']} {row['unit']}"
                f" in {given.moves - given.warm_up} moves; {row['allowed_growth']} are allowed".replace("  ", " ")
            )


def main() -> int:
    given = arguments()
    if given.check_arguments:
        return 0
    program = os.environ.get("GODWIT_BIN") or f"{os.environ.get('CARGO_TARGET_DIR') or 'target'}/debug/godwit"
    lab = Lab(os.path.abspath(program), given.lab)
    output = Path(given.report).resolve() if given.report else None
    if os.geteuid():
        say("error: not root: namespaces and mounts need it; run: sudo ./dev soak")
        return 1
    if not os.access(lab.program, os.X_OK):
        say(f"error: {lab.program} is not there: build it, or name another by GODWIT_BIN")
        return 1
    if output and not output.parent.is_dir():
        say(f"error: {output.parent} is no directory: the report could not be written")
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    report: dict[str, Any] = {"moves": given.moves, "warm_up": given.warm_up, "hosts": [], "problems": []}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="godwit-soak-") as directory, contextlib.ExitStack() as stack:
        soak = Soak(lab, Path(directory))
        stack.callback(soak.close)
        stack.callback(take_down, lab, soak.problems)
        try:
            say(f"making lab {lab.name}: {HOSTS} hosts, links of {LINK}")
            lab.up(HOSTS, LINK)
            work(soak, lab, given, report)
        except Failed as error:
            soak.problems.append(str(error))
            say(lab.log_tails([CONTROLLER, *NODES]))
        except KeyboardInterrupt:
            soak.problems.append(f"interrupted after {len(soak.moves)} moves")
    report["problems"] = soak.problems
    report["seconds"] = time.monotonic() - began
    for name in ("downtime_ms", "client_gap_ms", "took_ms"):
        report[name] = spread([move[name] for move in soak.moves if move.get(name) is not None])
    report["each_move"], report["trend"] = soak.moves, soak.trend
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 1 if soak.problems else 0


def take_down(lab: Lab, problems: list[str]) -> None:
    """Nothing that asks for an end a second time keeps the lab from being removed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    say(f"removing lab {lab.name}")
    try:
        lab.down()
    except Failed as error:
        problems.append(str(error))


if __name__ == "__main__":
    sys.exit(main())
