"""A lab of godwit, used through the program as a person would."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernel import run
from workload import Failed

COMMAND_SECONDS = 600
ENTRANCE = "192.168.77.11"
CONTROLLER, CLIENT = "ctl", "client"


class Lab:
    """One lab by its name. `mounts`: the mount namespace to run godwit in, if not this process's own."""

    def __init__(self, program: str, name: str, mounts: int | None = None) -> None:
        self.program, self.name, self.mounts = program, name, mounts
        self.state, self.run = Path("/var/lib/godwit-lab") / name, Path("/run/godwit-lab") / name

    def godwit(self, *arguments: str, **options: Any) -> str:
        """Runs godwit for this lab; its standard output."""
        return self._run("-q", "--lab", self.name, *arguments, **options)

    def _run(self, *arguments: str, **options: Any) -> str:
        try:
            done = run([self.program, *arguments], mounts=self.mounts, timeout=COMMAND_SECONDS, **options)
        except subprocess.TimeoutExpired:
            raise Failed(f"godwit {' '.join(arguments)}: not done after {COMMAND_SECONDS} s") from None
        if done.returncode:
            raise Failed(f"godwit {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[-800:]}")
        return done.stdout

    def ask(self, *arguments: str) -> Any:
        """What a verb says as JSON."""
        return json.loads(self.godwit("--output", "json", *arguments))

    def ask_list(self, *arguments: str) -> list[dict[str, Any]]:
        """What a listing says, whether it is a list or an object around one."""
        answer = self.ask(*arguments)
        while isinstance(answer, dict):
            answer = next(value for value in answer.values() if isinstance(value, list))
        return answer

    def on(self, node: str) -> list[str]:
        """What to put before a command so that it runs on a node."""
        return [self.program, "-q", "lab", "exec", "--name", self.name, node, "--"]

    def up(self, hosts: int, link: str) -> None:
        """Makes the lab; one that an earlier run left is removed first."""
        self.down()
        self._run("-q", "lab", "up", "--name", self.name, "--hosts", str(hosts), "--link", link)

    def down(self) -> None:
        """Removes the lab, whatever there is of it."""
        self._run("-q", "lab", "down", "--name", self.name)

    def log_tails(self, nodes: Sequence[str], lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        told = []
        for node in nodes:
            path = self.state / "log" / f"{node}.log"
            text = path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else ["(none)"]
            told.append(f"--- log of {node}\n" + "\n".join(text))
        return "\n".join(told)
