"""runc with CRIU: stop and copy of a container, driven like CRIU alone (criu.py says how and why).

The root file system is the same on both hosts, as an image's would be; only memory goes over the link.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from criu import PORT, tail
from freezer import freeze_group, thaw_group
from hooks import Hooks
from kernel import bind, run, start, umount, wait
from peerlab import GUEST_ADDRESS, HOST_ADDRESS, PeerLab
from program import Program
from uncork import Uncork
from workload import Failed, Move, Place

# What is moved is called so, whatever it is.
NAME = "program"


class Runc:
    """One contestant."""

    name = "runc-stop-and-copy"

    def __init__(self, lab: PeerLab, work: Path, criu: str) -> None:
        self._lab, self._work, self._criu = lab, work / self.name, criu
        self.place = Place("")
        self._program: Program | None = None
        self._mounted: list[str] = []
        self._server: subprocess.Popen[str] | None = None
        self._hooks: Hooks | None = None
        self._uncork: Uncork | None = None

    def prepare(self, program: Program) -> None:
        """Starts a program in a container at the source."""
        self._program = program
        self.place = Place(f"{GUEST_ADDRESS}:{program.port}", network=self._lab.client)
        self._lab.at_source()
        self._work.mkdir()
        os.chmod(self._work, 0o755)
        self._hooks = Hooks(self._work, self._lab, lambda: freeze_group(self._group("A")))
        root = self._work / "root"
        program.make_files(self._work)
        program.root(root)
        binds = program.binds(self._work)
        options = f"tcp-established\nnetwork-lock skip\nskip-in-flight\naction-script {self._hooks.script}\n"
        (self._work / "criu.conf").write_text(options)
        for side in "AB":
            bundle = self._work / side
            bundle.mkdir()
            network = bundle / "net"
            network.touch()
            bind(f"/proc/{os.getpid()}/fd/{self._lab.guest[side].fd}", str(network))
            self._mounted.append(str(network))
            (bundle / "config.json").write_text(json.dumps(self._config(side, root, network, program, binds), indent=1))
        self._run("A", "run", "--detach", "--bundle", str(self._work / "A"), NAME)

    def _config(
        self, side: str, root: Path, network: Path, program: Program, binds: list[tuple[str, str]]
    ) -> dict[str, object]:
        done = run(["runc", "spec", "--bundle", str(self._work / side)])
        if done.returncode:
            raise Failed(f"runc spec: {done.stderr.strip()}")
        config = json.loads((self._work / side / "config.json").read_text())
        uid, gid = program.user
        config["process"].update(
            terminal=False, noNewPrivileges=True, args=program.command_in_root(), user={"uid": uid, "gid": gid}
        )
        for capabilities in config["process"]["capabilities"].values():
            capabilities += [name for name in program.capabilities if name not in capabilities]
        config["process"]["rlimits"] = []
        config["root"] = {"path": str(root), "readonly": False}
        config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
        config["mounts"] += [
            {"destination": to, "type": "bind", "source": source, "options": ["bind", "rw"]} for source, to in binds
        ]
        config["annotations"] = {"org.criu.config": str(self._work / "criu.conf")}
        linux = config["linux"]
        linux["cgroupsPath"] = f"/godwit-bench/{side}/{NAME}"
        for namespace in linux["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = str(network)
        return config

    def _group(self, side: str) -> Path:
        """The control group that freezes the container."""
        state = json.loads((self._work / f"state{side}" / NAME / "state.json").read_text())
        paths = state["cgroup_paths"]
        return Path(paths.get("freezer") or paths[""])

    def _command(self, side: str, *arguments: str) -> list[str]:
        log = str(self._work / f"runc{side}.log")
        return ["runc", "--root", str(self._work / f"state{side}"), "--criu", self._criu, "--log", log, *arguments]

    def _run(self, side: str, *arguments: str) -> None:
        """Runs runc with nothing of ours as the container's standard input and output."""
        process = self._start(side, *arguments)
        if wait(process, 300):
            self._failed(side, arguments[0])

    def _start(self, side: str, *arguments: str) -> subprocess.Popen[str]:
        return start(
            self._command(side, *arguments), self._lab.host[side], dies=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )

    def _failed(self, side: str, verb: str) -> None:
        said = tail(self._work / f"runc{side}.log")
        for log in ("dump.log", "restore.log"):
            if (self._work / "images" / log).exists():
                said += f" | {log}: {tail(self._work / 'images' / log)}"
        raise Failed(f"runc {verb}: {said}"[:1_500])

    def move(self) -> Move:
        """Moves it from A to B."""
        assert self._hooks
        self._hooks.reset()
        images = self._work / "images"
        images.mkdir()
        os.chmod(images, 0o755)
        move = Move()
        sent = self._lab.bytes_sent()
        begun = time.monotonic()
        self._serve(images)
        where = ("--image-path", str(images), "--work-path", str(images))
        checkpoint = self._start(
            "A", "checkpoint", *where, "--tcp-established", "--page-server", f"{HOST_ADDRESS['B']}:{PORT}", NAME
        )
        self._uncork = Uncork(checkpoint.pid, PORT)
        if wait(checkpoint, 300):
            self._failed("A", "checkpoint")
        assert self._server
        if wait(self._server, 60):
            raise Failed(f"criu page-server: {tail(images / 'page-server.log')}")
        dumped = time.monotonic()
        self._run(
            "B", "restore", "--detach", *where, "--tcp-established", "--bundle", str(self._work / "B"), NAME
        )
        move.total_ms = (time.monotonic() - begun) * 1e3
        move.bytes_sent = self._lab.bytes_sent() - sent
        stopped, resumed = self._hooks.times("pre-dump", "pre-resume")
        move.downtime_ms = (resumed - stopped) * 1e3
        move.parts = {"dump": (dumped - stopped) * 1e3, "restore": (resumed - dumped) * 1e3}
        return move

    def _serve(self, images: Path) -> None:
        reading, writing = os.pipe()
        command = [
            self._criu, "page-server", "-D", str(images), "-W", str(images), "-o", "page-server.log", "-v1",
            "--address", HOST_ADDRESS["B"], "--port", str(PORT), "--status-fd", str(writing),
        ]
        self._server = start(
            command, self._lab.host["B"], pass_fds=(writing,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(writing)
        ready = os.read(reading, 1)
        os.close(reading)
        if not ready:
            raise Failed(f"criu page-server: {tail(images / 'page-server.log')}")

    def cleanup(self) -> None:
        """Ends all that is left of a move, whatever state it is in."""
        if self._uncork:
            self._uncork.stop()
            self._uncork = None
        if self._hooks:
            self._hooks.close()
            self._hooks = None
        for side in "AB":
            if (self._work / f"state{side}").exists():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    thaw_group(self._group(side))
                run(self._command(side, "delete", "--force", NAME))
        if self._server and self._server.poll() is None:
            self._server.kill()
            self._server.wait()
        self._server = None
        for path in self._mounted:
            umount(path)
        self._mounted.clear()
        remove_groups()
        if self._work.exists():
            unmount_below(self._work)
            shutil.rmtree(self._work)
        if self._program:
            self._program.remove_files()
            self._program = None


def remove_groups() -> None:
    """Removes the control groups that runc leaves, if nothing is in them."""
    for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*")):
        for name in (f"A/{NAME}", f"B/{NAME}", "A", "B", ""):
            with contextlib.suppress(OSError):
                (hierarchy / "godwit-bench" / name).rmdir()


def unmount_below(directory: Path) -> None:
    """A failed restore leaves mounts; deleting through one would empty what is mounted there."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    below = [point for point in (line.split()[4] for line in lines) if point.startswith(f"{directory}/")]
    for point in reversed(below):
        umount(point)
