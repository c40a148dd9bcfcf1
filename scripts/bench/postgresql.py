"""PostgreSQL whose shared buffers are full, under pgbench."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from kernel import run
from program import Program, Tools, unpack
from workload import INTERVAL_MS, Failed, Move, Place, wait_until

COMPOSE = """name: bench
services:
  db:
    image: oci:{images}/postgresql:latest
    command: [{command}]
    environment: {{POSTGRES_DB: shop, POSTGRES_PASSWORD: "", POSTGRES_HOST_AUTH_METHOD: trust}}
    volumes: ["files:/var/lib/postgresql/data"]
    ports: ["5432:5432"]
    stop_signal: SIGINT
    x-godwit:
      cloudlets: {{reserved: 2, limit: 64}}
volumes: {{files: {{}}}}
"""
DATABASE, USER = "shop", "postgres"
# pgbench's tables and indexes have 15 MiB for each step of its scale: they fill the buffers.
MIB_PER_SCALE = 15
CLIENTS = 4
LONGEST_S = 3_600
DATA_IN_IMAGE = "/var/lib/postgresql/data"
WRONG_SUMS = "select (select coalesce(sum(delta), 0) from pgbench_history) <> (select sum(abalance) from pgbench_accounts)"
WHY_NOT_LAZY = (
    "CRIU's lazy pages leave out private memory only: shared buffers stay in image files at the source, which would"
    " have to be copied while PostgreSQL stands still. For this program that is stop and copy"
)

WHY_NOT_OTHERS = (
    "root lacks CAP_SYS_RESOURCE on this machine, without which CRIU cannot ask for the limits of processes of another"
    " user, and PostgreSQL does not run as root"
)
CAP_SYS_RESOURCE = 24


class PostgreSql(Program):
    """Some ten processes that share memory; four connections with transactions."""

    service, port = "db", 5432
    # Its lock on the directory is a System V segment.
    namespaces = ("--pid", "--ipc")

    def __init__(self, tools: Tools, mib: int, volume_mib: int = 0) -> None:
        """`mib` of shared buffers, and tables that fill them, or tables of `volume_mib`."""
        super().__init__(tools)
        self._mib, self._large = mib, volume_mib > mib
        self._scale = max(1, (volume_mib or mib) // MIB_PER_SCALE)
        # Its files are in the page cache beside it.
        files_mib = volume_mib or mib
        self.warm_mib, self.need_mib = mib + files_mib, 3 * (mib + files_mib)
        self.cannot = {"criu-lazy-pages": WHY_NOT_LAZY}
        if not may_ask_for_limits():
            self.cannot |= {"criu-stop-and-copy": WHY_NOT_OTHERS, "runc-stop-and-copy": WHY_NOT_OTHERS}
        self._data: Path | None = None
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
        self._bin = found[-1].parent if found else Path("/usr/bin")

    def _settings(self) -> list[str]:
        settings = [f"shared_buffers={self._mib}MB", "max_wal_size=4GB"]
        if self._large:
            # What fills a new table is not written twice.
            settings += ["wal_level=minimal", "max_wal_senders=0"]
        return [word for setting in settings for word in ("-c", setting)]

    def compose(self) -> str:
        command = ", ".join(f'"{word}"' for word in ["postgres", *self._settings()])
        return COMPOSE.format(images=self.tools.images, command=command)

    def make_files(self, directory: Path) -> None:
        """A new cluster on the disk: files of labs' containers are there too."""
        self._data = Path(tempfile.mkdtemp(prefix="data-", dir=self.tools.disk))
        shutil.chown(self._data, USER, USER)
        initdb = [*self._as_postgres(), str(self._bin / "initdb"), "--auth=trust", "--encoding=UTF8"]
        done = run([*initdb, "--locale=C.UTF-8", f"--username={USER}", str(self._data)], cwd="/")
        if done.returncode:
            raise Failed(f"initdb: {done.stderr.strip()[-500:]}")
        with open(self._data / "pg_hba.conf", "a", encoding="ascii") as rules:
            rules.write("host all all all trust\n")
        with open(self._data / "postgresql.conf", "a", encoding="ascii") as settings:
            settings.write("listen_addresses = '*'\nunix_socket_directories = ''\n")

    def _as_postgres(self) -> list[str]:
        return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]

    def command(self, directory: Path) -> list[str]:
        return [*self._as_postgres(), str(self._bin / "postgres"), "-D", str(self._data), *self._settings()]

    def root(self, directory: Path) -> None:
        unpack(self.tools.images / "postgresql", directory)
        fields = next(
            line.split(":") for line in (directory / "etc/passwd").read_text().splitlines() if line.startswith(USER)
        )
        self.user = int(fields[2]), int(fields[3])

    def command_in_root(self) -> list[str]:
        return [str(self._bin / "postgres"), "-D", DATA_IN_IMAGE, *self._settings()]

    def binds(self, directory: Path) -> list[tuple[str, str]]:
        assert self._data
        run(["chown", "-R", "{}:{}".format(*self.user), str(self._data)])
        return [(str(self._data), DATA_IN_IMAGE)]

    def remove_files(self) -> None:
        if self._data:
            shutil.rmtree(self._data, ignore_errors=True)
            self._data = None

    def _ask(self, place: Place, query: str) -> subprocess.CompletedProcess[str]:
        return place.run([*self._psql(place, query), DATABASE])

    def _psql(self, place: Place, query: str) -> list[str]:
        return [str(self._bin / "psql"), "-h", place.host, "-p", place.port, "-U", USER, "-tAc", query]

    def answers(self, place: Place) -> bool:
        if self._ask(place, "select 1").returncode == 0:
            return True
        createdb = [str(self._bin / "createdb"), "-h", place.host, "-p", place.port, "-U", USER, DATABASE]
        return place.run(createdb).returncode == 0

    def _pgbench(self, place: Place, *more: str) -> list[str]:
        return [str(self._bin / "pgbench"), "-h", place.host, "-p", place.port, "-U", USER, *more, DATABASE]

    def fill(self, place: Place) -> None:
        place.must(self._pgbench(place, "-i", "-q", "-s", str(self._scale)))
        if self._large:
            # A checkpoint in the middle of the move would write every changed page once more.
            place.must([*self._psql(place, "checkpoint"), DATABASE])
            return
        tables = "select sum(pg_prewarm(oid)) from pg_class where relname like 'pgbench_%' and relkind in ('r', 'i')"
        done = self._ask(place, f"create extension pg_prewarm; {tables}; checkpoint")
        if done.returncode:
            raise Failed(f"reading tables into shared buffers: {done.stderr.strip()[-500:]}")

    def client(self, place: Place) -> PgBench:
        more = ["-n", "-c", str(CLIENTS), "-j", "1", "-T", str(LONGEST_S), "-P", "1", "--log"]
        directory = tempfile.mkdtemp(prefix="pgbench-", dir=self.tools.disk)
        return PgBench(place, self._pgbench(place, *more, "--log-prefix", f"{directory}/log"), Path(directory))

    def check(self, place: Place) -> list[str]:
        done = self._ask(place, WRONG_SUMS)
        if done.returncode:
            return [f"psql: {done.stderr.strip()[-500:]}"]
        return [] if done.stdout.strip() == "f" else ["the sums of what pgbench did do not agree with its accounts"]


def may_ask_for_limits() -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_SYS_RESOURCE & 1)


class PgBench:
    """pgbench at work. It has one thread, so it has one log."""

    def __init__(self, place: Place, command: list[str], directory: Path) -> None:
        self._directory = directory
        self._talk = open(directory / "talk", "w+", encoding="utf-8")  # noqa: SIM115: closed with the client
        self._process = place.start(command, stdout=self._talk, stderr=self._talk)
        try:
            wait_until(lambda: self._ended() or "progress:" in self._said(), 30, "the first transactions")
            if self._ended():
                raise Failed(f"pgbench ended: {self._said()[-500:]}")
        except Failed:
            self.kill()
            raise

    def _ended(self) -> bool:
        return self._process.poll() is not None

    def _said(self) -> str:
        return (self._directory / "talk").read_text()

    def finish(self, move: Move) -> None:
        """Tells it that its time is over, by the signal of its own clock."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGALRM)
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            raise Failed(f"pgbench never ended: a connection hangs; it said {self._said()[-300:]}") from None
        log = (self._directory / f"log.{self._process.pid}").read_text()
        gaps, failed = read_log(log)
        move.note_gaps(gaps)
        wrong = [line for line in self._said().splitlines() if "error" in line or "aborted" in line]
        move.errors += max(failed, len(wrong), int(self._process.returncode != 0))
        move.messages += wrong[:20]

    def kill(self) -> None:
        if not self._ended():
            self._process.kill()
            self._process.wait()
        self._talk.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def read_log(log: str) -> tuple[list[tuple[float, float]], int]:
    """For each interval its end and the longest time that one client waited for an end of a transaction, both in
    milliseconds; and how many transactions failed. Lines: client, number, microseconds or `failed`, script, second and
    microsecond of the end."""
    last: dict[str, float] = {}
    longest: dict[int, float] = {}
    failed = 0
    for line in log.splitlines():
        client, _, duration, _, seconds, microseconds = line.split(" ")[:6]
        end = int(seconds) * 1e3 + int(microseconds) / 1e3
        failed += duration == "failed"
        gap = end - last.get(client, end)
        last[client] = end
        interval = int(end // INTERVAL_MS) + 1
        longest[interval] = max(gap, longest.get(interval, 0.0))
    return [(interval * INTERVAL_MS, gap) for interval, gap in sorted(longest.items())], failed
