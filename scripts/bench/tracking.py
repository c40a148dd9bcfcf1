"""What it costs a program that its written pages are tracked, as they are while a move copies.

Redis and PostgreSQL run in a lab under full load. Windows without tracking and windows with it take turns, and each tracked
one is compared with the two around it. Nothing is copied: the processor time of copying is the move's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import CLIENT, ENTRANCE, Lab
from workload import Failed, wait_until

LAB = "godwit-tracking"
WINDOW_S, EVERY_MS = 8, 100
KEYS, VALUE_BYTES = 1_000_000, 1_000
COMPOSE = """name: bench
services:
  cache:
    image: oci:{images}/redis:latest
    command: redis-server --save ''
    ports: ["6379:6379"]
    x-godwit: {{cloudlets: {{reserved: 2, limit: 64}}}}
  db:
    image: oci:{images}/postgresql:latest
    command: [postgres, -c, shared_buffers=1024MB, -c, max_wal_size=4GB]
    environment: {{POSTGRES_DB: shop, POSTGRES_PASSWORD: "", POSTGRES_HOST_AUTH_METHOD: trust}}
    volumes: ["files:/var/lib/postgresql/data"]
    ports: ["5432:5432"]
    stop_signal: SIGINT
    x-godwit: {{cloudlets: {{reserved: 2, limit: 64}}}}
volumes: {{files: {{}}}}
"""


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Site:
    """The lab, its client node and the tracker."""

    def __init__(self, program: str) -> None:
        self.lab = Lab(program, LAB)
        self.track = str(Path(program).parent / "examples/track")

    def client(self, *command: str, seconds: int = 300) -> str:
        done = subprocess.run(
            [*self.lab.on(CLIENT), *command], capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode:
            raise Failed(f"{' '.join(command[:4])}: {(done.stderr or done.stdout).strip()[-400:]}")
        return done.stdout

    def load(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.lab.on(CLIENT), *command], stdout=-3, stderr=-3, stdin=-3, text=True)

    def procs(self, process: str) -> str:
        """The list of the cgroup in which a program of the lab with that name runs."""
        for found in Path("/proc").glob("[0-9]*"):
            try:
                name, groups = (found / "comm").read_text().strip(), (found / "cgroup").read_text()
            except OSError:
                continue
            if name != process or LAB not in groups:
                continue
            for line in groups.splitlines():
                _, controllers, path = line.split(":", 2)
                if "pids" in controllers.split(","):
                    return f"/sys/fs/cgroup/{controllers}{path}/cgroup.procs"
                if not controllers:
                    unified = Path(f"/sys/fs/cgroup{path}/cgroup.procs")
                    if unified.exists():
                        return str(unified)
        raise Failed(f"no process {process} in the lab {LAB}")


def windows(count: Callable[[], int], site: Site, procs: str, turns: int, what: str) -> dict[str, Any]:
    """Operations per second without and with tracking, in turns."""

    def window() -> float:
        began, before = time.monotonic(), count()
        time.sleep(WINDOW_S)
        return (count() - before) / (time.monotonic() - began)

    ratios, plain_rates, told = [], [], {}
    before = window()
    for turn in range(1, turns + 1):
        tracker = subprocess.Popen(
            [site.track, procs, str(EVERY_MS), str(WINDOW_S + 1)], stdout=subprocess.PIPE, text=True
        )
        try:
            # The first round, which arms every process, is in the window.
            tracked = window()
            told = json.loads(tracker.communicate(timeout=60)[0])
        finally:
            tracker.kill()
            tracker.wait()
        after = window()
        plain = (before + after) / 2
        before = after
        ratios.append(tracked / plain)
        plain_rates.append(plain)
        say(f"{what}, turn {turn} of {turns}: {plain:.0f}/s, tracked {tracked:.0f}/s, {ratios[-1]:.3f}; {told}")
    return {
        "workload": what, "turns": turns, "per_second": round(statistics.median(plain_rates)),
        "left": {
            "median": round(statistics.median(ratios), 3), "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
        "tracker": told,
    }


def redis(site: Site, turns: int) -> list[dict[str, Any]]:
    """Full speed with all writes, and with one in ten."""
    at = ["-h", ENTRANCE, "-p", "6379"]
    benchmark = ["/usr/bin/redis-benchmark", *at, "-r", str(KEYS), "-d", str(VALUE_BYTES)]
    site.client(*benchmark, "-t", "set", "-n", str(2 * KEYS), "-P", "16", "-q")

    def count() -> int:
        for line in site.client("/usr/bin/redis-cli", *at, "info", "stats").splitlines():
            if line.startswith("total_commands_processed:"):
                return int(line.split(":")[1])
        raise Failed("redis says nothing of its commands")

    found = []
    endless = ["-n", "1000000000", "-q"]
    for what, mix in (("redis-1gib-set", (("set", 20),)), ("redis-1gib-get-9-set-1", (("get", 18), ("set", 2)))):
        loads = [site.load(*benchmark, *endless, "-t", test, "-c", str(clients)) for test, clients in mix]
        try:
            time.sleep(1)
            found.append(windows(count, site, site.procs("redis-server"), turns, what))
        finally:
            for load in loads:
                load.kill()
                load.wait()
    return found


def postgresql(site: Site, turns: int) -> list[dict[str, Any]]:
    """pgbench with four connections on tables that fill the shared buffers."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))[-1].parent
    at = ["-h", ENTRANCE, "-p", "5432", "-U", "postgres"]
    ask = [str(binaries / "psql"), *at, "-tAc"]

    def ready() -> bool:
        try:
            return site.client(*ask, "select 1", "shop").strip() == "1"
        except Failed:
            return False

    wait_until(ready, 60, "PostgreSQL's first answer")
    site.client(str(binaries / "pgbench"), *at, "-i", "-q", "-s", "68", "shop")
    tables = "select sum(pg_prewarm(oid)) from pg_class where relname like 'pgbench_%' and relkind in ('r', 'i')"
    site.client(*ask, f"create extension pg_prewarm; {tables}; checkpoint", "shop")

    # One connection for all questions: a new one is a fork, after which shared memory has to be compared.
    session = subprocess.Popen(
        [*site.lab.on(CLIENT), str(binaries / "psql"), *at, "-qtA", "shop"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )
    assert session.stdin and session.stdout
    questions, answers = session.stdin, session.stdout

    def count() -> int:
        # Backends hand their counts in once a second at most.
        questions.write("select xact_commit from pg_stat_database where datname = 'shop';\n")
        questions.flush()
        return int(answers.readline())

    load = site.load(str(binaries / "pgbench"), *at, "-n", "-c", "4", "-j", "1", "-T", "3600", "shop")
    try:
        time.sleep(3)
        return [windows(count, site, site.procs("postgres"), turns, "postgres-1gib-pgbench")]
    finally:
        for process in (load, session):
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench tracking", description=__doc__.split("\n")[0])
    parser.add_argument("--report", metavar="FILE", required=True, help="where the figures go, as JSON")
    parser.add_argument("--turns", type=int, default=9, help="tracked windows of each workload")
    parser.add_argument("--only", choices=("redis", "postgresql"), help="one of the two")
    parser.add_argument("--check-arguments", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.check_arguments:
        return 0
    if os.geteuid():
        say("error: not root: the lab needs it; run: sudo ./dev bench tracking")
        return 1
    program = os.environ.get("GODWIT_BIN") or f"{os.environ.get('CARGO_TARGET_DIR') or 'target'}/debug/godwit"
    site = Site(os.path.abspath(program))
    images = Path(os.environ.get("GODWIT_IMAGES") or ".images").resolve()
    load = [os.getloadavg()[0]]
    site.lab.up(2, "10gbit")
    try:
        site.lab.godwit("env", "apply", "--wait", "-f", "-", input=COMPOSE.format(images=images))
        results = []
        for name, measure in (("redis", redis), ("postgresql", postgresql)):
            if given.only in (None, name):
                results += measure(site, given.turns)
    finally:
        site.lab.down()
    load.append(os.getloadavg()[0])
    found = {"results": results, "every_ms": EVERY_MS, "load_average": load, "cpus": os.cpu_count()}
    Path(given.report).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'workload':26} {'per second':>10} {'left, median':>13} {'least':>7} {'most':>7}")
    for entry in results:
        left = entry["left"]
        print(
            f"{entry['workload']:26} {entry['per_second']:10} {left['median']:13.1%} {left['least']:7.1%}"
            f" {left['most']:7.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
